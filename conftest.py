"""Fixtures for the tests of the service and of its client: real server processes on the embedded ensemble."""

import contextlib
import os
import platform
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import no_torch
import pytest
from serving import ServerProcess

from server.acceleration.kernels import (
    cpu_library,  # before any test imports torch, which then runs as it does in the service
)

# No proxy stands before the servers of the tests, which are all on this machine.
for _name in ("no_proxy", "NO_PROXY"):
    os.environ[_name] = ",".join(filter(None, (os.environ.get(_name), "localhost,127.0.0.1,::1")))

# A shell starts background jobs with SIGINT ignored, and nohup its command with SIGHUP ignored. Processes that the
# tests start would inherit both.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-torch", action="store_true", help="run only the tests that import no torch")


def pytest_configure(config: pytest.Config) -> None:
    """Build the C++ kernels once for all servers of the run, as an image has them. Where that fails, tests say so."""
    if config.getoption("--no-torch"):
        no_torch.enable()
    elif not hasattr(config, "workerinput") and platform.machine() == "x86_64":  # that of xdist's workers is theirs
        with contextlib.suppress(cpu_library.BuildError):
            cpu_library.prebuild()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if no_torch.must_ignore(collection_path) else None


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run with --no-torch that has imported torch all the same."""
    if no_torch.is_enabled() and (imported := no_torch.imported()):
        raise pytest.UsageError(f"--no-torch, but {', '.join(imported)} was imported")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print one line with the number of skipped tests by reason."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(each.longrepr[2]).removeprefix("Skipped: ") for each in reports)
    if reasons:
        counts = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"NOT RUN: {sum(reasons.values())} tests: {counts}".replace("\n", " "))


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
    """Start servers for one test, and stop them at its end."""
    servers: list[ServerProcess] = []

    def start(*flags: str, **environment: str) -> ServerProcess:
        servers.append(ServerProcess(*flags, **environment))
        return servers[-1]

    yield start
    for server in servers:
        try:
            server.stop()
        finally:
            server.process.kill()
