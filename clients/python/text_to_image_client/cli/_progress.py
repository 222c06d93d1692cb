"""The progress display of `t2i`: live bars on a terminal, plain lines elsewhere, always on stderr."""

import time
from types import TracebackType
from typing import Protocol, Self

from rich import progress as bars
from rich.console import Console
from rich.text import Text

from .._types import Progress, Queued, Stage

_PLAIN_SECONDS = 5.0


class Display(Protocol):
    """A display of events, active inside its `with` block."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, event: Queued | Progress) -> None:
        """Show the position in the queue, or the progress of an image."""

    def finish(self, choice_index: int, line: str) -> None:
        """Print `line` for the finished image `choice_index`."""

    def say(self, line: str) -> None:
        """Print `line` above the live bars."""


def display_for(console: Console, images: int | None) -> Display:
    """Return the display for `console` and a request for `images` images, None if their number is unknown."""
    return LiveDisplay(console, images) if console.is_terminal else PlainDisplay(console, images)


class _Elapsed(bars.ProgressColumn):
    """The elapsed seconds of a stage."""

    def render(self, task: bars.Task) -> Text:
        return Text(_duration(task.finished_time or task.elapsed or 0.0), "progress.elapsed", justify="right")


class LiveDisplay:
    """Show one row per stage. If there are several images, one line replaces the rows of a finished image."""

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
        self._queue_row = self._bars.add_task("sending", start=False, total=None, count="", note="")

    def __enter__(self) -> Self:
        self._bars.start_task(self._queue_row)
        self._latest = self._bars.get_time()
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear_notes()
        self._remove(self._queue_row)
        self._bars.stop()

    def show(self, event: Queued | Progress) -> None:
        if isinstance(event, Queued):
            note = " · ".join(filter(None, (_ahead(event), _left(event.eta))))
            self._bars.update(self._queue_row, description="queued", note=note)
            return
        self._remove(self._queue_row)
        self._clear_notes()
        key = (event.choice_index, event.stage)
        count, note = f"{event.step}/{event.steps}", _left(event.eta)
        if (key, event.step) == self._shown:  # a heartbeat repeats the newest event
            if self._rows[key] in self._bars.task_ids:
                self._bars.update(self._rows[key], note=note)
            return
        self._shown = key, event.step
        if key not in self._rows:
            label = _label(event, self._images)
            self._rows[key] = self._bars.add_task(label, total=event.steps, count=count, note=note)
            # A stage starts when the last call of the previous stage ends.
            self._bars.tasks[-1].start_time = self._latest
        self._bars.update(self._rows[key], completed=event.step, count=count, note=note)
        self._latest = self._bars.get_time()

    def finish(self, choice_index: int, line: str) -> None:
        self._clear_notes()
        if self._images == 1:
            self._bars.stop()  # the rows stay above the line
        else:
            for (index, _), row in self._rows.items():
                if index == choice_index:
                    self._remove(row)
            self._bars.refresh()
        self.say(line)

    def say(self, line: str) -> None:
        self._bars.console.print(Text(line), soft_wrap=True)

    def _clear_notes(self) -> None:
        """Remove the remaining time from all rows; only the newest row shows it."""
        for row in self._rows.values():
            if row in self._bars.task_ids:
                self._bars.update(row, note="")

    def _remove(self, row: bars.TaskID) -> None:
        if row in self._bars.task_ids:
            self._bars.remove_task(row)


class PlainDisplay:
    """Print a line when the request is queued, at the end of every stage, and every 5 seconds in between."""

    def __init__(self, console: Console, images: int | None) -> None:
        self._console = console
        self._images = images
        self._printed_at = 0.0
        self._newest: tuple[int, Stage, int] | None = None

    def __enter__(self) -> Self:
        self._printed_at = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, event: Queued | Progress) -> None:
        if isinstance(event, Queued):
            self._print(", ".join(filter(None, ("queued", _ahead(event), _left(event.eta)))))
        elif self._ends_stage(event) or time.monotonic() - self._printed_at >= _PLAIN_SECONDS:
            counted = f"{_label(event, self._images)} {event.step}/{event.steps}"
            self._print(", ".join(filter(None, (counted, _left(event.eta)))))

    def finish(self, choice_index: int, line: str) -> None:
        self.say(line)

    def say(self, line: str) -> None:
        self._print(line)

    def _ends_stage(self, event: Progress) -> bool:
        """Return whether the event ends a stage and is not a heartbeat that repeats the newest event."""
        newest, self._newest = self._newest, (event.choice_index, event.stage, event.step)
        return event.step == event.steps and self._newest != newest

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)
        self._printed_at = time.monotonic()


def _label(event: Progress, images: int | None) -> str:
    if images == 1 or event.stage is Stage.ENCODE:  # the prompts are encoded once, whatever the number of images
        return event.stage.value
    total = f" of {images}" if images else ""
    return f"image {event.choice_index + 1}{total} {event.stage}"


def _ahead(event: Queued) -> str:
    return f"{event.position} ahead" if event.position else ""


def _left(eta: float | None) -> str:
    return f"{_duration(eta)} left" if eta else ""


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, whole = divmod(round(seconds), 60)
    return f"{minutes} min {whole:02d} s"
