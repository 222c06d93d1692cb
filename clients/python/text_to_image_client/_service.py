"""A service of one's own for the length of one command: started, awaited until it says SERVING, stopped.

It runs as a child process: the server package of this environment, or its container image under docker or podman.
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

from ._client import TextToImage
from ._exceptions import TextToImageError
from ._types import ServingStatus

IMAGE = "text-to-image-service"
"""The container image that a bare tag belongs to."""
_PORT = 50051
_STOP_SECONDS = 45.0  # more than the service's own grace


class ServiceFailed(Exception):
    """The service could not be started. `log` is what it wrote."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Launch:
    """How to start a service: its command line, what tells its address once it has one, and what was chosen for it.

    `means` names what was chosen, and is empty where there was no choice.
    """

    command: tuple[str, ...]
    address: Callable[[], str | None]
    means: str = ""


def local_launch(directory: Path, gpu: bool) -> Launch:
    """The server package of this environment, on a port of its own choice.

    Raises ServiceFailed if there is no such package.
    """
    if importlib.util.find_spec("server") is None:
        raise ServiceFailed(
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
    return Launch((*command, *device), address)


def container_launch(tag: str, gpu: bool) -> Launch:
    """The container image `tag`: a full reference, or the tag alone of text-to-image-service.

    Raises ServiceFailed if neither docker nor podman works here, or the one that does has no such image.
    """
    tool = container_tool()
    called = Path(tool).name
    image = tag if ":" in tag or "/" in tag else f"{IMAGE}:{tag}"
    if not _succeeds(tool, "image", "inspect", image):  # which `run` would go and look for in a public registry
        raise ServiceFailed(
            f"{called} has no image {image}; build it with `make image` in the service's repository, "
            f"or get it with `{called} pull`"
        )
    name = f"t2i-{uuid.uuid4().hex[:12]}"

    def address() -> str | None:
        published = subprocess.run([tool, "port", name, str(_PORT)], capture_output=True, text=True, check=False)
        return published.stdout.split("\n")[0] or None

    return Launch(container_command(tool, name, image, gpu), address, f"{image} under {called}")


def container_tool() -> str:
    """The path of docker, or else of podman, if it works. Raises ServiceFailed if neither does."""
    there = [path for path in map(shutil.which, ("docker", "podman")) if path is not None]
    for path in there:
        if _succeeds(path, "info"):  # docker's client may be there without its engine
            return path
    if not there:
        raise ServiceFailed("-t TAG needs docker or podman, and neither is on the PATH")
    asked = " and ".join(f"`{Path(path).name} info`" for path in there)
    why = "says why it does" if len(there) == 1 else "say why they do"
    raise ServiceFailed(f"-t TAG needs docker or podman; {asked} {why} not work here")


def _succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def container_command(tool: str, name: str, image: str, gpu: bool) -> tuple[str, ...]:
    """`run` in the foreground, so that its life is the container's, on a free loopback port."""
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
class Service:
    """A started service and the file that its log goes to."""

    process: "subprocess.Popen[bytes]"
    address: Callable[[], str | None]
    log_file: Path

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def wait_until_serving(self, seconds: float) -> str:
        """The service's address, as soon as its health says SERVING.

        Raises ServiceFailed when the process ends first, at once, or when `seconds` have passed.
        """
        deadline = time.monotonic() + seconds
        address, last = None, "it has no address yet"
        while time.monotonic() < deadline:
            address = address or self.address()
            if address is not None and (last := _why_not_serving(address)) == "":
                return address
            try:
                status = self.process.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue
            raise self._ended(status)
        raise ServiceFailed(f"the service was not ready within {seconds:g} s: {last}", self.log())

    def _ended(self, status: int) -> ServiceFailed:
        log = self.log()
        last = (log.strip() or "it wrote no log").splitlines()[-1]
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return ServiceFailed(f"the service {how}: {last}", log)


@contextmanager
def running(launch: Launch, directory: Path) -> Iterator[Service]:
    """Start a service; on the way out, however it comes, stop it by SIGTERM and wait for its end."""
    log_file = directory / "log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            launch.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that Ctrl-C reaches this process alone, which then stops the service
        )
    try:
        yield Service(process, launch.address, log_file)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _why_not_serving(address: str) -> str:
    """Why the service is not ready, "" if it is."""
    try:
        # A fresh channel each time: an old one would wait longer and longer between its attempts to connect.
        with TextToImage(address, timeout=2, retries=0) as client:
            status = client.health()
    except TextToImageError as error:
        return str(error)
    return "" if status is ServingStatus.SERVING else f"its health is {status}"
