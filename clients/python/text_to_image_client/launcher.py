"""Run a server for the length of one command: start it, wait until its health is SERVING, stop it.

The server is a child process: the `server` package of this environment, or its container image under docker or podman.
"""

import importlib.util
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ._exceptions import TextToImageError
from ._sync import TextToImage
from ._types import ServingStatus

__all__ = [
    "IMAGE",
    "ChildServer",
    "ServerCommand",
    "ServerStartError",
    "container_server",
    "local_server",
    "run_server",
]

IMAGE = "text-to-image-service"
"""The name of the container image for a tag alone."""
_PORT = 50051
_STOP_SECONDS = 45.0  # more than the server's own grace period


class ServerStartError(Exception):
    """The server could not be started. `log` is its output."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class ServerCommand:
    """The command line of a server, and a function that returns its address, None as long as it has none.

    `description` names the image and the tool of a container; it is empty for the local package.
    """

    command: tuple[str, ...]
    address: Callable[[], str | None]
    description: str = ""


def local_server(directory: Path, gpu: bool) -> ServerCommand:
    """Return the command of this environment's `server` package, which takes a free port and reports it in `directory`.

    Raises ServerStartError if there is no such package.
    """
    if importlib.util.find_spec("server") is None:
        raise ServerStartError(
            f"the service is not installed in this environment ({sys.prefix}); "
            "install text-to-image-service, or run its container image with -t TAG"
        )
    ready = directory / "ready"
    device = ("--device", "cuda") if gpu else ()

    def address() -> str | None:
        try:
            return ready.read_text().strip() or None
        except FileNotFoundError:
            return None

    command = (sys.executable, "-m", "server", "--listen", "127.0.0.1:0", "--ready-file", str(ready))
    return ServerCommand((*command, *device), address)


def container_server(tag: str, gpu: bool) -> ServerCommand:
    """Return the command that runs the container image `tag`: a full reference, or a tag of text-to-image-service.

    Raises ServerStartError if neither docker nor podman works, or the one that works has no such image.
    """
    tool = container_tool()
    tool_name = Path(tool).name
    image = tag if ":" in tag or "/" in tag else f"{IMAGE}:{tag}"
    if not _succeeds(tool, "image", "inspect", image):  # `run` would look for it in a public registry
        raise ServerStartError(
            f"{tool_name} has no image {image}; build it with `make image` in the service's repository, "
            f"or get it with `{tool_name} pull`"
        )
    name = f"t2i-{uuid.uuid4().hex[:12]}"

    def address() -> str | None:
        published = subprocess.run([tool, "port", name, str(_PORT)], capture_output=True, text=True, check=False)
        return published.stdout.split("\n")[0] or None

    return ServerCommand(container_command(tool, name, image, gpu), address, f"{image} under {tool_name}")


def container_tool() -> str:
    """Return the path of docker, or of podman if docker does not work. Raises ServerStartError if neither works."""
    found = [path for path in map(shutil.which, ("docker", "podman")) if path is not None]
    for path in found:
        if _succeeds(path, "info"):  # docker's client may be installed without a running engine
            return path
    if not found:
        raise ServerStartError("-t TAG needs docker or podman, and neither is on the PATH")
    failing = " and ".join(f"`{Path(path).name} info`" for path in found)
    verb = "fails" if len(found) == 1 else "fail"
    raise ServerStartError(f"-t TAG needs docker or podman; {failing} {verb}")


def _succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def container_command(tool: str, name: str, image: str, gpu: bool) -> tuple[str, ...]:
    """Return the `run` command: in the foreground, so that it ends with the container, on a free loopback port."""
    devices: tuple[str, ...] = ()
    if gpu:
        # podman takes GPUs by the Container Device Interface.
        devices = ("--device", "nvidia.com/gpu=all") if Path(tool).name == "podman" else ("--gpus", "all")
    return (
        *(tool, "run", "--rm", "--name", name, "--publish", f"127.0.0.1::{_PORT}"),
        *devices,
        *("--env", f"T2I_LISTEN=0.0.0.0:{_PORT}"),
        *(("--env", "T2I_DEVICE=cuda") if gpu else ()),
        image,
    )


@dataclass(frozen=True)
class ChildServer:
    """A started server process and its log file."""

    process: "subprocess.Popen[bytes]"
    address: Callable[[], str | None]
    log_file: Path

    def log(self) -> str:
        """Return the output of the server so far."""
        return self.log_file.read_text(errors="replace")

    def wait_until_serving(self, seconds: float) -> str:
        """Wait until the health is SERVING and return the server's address.

        Raises ServerStartError as soon as the process ends, or after `seconds`.
        """
        deadline = time.monotonic() + seconds
        address, reason = None, "it has no address yet"
        while time.monotonic() < deadline:
            address = address or self.address()
            if address is not None and (reason := _why_not_serving(address)) == "":
                return address
            try:
                status = self.process.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue
            raise self._ended(status)
        raise ServerStartError(f"the service was not ready within {seconds:g} s: {reason}", self.log())

    def _ended(self, status: int) -> ServerStartError:
        log = self.log()
        last_line = (log.strip() or "its log is empty").splitlines()[-1]
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return ServerStartError(f"the service {how}: {last_line}", log)


@contextmanager
def run_server(command: ServerCommand, directory: Path) -> Iterator[ChildServer]:
    """Start a server with its log in `directory`. On leaving, stop it by SIGTERM and wait for its end."""
    log_file = directory / "log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the server
        )
    try:
        yield ChildServer(process, command.address, log_file)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _why_not_serving(address: str) -> str:
    """Return the reason why the service is not ready, "" if it is."""
    try:
        # A new channel for each attempt: an old one backs off longer and longer before it reconnects.
        with TextToImage(address, timeout=2, retries=0) as client:
            status = client.health()
    except TextToImageError as error:
        return str(error)
    return "" if status is ServingStatus.SERVING else f"its health is {status}"
