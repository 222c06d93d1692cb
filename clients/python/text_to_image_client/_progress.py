"""How `t2i generate` shows what happens: live bars on a terminal, plain lines elsewhere. Always on stderr."""

import time
from types import TracebackType
from typing import Protocol, Self

from rich import progress as bars
from rich.console import Console
from rich.text import Text

from ._types import Progress, Queued, Stage

_PLAIN_SECONDS = 5.0


class Display(Protocol):
    """What follows a stream of events, between entering and leaving its `with` block."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, event: Queued | Progress) -> None:
        """Show how far the request is."""

    def finish(self, choice_index: int, line: str) -> None:
        """Say `line`, now that image `choice_index` is finished."""

    def say(self, line: str) -> None:
        """Say `line` amid what is shown."""


def display_for(console: Console, images: int | None) -> Display:
    """The display that suits `console` and a request for so many images, None for a number that is yet to be seen."""
    return LiveDisplay(console, images) if console.is_terminal else PlainDisplay(console, images)


class _Elapsed(bars.ProgressColumn):
    """Seconds that a stage has taken so far."""

    def render(self, task: bars.Task) -> Text:
        return Text(_duration(task.finished_time or task.elapsed or 0.0), "progress.elapsed", justify="right")


class LiveDisplay:
    """One row per stage, added as it is reached. Of several images, a finished one's rows give way to its line."""

    def __init__(self, console: Console, images: int | None) -> None:
        self._images = images
        self._rows: dict[tuple[int, Stage], bars.TaskID] = {}
        self._latest = 0.0
        self._shown: tuple[tuple[int, Stage], int] | None = None
        self._bars = bars.Progress(
            bars.SpinnerColumn(finished_text=Text("✓", "green")),
            bars.TextColumn("{task.description}", style="bold", markup=False),
            bars.BarColumn(bar_width=32),
            bars.TextColumn("{task.fields[count]}", style="progress.download", justify="right"),
            _Elapsed(),
            bars.TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=console,
        )
        self._waiting = self._bars.add_task("sending", start=False, total=None, count="", note="")

    def __enter__(self) -> Self:
        self._bars.start_task(self._waiting)
        self._latest = self._bars.get_time()
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._settle()
        self._drop(self._waiting)
        self._bars.stop()

    def show(self, event: Queued | Progress) -> None:
        if isinstance(event, Queued):
            note = " · ".join(filter(None, (_ahead(event), _left(event.eta))))
            self._bars.update(self._waiting, description="queued", note=note)
            return
        self._drop(self._waiting)
        self._settle()
        key = (event.choice_index, event.stage)
        count, note = f"{event.step}/{event.steps}", _left(event.eta)
        if (key, event.step) == self._shown:  # the server repeats its newest event in a silence
            if self._rows[key] in self._bars.task_ids:
                self._bars.update(self._rows[key], note=note)
            return
        self._shown = key, event.step
        if key not in self._rows:
            label = _label(event, self._images)
            self._rows[key] = self._bars.add_task(label, total=event.steps, count=count, note=note)
            # A stage begins where the call before its first one ended.
            self._bars.tasks[-1].start_time = self._latest
        self._bars.update(self._rows[key], completed=event.step, count=count, note=note)
        self._latest = self._bars.get_time()

    def finish(self, choice_index: int, line: str) -> None:
        self._settle()
        if self._images == 1:
            self._bars.stop()  # the rows stay, and the line stands below them
        else:
            for (index, _), row in self._rows.items():
                if index == choice_index:
                    self._drop(row)
            self._bars.refresh()
        self.say(line)

    def say(self, line: str) -> None:
        self._bars.console.print(Text(line), soft_wrap=True)

    def _settle(self) -> None:
        """Leave the time to go to the one row that moves next."""
        for row in self._rows.values():
            if row in self._bars.task_ids:
                self._bars.update(row, note="")

    def _drop(self, row: bars.TaskID) -> None:
        if row in self._bars.task_ids:
            self._bars.remove_task(row)


class PlainDisplay:
    """A line when the request is queued, at the end of every stage, and every few seconds in between."""

    def __init__(self, console: Console, images: int | None) -> None:
        self._console = console
        self._images = images
        self._told = 0.0
        self._newest: tuple[int, Stage, int] | None = None

    def __enter__(self) -> Self:
        self._told = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, event: Queued | Progress) -> None:
        if isinstance(event, Queued):
            self._print(", ".join(filter(None, ("queued", _ahead(event), _left(event.eta)))))
        elif self._is_new_end(event) or time.monotonic() - self._told >= _PLAIN_SECONDS:
            counted = f"{_label(event, self._images)} {event.step}/{event.steps}"
            self._print(", ".join(filter(None, (counted, _left(event.eta)))))

    def finish(self, choice_index: int, line: str) -> None:
        self.say(line)

    def say(self, line: str) -> None:
        self._print(line)

    def _is_new_end(self, event: Progress) -> bool:
        """Whether the event ends a stage, and does not only repeat the newest one, as servers do in a long silence."""
        newest, self._newest = self._newest, (event.choice_index, event.stage, event.step)
        return event.step == event.steps and self._newest != newest

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)
        self._told = time.monotonic()


def _label(event: Progress, images: int | None) -> str:
    if images == 1 or event.stage is Stage.ENCODE:  # the prompts are encoded once, whatever the number of images
        return event.stage.value
    of_all = f" of {images}" if images else ""
    return f"image {event.choice_index + 1}{of_all} {event.stage}"


def _ahead(event: Queued) -> str:
    return f"{event.position} ahead" if event.position else ""


def _left(eta: float | None) -> str:
    return f"{_duration(eta)} left" if eta else ""


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, whole = divmod(round(seconds), 60)
    return f"{minutes} min {whole:02d} s"
