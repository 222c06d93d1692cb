"""Fixtures for the tests of the service and of its client: real server processes on the embedded ensemble."""

import signal
from collections.abc import Callable, Iterator

import pytest
from serving import ServerProcess

import server as _  # noqa: F401  # before any test imports torch, which then runs as it does in the service

# What a shell runs in the background begins with SIGINT ignored, and hands that on to every process that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


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
        try:
            server.stop()
        finally:
            server.process.kill()
