"""The command `t2i`: draw, now or detached, ask what is served, probe, and run a service for one request.

What a program may want goes to stdout, what a person wants to stderr, and the kind of failure into the exit code.
"""

import contextlib
import datetime
import errno
import json
import logging
import math
import re
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ._client import TLS, EventStream, TextToImage
from ._exceptions import (
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Refused,
    ServerError,
    TextToImageError,
    TooLarge,
    Unauthenticated,
    Unavailable,
)
from ._files import write_whole
from ._instill import parse_input
from ._messages import build_request
from ._progress import Display, display_for
from ._provenance import Provenance
from ._service import IMAGE, Service, ServiceFailed, container_launch, local_launch, running
from ._types import (
    Done,
    Format,
    Image,
    ImageReady,
    ModelInfo,
    OnDisconnect,
    Preview,
    Progress,
    Queued,
    Request,
    Result,
    ServingStatus,
)

_Command = TypeVar("_Command", bound=Callable[..., Any])


class Differs(Exception):
    """What was made again is not what it was, and `--strict` was given."""


EXIT_CODES: dict[type[Exception], int] = {
    InvalidRequest: 3,
    Unavailable: 4,
    Refused: 5,
    DeadlineExceeded: 6,
    ServiceFailed: 7,
    Differs: 8,
    NotFound: 9,
    AlreadyExists: 10,
    Unauthenticated: 11,
    TooLarge: 12,
    Cancelled: 130,
}
"""An error that is not here ends with 1; click ends with 2 when the command line is wrong."""

_EXIT_CODES_HELP = """\b
Exit codes:
  0    done; of `health`: SERVING
  1    unexpected error, of the server or of writing a file
  2    wrong command line
  3    bad input; every bad field is named
  4    not reachable, loading or draining; of `health`: not SERVING
  5    refused, the queue is full
  6    the timeout passed, or is too short for the request
  7    of `run`: the service did not start
  8    of `generate --like --strict`: something differs from what it was
  9    no detached job has this name, or it is no longer kept
  10   the name is that of another detached job
  11   the service needs a token, or does not know this one
  12   a message or its metadata are larger than gRPC takes, here or on the way
  130  cancelled
"""


class _Commands(click.Group):
    """Commands that end with the exit code of what they raise, and a sentence instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (TextToImageError, ServiceFailed, Differs) as error:
            if isinstance(error, ServiceFailed):
                click.echo(error.log, err=True, nl=False)
            _say(f"Error: {_explain(error)}", "red")
            ctx.exit(EXIT_CODES.get(type(error), 1))
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # click ends in silence when nobody reads what it prints
            named = f"{error.filename}: " if error.filename else ""
            _say(f"Error: {named}{error.strerror or error}", "red")
            ctx.exit(1)
        except KeyboardInterrupt:
            _say("Cancelled.")
            ctx.exit(EXIT_CODES[Cancelled])


class _Seconds(click.FloatRange):
    """More than 0 seconds, and a number: nothing is less than what is none."""

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value!r} is not a valid number of seconds.", param, ctx)
        return seconds


def _target_option(command: _Command) -> _Command:
    return click.option(
        "--target",
        metavar="TARGET",
        default=lambda: click.get_current_context().find_root().params["target"],
        show_default="that of t2i",
        help="The service to talk to.",
    )(command)


def _file_option(name: str, variable: str, text: str) -> Callable[[_Command], _Command]:
    path = click.Path(exists=True, dir_okay=False, path_type=Path)
    return click.option(name, type=path, envvar=variable, show_envvar=True, help=text)


@click.group(cls=_Commands, epilog=_EXIT_CODES_HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--target",
    metavar="TARGET",
    envvar="T2I_TARGET",
    show_envvar=True,
    default="127.0.0.1:50051",
    show_default=True,
    help="The service to talk to: HOST:PORT, HOST for port 50051, or unix:/PATH; may also stand behind the command.",
)
@click.option("--tls", is_flag=True, envvar="T2I_TLS", show_envvar=True, help="Use TLS; implied by the next three.")
@_file_option("--tls-ca", "T2I_TLS_CA", "Certificates to trust, PEM.  [default: those of gRPC]")
@_file_option("--tls-client-certificate", "T2I_TLS_CLIENT_CERTIFICATE", "Your own, PEM, if the service asks for one.")
@_file_option("--tls-client-key", "T2I_TLS_CLIENT_KEY", "Its key, PEM.")
@click.option(
    "--token",
    envvar="T2I_TOKEN",
    show_envvar=True,
    help="Who you are, if the service asks; better in the variable, since others can see command lines.",
)
@click.version_option(package_name="text-to-image-client")
def main(
    target: str, token: str | None, tls_client_certificate: Path | None, tls_client_key: Path | None, **_: Any
) -> None:
    """Text to image over gRPC."""
    if (tls_client_certificate is None) != (tls_client_key is None):
        raise click.UsageError("--tls-client-certificate and --tls-client-key go together")


def _connect(target: str) -> TextToImage:
    """A client of `target`, with the TLS and the token that stand before the command."""
    given = click.get_current_context().find_root().params
    files = given["tls_ca"], given["tls_client_certificate"], given["tls_client_key"]
    tls = TLS(*files) if given["tls"] or any(files) else None
    try:
        return TextToImage(target, tls=tls, token=given["token"])
    except ValueError as error:
        raise click.UsageError(str(error)) from error


_metadata_option = click.option(
    "--metadata",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the metadata into this file, JSON, for --like.",
)
_timeout_option = click.option("--timeout", type=_Seconds(), help="Give up after so many seconds.")
_json_option = click.option("--json", "as_json", is_flag=True, help="Print the metadata on stdout.")


@main.command()
@click.argument("prompt", required=False)
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="The image file; needed unless --detach."
)
@click.option("--negative-prompt", help="What to steer away from.")
@click.option("--aspect-ratio", help='Width to height, for example "16:9".  [default: 1:1]')
@click.option(
    "-n", "--n", type=int, help="Number of images; of more than one, -o cat.jpg makes cat-0.jpg, cat-1.jpg ..."
)
@click.option("--seed", type=int, help="Image k is drawn from seed + k.  [default: random, and told]")
@click.option("--steps", type=int, help="Denoising steps of both experts together.")
@click.option("--guidance-scale", type=float, help="Weight of classifier-free guidance, 0 to 50; none at 1 or less.")
@click.option("--high-noise-frac", type=float, help="The base's share of the schedule; 1 leaves the refiner out.")
@click.option("--scheduler", help="One of those that `t2i model` lists.")
@click.option("--width", type=int, help="Pixels, with --height, instead of --aspect-ratio.")
@click.option("--height", type=int, help="Pixels, with --width.")
@click.option(
    "--format",
    "format_",
    type=click.Choice([each.value for each in Format]),
    help="How to code the image.  [default: by the name of -o]",
)
@click.option("--quality", type=int, help="Of the formats that lose something, 1 to 100.  [default: 95]")
@click.option(
    "--like",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Make the images of a --metadata file again, byte for byte; whatever else is given here changes that.",
)
@click.option("--image", "number", type=int, help="With --like: image number K alone, counted from 0.", metavar="K")
@click.option("--strict", is_flag=True, help="With --like: end with 8, not only a warning, if anything differs.")
@click.option("--priority", type=int, help="-2 to 2; each step up counts as if the job were four times shorter.")
@click.option(
    "--preview",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A .jpg that shows the image while it is being made, written anew with every preview.",
)
@click.option(
    "--preview-interval",
    type=click.IntRange(min=1),
    help="With --preview: one for every so many network calls.  [default: 5]",
)
@click.option("--detach", is_flag=True, help="Only begin, and print the name for `t2i attach` and `t2i cancel`.")
@click.option("--request-id", help="Your own name for the request.  [default: random]")
@_metadata_option
@_timeout_option
@_json_option
@_target_option
def generate(
    target: str,
    prompt: str | None,
    output: Path | None,
    format_: str | None,
    like: Path | None,
    number: int | None,
    strict: bool,
    preview: Path | None,
    preview_interval: int | None,
    detach: bool,
    metadata: Path | None,
    timeout: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Draw PROMPT, or what is --like an earlier image, and save it.

    Defaults that are not told here are the model's: see `t2i model`.
    """
    if prompt is None and like is None:
        raise click.UsageError("give a PROMPT, or --like with a metadata file")
    if like is None and (number is not None or strict):
        raise click.UsageError("--image and --strict go with --like")
    if detach and (strict or preview or metadata or as_json):
        raise click.UsageError("--detach only begins: --strict, --preview, --metadata and --json have nothing to tell")
    if preview is None and preview_interval is not None:
        raise click.UsageError("--preview-interval goes with --preview")
    if preview is not None:
        if Format.of(preview) is not Format.JPEG:
            raise click.BadParameter(f"{preview.name} must end in .jpg", param_hint="--preview")
        options["preview_interval"] = preview_interval or 5
    _check_folders({"-o": output, "--preview": preview, "--metadata": metadata})
    _check_overwriting(metadata, None if like else options["n"] or 1, {"-o": output, "--preview": preview})
    made = Provenance.load(like) if like is not None else None
    options["format"] = _format_for(output, format_, made.request(number).get("format") if made else None)
    request = made.request(number, prompt=prompt, **options) if made else cast("Request", {**options, "prompt": prompt})
    if detach:
        _detach(target, timeout, request, output)
        return
    if output is None:
        raise click.MissingParameter(param_hint="'-o' / '--output'", param_type="option")
    with _connect(target) as client, client.stream(timeout=timeout, **request) as events:
        result = _follow(events, output, request.get("n") or 1, preview)
    _tell(result, metadata, as_json)
    if made is not None:
        _warn_of(made.differences(result), f"this differs from {like}", strict)


def _detach(target: str, timeout: float | None, request: Request, output: Path | None) -> None:
    """Begin the job and leave it; its name goes to stdout, and how to come back to stderr."""
    name = request.get("request_id") or str(uuid.uuid4())
    detached = cast("Request", {**request, "request_id": name, "on_disconnect": OnDisconnect.DETACH})
    with _connect(target) as client, client.stream(timeout=timeout, **detached) as events:
        next(events)  # once it is told of anything, it is admitted
    click.echo(name)
    _say(f"t2i --target {target} attach {name} -o {output or 'FILE'}  # follows it, and saves what it brings")
    _say(f"t2i --target {target} cancel {name}  # ends it")


@main.command()
@click.argument("name")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The image file; of more than one, -o cat.jpg makes cat-0.jpg, cat-1.jpg ...",
)
@_metadata_option
@_timeout_option
@_json_option
@_target_option
def attach(target: str, name: str, output: Path, metadata: Path | None, timeout: float | None, as_json: bool) -> None:
    """Follow the detached job NAME from its beginning, and save its images once all are there.

    It goes on, and is kept, when this command ends early.
    """
    _format_for(output, None)
    _check_folders({"-o": output, "--metadata": metadata})
    _check_overwriting(metadata, None, {"-o": output})
    with _connect(target) as client, client.attach(name, timeout=timeout) as events:
        result = _follow(events, output, None)
    _tell(result, metadata, as_json)


@main.command()
@click.argument("name")
@click.option("--timeout", type=_Seconds(), default=5.0, show_default=True, help="Seconds.")
@_target_option
def cancel(target: str, name: str, timeout: float) -> None:
    """End the detached job NAME, or forget its images if it has ended."""
    with _connect(target) as client:
        client.cancel(name, timeout=timeout)


def _check_folders(files: Mapping[str, Path | None]) -> None:
    for option, file in files.items():
        if file is not None and not file.parent.is_dir():
            raise click.BadParameter(f"there is no folder {file.parent}", param_hint=option)


def _check_overwriting(metadata: Path | None, n: int | None, images: Mapping[str, Path | None]) -> None:
    """The metadata, which are written last, must not take the place of an image."""
    for option, path in images.items():
        if metadata is None or path is None:
            continue
        # Where n is not known, the job may have any number of images.
        of_one = (
            n != 1 and re.fullmatch(re.escape(path.stem) + r"-\d+", metadata.stem) and metadata.suffix == path.suffix
        )
        if metadata.resolve() == path.resolve() or (of_one and metadata.parent.resolve() == path.parent.resolve()):
            raise click.BadParameter(
                f"{metadata} is to be an image of {option}; give another name", param_hint="--metadata"
            )


def _tell(result: Result, metadata: Path | None, as_json: bool) -> None:
    """Tell the warnings, and the metadata where it was asked for."""
    for warning in result.warnings:
        _say(f"Warning: {warning}", "yellow")
    if metadata is not None:
        with _told_by_name(metadata):
            write_whole(metadata, (json.dumps(result.metadata, indent=2) + "\n").encode())
    if as_json:
        click.echo(json.dumps(result.metadata, indent=2))


def _warn_of(differences: Sequence[str], what: str, strict: bool) -> None:
    """Say each of the differences, as a warning or, if `strict`, by raising Differs."""
    told = "\n  ".join([what, *differences])
    if differences and strict:
        raise Differs(told)
    if differences:
        _say(f"Warning: {told}", "yellow")


def _format_for(output: Path | None, wanted: str | None, before: Format | str | None = None) -> Format | str | None:
    """The format to ask for, that of `before` if it may be, so that what comes back may bear the name `output`."""
    if output is None:
        return wanted or before
    by_name = Format.of(output)
    if by_name is None:
        endings = ", ".join(dict.fromkeys(suffix for each in Format for suffix in each.suffixes))
        raise click.BadParameter(f"{output.name} must end in one of {endings}", param_hint="-o")
    if wanted is not None and Format(wanted).suffixes != by_name.suffixes:
        raise click.BadParameter(
            f"a {wanted} cannot be named {output.name}; end it in {Format(wanted).suffixes[0]}, or leave out --format",
            param_hint="-o",
        )
    if wanted is None and isinstance(before, Format) and before.suffixes == by_name.suffixes:
        return before
    return Format(wanted or by_name)


def _follow(events: EventStream, output: Path, n: int | None, preview: Path | None = None) -> Result:
    """Show the events as they come, save the images, and return the whole.

    Each of `n` images is saved as soon as it is there. Where n is not known, neither are the names until all are there.
    """
    began, resubmitted = time.monotonic(), 0
    with display_for(Console(stderr=True), n) as display, _reported_by(display):
        for event in events:
            if events.resubmitted > resubmitted:
                resubmitted = events.resubmitted
                display.say("the server that had the request is gone; another one draws it")
            match event:
                case Done(result):
                    for index, image in enumerate(result.images if n is None else ()):
                        path = _numbered(output, index, len(result.images))
                        display.finish(index, _saved(image, path, result.waited + result.ran))
                    return result
                case ImageReady(index, image) if n is not None:
                    display.finish(index, _saved(image, _numbered(output, index, n), time.monotonic() - began))
                case Preview(index) if preview is not None and n is not None:
                    with _told_by_name(preview):
                        event.save(_numbered(preview, index, n))
                case Queued() | Progress():
                    display.show(event)
    raise AssertionError("a stream without Done raises ServerError")


@contextlib.contextmanager
def _reported_by(display: Display) -> Iterator[None]:
    """Have the client's log shown: a stream that waits for its server is else as silent as one that hangs."""

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


def _saved(image: Image, path: Path, seconds: float) -> str:
    """Save the image and return the line that tells so."""
    named = Format.of(path) is image.format  # else the server coded it smaller, and warns of it
    path = path if named else path.with_suffix(image.format.suffixes[0])
    with _told_by_name(path):
        path = write_whole(path, image.data, overwrite=named)
    calls = f"base {image.base_calls}" + (f" + refiner {image.refiner_calls}" if image.refiner_calls else "")
    told = [str(path), f"{image.width}x{image.height}", f"seed {image.seed}", f"{calls} steps", f"{seconds:.1f} s"]
    if image.finish_reason != "success":
        told.append(image.finish_reason)
    return "  ".join(told)


@contextlib.contextmanager
def _told_by_name(path: Path) -> Iterator[None]:
    """A file that cannot be written is an error in one sentence."""
    try:
        yield
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from error


@main.command()
@click.option("--timeout", type=_Seconds(), default=10.0, show_default=True, help="Seconds.")
@_target_option
def model(target: str, timeout: float) -> None:
    """Tell what is served, with its defaults and limits."""
    with _connect(target) as client:
        Console(soft_wrap=True, highlight=False).print(_table(client.model(timeout=timeout)))


def _table(model: ModelInfo) -> Table:
    defaults, limits, environment, screen = model.defaults, model.limits, model.environment, model.content_filter
    rows = {
        "model": model.name,
        "experts": "base and refiner" if model.has_refiner else "base",
        "device": f"{model.device}, {model.precision}",
        "fingerprint": model.fingerprint,
        "schedulers": ", ".join(model.schedulers),
        "defaults": f"{defaults.steps} steps, guidance scale {defaults.guidance_scale:g}, "
        f"high noise frac {defaults.high_noise_frac:g}, {defaults.scheduler}, {defaults.aspect_ratio}",
        "sizes": ", ".join(f"{ratio} {width}x{height}" for ratio, (width, height) in model.sizes.items()),
        "sides": f"{limits.min_side} to {limits.max_side} pixels in steps of {limits.side_multiple}, "
        f"{limits.max_pixels} pixels in all",
        "limits": f"{limits.max_images} images, {limits.max_steps} steps, {limits.max_prompt_characters} characters, "
        f"{limits.max_queue} requests at once, priority {limits.max_priority}",
        "content filter": f"{screen.name}, replaces images from {screen.threshold:g} on" if screen else "none",
        "detached": f"kept for {limits.retention:g} s after their end, as long as there is room",
        "hardware": environment.hardware + (f", {environment.threads} threads" if environment.threads else ""),
        "fp32 math": environment.fp32_math,
        "versions": ", ".join(f"{name} {version}" for name, version in environment.versions.items()),
        "environment": environment.fingerprint,
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(Text(name, "bold"), Text(value))
    return table


@main.command()
@click.option("--service", default="", help="A service's full name.  [default: the whole server]")
@click.option("--timeout", type=_Seconds(), default=5.0, show_default=True, help="Seconds.")
@_target_option
def health(target: str, service: str, timeout: float) -> None:
    """Probe the service: print its health.

    The exit code is 0 only when it is SERVING.
    """
    with _connect(target) as client:
        status = client.health(service, timeout=timeout)
    click.echo(status.value)
    if status is not ServingStatus.SERVING:
        click.get_current_context().exit(EXIT_CODES[Unavailable])


@main.command()
@click.option("-g", "--gpu", is_flag=True, help="Use the GPU.")
@click.option(
    "-t", "--tag", help=f"Run the container image {IMAGE}:TAG (or TAG itself, if it has a name before its tag)."
)
@click.option("-i", "--input", "text", required=True, metavar="JSON", help='{"prompt": "..."}, or the full task input.')
@click.option(
    "--start-timeout",
    type=_Seconds(),
    default=900.0,
    show_default=True,
    help="Seconds that the service may take to load its model.",
)
def run(gpu: bool, tag: str | None, text: str, start_timeout: float) -> None:
    """Start a service for one request, as `instill run` does.

    Draws one Instill AI task input, prints the output in Instill's shape and stops the service again. The service is
    the one installed in this environment, or a container image; its log is shown when it fails.
    """
    prompt, options = parse_input(text)
    options["format"] = Format.JPEG_RGB  # which Instill's own answers are
    build_request(prompt, options)  # what no message can carry is said now, not after the model is loaded
    for number in (signal.SIGTERM, signal.SIGHUP):  # a service is never left behind, not by a closed terminal either
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="t2i-") as directory:
        _instill("Starting model image...")
        launch = container_launch(tag, gpu) if tag else local_launch(Path(directory), gpu)
        if launch.means:
            _say(launch.means)
        with running(launch, Path(directory)) as service:
            _instill("Deploying model...")
            target = service.wait_until_serving(start_timeout)
            _instill("Running inference...")
            with _log_of(service), TextToImage(target) as client:
                result = client.generate(prompt, **options)
            _instill("Outputs:")
            click.echo(json.dumps([result.to_instill()], indent=2))
        _instill("Done")


def _instill(line: str) -> None:
    # As python-sdk's logger has it ("%(asctime)s.%(msecs)03d %(levelname)-8s %(message)s"): milliseconds stand twice.
    now = datetime.datetime.now()
    milliseconds = f"{now.microsecond // 1000:03d}"
    click.echo(f"{now:%Y-%m-%d %H:%M:%S},{milliseconds}.{milliseconds} {'INFO':<8} [Instill] {line}")


@contextlib.contextmanager
def _log_of(service: Service) -> Iterator[None]:
    try:
        yield
    except (ServerError, Unavailable):
        click.echo(service.log(), err=True, nl=False)
        raise


def _explain(error: Exception) -> str:
    if isinstance(error, InvalidRequest) and len(error.violations) > 1:
        return "\n  ".join(["the request has more than one fault", *map(str, error.violations)])
    if isinstance(error, Refused) and error.retry_after is not None and "try again in" not in str(error):
        return f"{error} (try again in {error.retry_after:g} s)"
    return str(error)


def _say(text: str, style: str = "") -> None:
    Console(stderr=True).print(Text(text, style), soft_wrap=True)
