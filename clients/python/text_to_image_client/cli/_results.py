"""Follow an event stream on the terminal, save its images, and report its warnings and metadata."""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console

from .._files import write_atomically
from .._sync import EventStream
from .._types import Done, Image, ImageReady, Preview, Progress, Queued, Result
from ._group import say
from ._progress import Display, display_for


def follow(events: EventStream, output: Path, n: int | None, preview: Path | None = None) -> Result:
    """Show the events, save the images, and return the result.

    Each of `n` images is saved when it is ready. If `n` is None, all are saved at the end, when their names are known.
    """
    started, resubmitted = time.monotonic(), 0
    with display_for(Console(stderr=True), n) as display, _log_shown_by(display):
        for event in events:
            if events.resubmitted > resubmitted:
                resubmitted = events.resubmitted
                display.say("the server was lost; another one draws the request")
            match event:
                case Done(result):
                    for index, image in enumerate(result.images if n is None else ()):
                        path = _numbered(output, index, len(result.images))
                        display.finish(index, _save(image, path, result.waited + result.ran))
                    return result
                case ImageReady(index, image) if n is not None:
                    display.finish(index, _save(image, _numbered(output, index, n), time.monotonic() - started))
                case Preview(index) if preview is not None and n is not None:
                    with _writing(preview):
                        event.save(_numbered(preview, index, n))
                case Queued() | Progress():
                    display.show(event)
    raise AssertionError("a stream without Done raises ServerError")


def report(result: Result, metadata: Path | None, as_json: bool) -> None:
    """Print the warnings to stderr. Write the metadata to the file `metadata`, and to stdout if `as_json`."""
    for warning in result.warnings:
        say(f"Warning: {warning}", "yellow")
    if metadata is not None:
        with _writing(metadata):
            write_atomically(metadata, (json.dumps(result.metadata, indent=2) + "\n").encode())
    if as_json:
        click.echo(json.dumps(result.metadata, indent=2))


@contextlib.contextmanager
def _log_shown_by(display: Display) -> Iterator[None]:
    """Show the client's log. Without it a stream that waits for its server looks as if it hangs."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            display.say(record.getMessage())

    logger, handler = logging.getLogger("text_to_image_client"), Handler(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def _numbered(path: Path, index: int, n: int) -> Path:
    return path if n == 1 else path.with_stem(f"{path.stem}-{index}")


def _save(image: Image, path: Path, seconds: float) -> str:
    """Save the image and return a line that describes it."""
    name_fits = path.suffix.lower() in image.suffixes  # otherwise the server recoded it, with a warning
    path = path if name_fits else path.with_suffix(image.suffixes[0])
    with _writing(path):
        path = write_atomically(path, image.data, overwrite=name_fits)
    calls = f"base {image.base_calls}" + (f" + refiner {image.refiner_calls}" if image.refiner_calls else "")
    parts = [str(path), f"{image.width}x{image.height}", f"seed {image.seed}", f"{calls} calls", f"{seconds:.1f} s"]
    if image.finish_reason != "success":
        parts.append(image.finish_reason)
    return "  ".join(parts)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Report an OSError in one line that names `path`."""
    try:
        yield
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from error
