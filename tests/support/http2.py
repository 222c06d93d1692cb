"""HTTP/2 by hand (RFC 9113), for frames that no client library sends."""

import contextlib
import socket
from collections.abc import Iterator

from serving import PATIENCE

DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
END_STREAM, ACK, END_HEADERS = 1, 1, 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
REFUSED_STREAM, ENHANCE_YOUR_CALM = 7, 11


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


HELLO = PREFACE + frame(SETTINGS) + frame(SETTINGS, ACK)


def opening(stream: int, path: str) -> bytes:
    """Return the HTTP/2 frame of a call's headers, without its message."""
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
    fields["content-type"] = "application/grpc"
    block = b"".join(b"\0" + b"".join(bytes([len(each)]) + each.encode() for each in field) for field in fields.items())
    return frame(HEADERS, END_HEADERS, stream, block)


@contextlib.contextmanager
def connected(target: str, data: bytes = b"") -> Iterator[socket.socket]:
    """Open a socket and send `data`, as far as the peer reads."""
    host, _, port = target.rpartition(":")
    with socket.create_connection((host, int(port)), PATIENCE) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        yield connection


def frames(connection: socket.socket) -> Iterator[tuple[int, int, bytes]]:
    """Yield kind, stream and payload of all frames until the peer closes."""
    with contextlib.suppress(ConnectionError), connection.makefile("rb") as incoming:
        while len(head := incoming.read(9)) == 9:
            yield head[3], int.from_bytes(head[5:], "big"), incoming.read(int.from_bytes(head[:3], "big"))


def read_all(connection: socket.socket) -> bytes:
    """Read all bytes until the peer closes."""
    with contextlib.suppress(ConnectionError), connection.makefile("rb") as incoming:
        return incoming.read()
    return b""


def goaway(connection: socket.socket) -> tuple[int, bytes]:
    """Return code and reason of the first GOAWAY."""
    first = next(payload for kind, _, payload in frames(connection) if kind == GOAWAY)
    return int.from_bytes(first[4:8], "big"), first[8:]


def first_byte(connection: socket.socket) -> bytes:
    """Read one byte, none if the peer has closed."""
    try:
        return connection.recv(1)
    except ConnectionError:
        return b""
