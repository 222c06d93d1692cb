"""The group `t2i`: its options, which hold for every command, and the exit codes of the errors."""

import errno
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.text import Text

from .._channel import TLS
from .._exceptions import (
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    FieldViolation,
    InvalidRequest,
    MessageTooLarge,
    NotFound,
    ResourceExhausted,
    TextToImageError,
    Unauthenticated,
    Unavailable,
)
from .._messages import option_of
from .._sync import TextToImage
from ..launcher import ServerStartError

_Command = TypeVar("_Command", bound=Callable[..., Any])


class NotReproduced(Exception):
    """`generate --like --strict` drew something that differs from the saved metadata."""


EXIT_CODES: dict[type[Exception], int] = {
    InvalidRequest: 3,
    Unavailable: 4,
    ResourceExhausted: 5,
    DeadlineExceeded: 6,
    ServerStartError: 7,
    NotReproduced: 8,
    NotFound: 9,
    AlreadyExists: 10,
    Unauthenticated: 11,
    MessageTooLarge: 12,
    Cancelled: 130,
}
"""The exit codes of errors. Any other error exits with 1, and click exits with 2 for a wrong command line."""

_EXIT_CODES_HELP = """\b
Exit codes:
  0    success; of `health`: SERVING
  1    unexpected error of the server, or a file could not be written
  2    wrong command line
  3    invalid request; every bad field is named
  4    server not reachable, loading or draining; of `health`: not SERVING
  5    rejected, the queue is full
  6    the timeout passed, or is too short for the request
  7    of `run`: the server did not start
  8    of `generate --like --strict`: the result differs
  9    the server knows no detached job of this name, or no longer keeps it
  10   another detached job has this name
  11   the service needs a token, or does not know this one
  12   a message or its metadata exceed a limit of gRPC
  130  cancelled
"""


class _CommandGroup(click.Group):
    """Print one line instead of a traceback, and exit with the code of the error."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (TextToImageError, ServerStartError, NotReproduced) as error:
            if isinstance(error, ServerStartError):
                click.echo(error.log, err=True, nl=False)
            command = self.commands.get(ctx.invoked_subcommand or "")
            say(f"Error: {_explain(error, _flags(command))}", "red")
            ctx.exit(EXIT_CODES.get(type(error), 1))
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # click exits silently when the reader of stdout is gone
            name = f"{error.filename}: " if error.filename else ""
            say(f"Error: {name}{error.strerror or error}", "red")
            ctx.exit(1)
        except KeyboardInterrupt:
            say("Cancelled.")
            ctx.exit(EXIT_CODES[Cancelled])


def _flags(command: click.Command | None) -> dict[str, str]:
    """Return the flags of a command, and "PROMPT", by the names of the options of a request that they set."""
    flags = {}
    for parameter in command.params if command else ():
        for spelling in parameter.opts:
            flags[spelling.removeprefix("--").replace("-", "_")] = parameter.opts[0]
    return flags | ({"prompt": "PROMPT"} if "prompt" in flags else {})


def _explain(error: Exception, flags: Mapping[str, str]) -> str:
    """Return the message of an error, with the flags of the command that can avoid it."""
    if isinstance(error, InvalidRequest) and len(error.violations) > 1:
        violations = (_with_flag(each, flags) for each in error.violations)
        return "\n  ".join(["the request has more than one bad field", *violations])
    if isinstance(error, InvalidRequest):
        text = str(error)
        for each in error.violations:
            text = text.replace(str(each), _with_flag(each, flags), 1)
        return text
    if isinstance(error, DeadlineExceeded) and "steps" in flags:
        return f"{error}; give --timeout more seconds, or fewer --steps"
    if isinstance(error, ResourceExhausted) and error.retry_after is not None and "try again in" not in str(error):
        return f"{error} (try again in {error.retry_after:g} s)"
    return str(error)


def _with_flag(violation: FieldViolation, flags: Mapping[str, str]) -> str:
    flag = flags.get(option_of(violation.field) or "")
    return f"{flag} ({violation.field}): {violation.description}" if flag else str(violation)


class Seconds(click.FloatRange):
    """A number of seconds above 0. NaN is rejected, which click.FloatRange accepts."""

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value!r} is not a valid number of seconds.", param, ctx)
        return seconds


def target_option(command: _Command) -> _Command:
    """Add --target to a command. Its default is --target of the group."""
    return click.option(
        "--target",
        metavar="TARGET",
        default=lambda: click.get_current_context().find_root().params["target"],
        show_default="that of t2i",
        help="The service to call.",
    )(command)


def _pem_option(name: str, variable: str, text: str) -> Callable[[_Command], _Command]:
    path = click.Path(exists=True, dir_okay=False, path_type=Path)
    return click.option(name, type=path, envvar=variable, show_envvar=True, help=text)


@click.group(cls=_CommandGroup, epilog=_EXIT_CODES_HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--target",
    metavar="TARGET",
    envvar="T2I_TARGET",
    show_envvar=True,
    default="127.0.0.1:50051",
    show_default=True,
    help="The service to call: HOST:PORT, HOST for port 50051, or unix:/PATH. Also accepted after the command.",
)
@click.option("--tls", is_flag=True, envvar="T2I_TLS", show_envvar=True, help="Use TLS; implied by the next three.")
@_pem_option("--tls-ca", "T2I_TLS_CA", "PEM file of the certificates to trust.  [default: gRPC's own]")
@_pem_option("--tls-client-certificate", "T2I_TLS_CLIENT_CERTIFICATE", "PEM file of the client certificate.")
@_pem_option("--tls-client-key", "T2I_TLS_CLIENT_KEY", "PEM file of its key.")
@click.option(
    "--token",
    envvar="T2I_TOKEN",
    show_envvar=True,
    help="The bearer token. Prefer the variable: other users of this machine see command lines.",
)
@click.version_option(package_name="text-to-image-client")
def main(
    target: str, token: str | None, tls_client_certificate: Path | None, tls_client_key: Path | None, **_: Any
) -> None:
    """Draw images from text over gRPC."""
    if (tls_client_certificate is None) != (tls_client_key is None):
        raise click.UsageError("--tls-client-certificate and --tls-client-key go together")


def connect(target: str) -> TextToImage:
    """Return a client of `target` with the TLS files and the token of the group's options."""
    given = click.get_current_context().find_root().params
    files = given["tls_ca"], given["tls_client_certificate"], given["tls_client_key"]
    tls = TLS(*files) if given["tls"] or any(files) else None
    try:
        return TextToImage(target, tls=tls, token=given["token"])
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def say(text: str, style: str = "") -> None:
    """Print `text` to stderr."""
    Console(stderr=True).print(Text(text, style), soft_wrap=True)
