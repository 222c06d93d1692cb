"""Connections: gRPC's options of server/api/connections.py on a real server, with short times."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2_grpc
from http2 import (
    ACK,
    HELLO,
    PING,
    PREFACE,
    connected,
    first_byte,
    frame,
    frames,
    goaway,
    opening,
    read_all,
)

from server.api import connections
from server.settings import Settings


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    servers: list[grpc.Server] = []

    def start(**flags: float) -> str:
        options = [("grpc.so_reuseport", 0), *connections.connection_options(Settings(**flags))]
        servers.append(grpc.server(ThreadPoolExecutor(4), options=options))
        health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), servers[-1])
        port = servers[-1].add_insecure_port("127.0.0.1:0")
        servers[-1].start()
        return f"127.0.0.1:{port}"

    yield start
    for each in servers:
        each.stop(None).wait()


@pytest.mark.parametrize(
    "said",
    [b"", PREFACE, HELLO, HELLO + opening(1, "/grpc.health.v1.Health/Watch")],
    ids=["nothing", "half a greeting", "a greeting", "half a call"],
)
def test_a_silent_peer_is_disconnected(serve, said):
    with connected(serve(keepalive_seconds=1), said) as connection:
        read_all(connection)  # ends only when the other side closes


def test_a_peer_that_answers_pings_stays_connected(serve):
    with connected(serve(keepalive_seconds=1), HELLO) as connection:
        pings = 0
        for kind, _, payload in frames(connection):
            if kind == PING:
                connection.sendall(frame(PING, ACK, 0, payload))
                if (pings := pings + 1) == 3:  # the second would never come to one that was let go
                    break
        assert pings == 3


def test_a_connection_beyond_its_age_is_asked_to_reconnect(serve):
    with connected(serve(max_connection_age_seconds=1), HELLO) as connection:
        assert goaway(connection) == (0, b"max_age")


def test_connections_beyond_the_limit_are_rejected(serve):
    target = serve(max_connections=3)
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(connected(target, HELLO)) for _ in range(10)]
        said = Counter(bool(first_byte(each)) for each in peers)
    assert said == {True: 3, False: 7}
