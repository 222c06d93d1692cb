"""Real server processes for the tests of the service and of its client."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
PATIENCE = 180  # seconds to wait for anything that must happen; reached only when something is broken


class ServerProcess:
    """`python -m server` on a free port of this machine, its log line by line."""

    def __init__(self, *flags: str, **environment: str) -> None:
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._closed = False
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server", "--listen", "127.0.0.1:0", *flags],
            cwd=ROOT,
            env=os.environ | environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def wait_for_log(self, pattern: str) -> re.Match[str]:
        """Wait until the log holds the pattern."""
        with self._changed:
            self._changed.wait_for(lambda: re.search(pattern, self.log) or self._closed, PATIENCE)
            found = re.search(pattern, self.log)
            assert found, f"{pattern!r} never came in:\n{self.log}"
            return found

    @property
    def target(self) -> str:
        """HOST:PORT, as soon as the port is open."""
        return self.wait_for_log(r"listening on (\S+);")[1]

    def wait_until_ready(self) -> "ServerProcess":
        self.wait_for_log(r"lifecycle: serving ")
        return self

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Wait for the end of the process; its exit code."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def stop(self) -> int:
        if self.process.poll() is None:
            self.terminate()
        return self.wait()


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """One server with default flags on the embedded ensemble, ready, shared by all tests that leave it as it was."""
    server = ServerProcess().wait_until_ready()
    yield server
    assert server.stop() == 0, server.log


@pytest.fixture(scope="session")
def server_target(server: ServerProcess) -> str:
    return server.target


@pytest.fixture
def start_server() -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers that a test has for itself, and ends them with it."""
    servers: list[ServerProcess] = []

    def start(*flags: str, **environment: str) -> ServerProcess:
        servers.append(ServerProcess(*flags, **environment))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
        server.wait()
