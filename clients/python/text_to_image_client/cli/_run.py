"""`t2i run`: start a server for one request, with the input and output of `instill run`."""

import contextlib
import datetime
import json
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from .._exceptions import ServerError, Unavailable
from .._messages import build_request
from .._sync import TextToImage
from .._types import Format
from ..launcher import IMAGE, ChildServer, container_server, local_server, run_server
from ._group import Seconds, say
from ._instill import parse_input


@click.command()
@click.option("-g", "--gpu", is_flag=True, help="Use the GPU.")
@click.option(
    "-t", "--tag", help=f"Run the container image {IMAGE}:TAG, or TAG itself if it is a full image reference."
)
@click.option("-i", "--input", "text", required=True, metavar="JSON", help='{"prompt": "..."}, or the full task input.')
@click.option(
    "--start-timeout",
    type=Seconds(),
    default=900.0,
    show_default=True,
    help="Seconds that the server has to load its model.",
)
def run(gpu: bool, tag: str | None, text: str, start_timeout: float) -> None:
    """Start a server for one request, as `instill run` does.

    Draws one Instill AI task input, prints the output in Instill's format and stops the server. The server is the
    package installed in this environment, or a container image. Its log is printed if it fails.
    """
    prompt, options = parse_input(text)
    options["format"] = Format.JPEG_RGB  # the format of Instill's own answers
    build_request(prompt, options)  # raises InvalidRequest now instead of after the model is loaded
    for number in (signal.SIGTERM, signal.SIGHUP):  # stop the server also when this process is ended
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="t2i-") as directory:
        _log_as_instill("Starting model image...")
        command = container_server(tag, gpu) if tag else local_server(Path(directory), gpu)
        if command.description:
            say(command.description)
        with run_server(command, Path(directory)) as server:
            _log_as_instill("Deploying model...")
            target = server.wait_until_serving(start_timeout)
            _log_as_instill("Running inference...")
            with _log_printed_on_failure(server), TextToImage(target) as client:
                result = client.generate(prompt, **options)
            _log_as_instill("Outputs:")
            click.echo(json.dumps([result.to_instill()], indent=2))
        _log_as_instill("Done")


def _log_as_instill(line: str) -> None:
    # The format of python-sdk's logger, "%(asctime)s.%(msecs)03d %(levelname)-8s %(message)s", repeats milliseconds.
    now = datetime.datetime.now()
    milliseconds = f"{now.microsecond // 1000:03d}"
    click.echo(f"{now:%Y-%m-%d %H:%M:%S},{milliseconds}.{milliseconds} {'INFO':<8} [Instill] {line}")


@contextlib.contextmanager
def _log_printed_on_failure(server: ChildServer) -> Iterator[None]:
    try:
        yield
    except (ServerError, Unavailable):
        click.echo(server.log(), err=True, nl=False)
        raise
