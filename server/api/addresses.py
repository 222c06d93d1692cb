"""Where a server listens: HOST:PORT or unix:PATH, or several with commas between, each bound in full or not at all.

gRPC by itself binds what it can of a name and says nothing of the rest, which may be another server's, and it removes
the socket file of a server that still runs. Here every address of a name is bound by itself.
"""

import contextlib
import errno
import ipaddress
import re
import socket
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from server.errors import BindError

_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)  # of a family that this machine lacks
WILDCARDS = ("0.0.0.0", "::")
_PATH_BYTES = 107  # of a socket's file, by the kernel
_TRIES = 20  # at a free port that all addresses of a name have


def checked(value: str) -> str:
    """The addresses of a flag, as they are. Raises ValueError."""
    for each in value.split(","):
        if each.startswith("unix:"):
            if not 0 < len(socket_path(each).encode()) <= _PATH_BYTES:
                raise ValueError(f"give unix:PATH with a path of at most {_PATH_BYTES} bytes")
        else:
            checked_port(each)
    return value


def checked_port(value: str) -> str:
    """One HOST:PORT, as it is. Raises ValueError."""
    matched = re.fullmatch(r"(?:\[[0-9a-fA-F:.]+\]|[^\s,:\[\]]+):([0-9]{1,5})", value)
    if matched is None or int(matched[1]) > 65535:
        raise ValueError("give HOST:PORT, for example 127.0.0.1:50051 or [::1]:50051, with a port of 0 to 65535")
    return value


def are_local(value: str) -> bool:
    """Whether only this machine can reach all of these addresses."""
    return all(each.startswith("unix:") or is_loopback(host_and_port(each)[0]) for each in value.split(","))


def is_loopback(host: str) -> bool:
    """Whether a host, by name or number, is this machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def socket_path(address: str) -> str:
    """The path in unix:PATH or unix:///PATH."""
    path = address.removeprefix("unix:")
    return "/" + path.lstrip("/") if path.startswith("//") else path


def bind(addresses: str, add: Callable[[str], int]) -> str:
    """Bind all of these addresses, by calls of `add` with literal ones; what they are with the ports that they got.

    `add` returns the port, or 0 or raises RuntimeError where it could not bind. Raises BindError, and leaves no
    socket's file then.
    """
    bound: list[str] = []
    try:
        for each in addresses.split(","):
            bound.append(_bind_file(each, add) if each.startswith("unix:") else _bind_name(each, add))
    except BindError:
        remove_files(",".join(bound))
        raise
    return ",".join(bound)


def remove_files(bound: str) -> None:
    """Remove the sockets' files of addresses that `bind` returned, for a server that never started.

    gRPC removes those of a server that stops.
    """
    for each in bound.split(","):
        if each.startswith("unix:"):
            with contextlib.suppress(OSError):
                Path(socket_path(each)).unlink()


def literal_addresses(address: str) -> list[tuple[str, int]]:
    """The hosts, as numbers, and the port by which all addresses of a name are bound.

    Those of a family that this machine lacks are left out. A wildcard is one for both families. Port 0 stays 0 only
    where one address takes it. Raises BindError when any of them is in use, or there is none.
    """
    host, port = host_and_port(address)
    if host in WILDCARDS:
        if port and (reason := _first_reason([each for each in WILDCARDS if not _is_absent(each)], port)):
            raise BindError(f"cannot listen on {address}: {reason}")
        return [(host, port)]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no name of a host"
        raise BindError(f"cannot listen on {address}: {reason}") from error
    hosts = [each for each in dict.fromkeys(str(where[0]) for *_, where in found) if not _is_absent(each)]
    if not hosts:
        raise BindError(f"cannot listen on {address}: no address of this machine")
    if port == 0 and len(hosts) > 1:
        port = _free_port(hosts)
    if reason := _first_reason(hosts, port):
        raise BindError(f"cannot listen on {address}: {reason}")
    return [(each, port) for each in hosts]


def joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bind_name(address: str, add: Callable[[str], int]) -> str:
    for host, port in literal_addresses(address):
        try:
            bound = add(joined(host, port))
        except RuntimeError:  # older versions of gRPC return port 0 instead
            bound = 0
        if bound == 0:
            raise BindError(f"cannot listen on {address}: {joined(host, port)} is in use")
    return f"{address.rpartition(':')[0]}:{bound}"


def _bind_file(address: str, add: Callable[[str], int]) -> str:
    path = Path(socket_path(address))
    try:
        _remove_stale(path)
        add(f"unix:{path}")
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else _why_no_file(path)
        raise BindError(f"cannot listen on {address}: {reason}") from error
    return f"unix:{path}"


def _remove_stale(path: Path) -> None:
    """Remove the file of a socket that nobody listens on any more, as a killed server leaves it. Raises OSError."""
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise OSError(errno.EEXIST, "the file is there and is no socket")
    with socket.socket(socket.AF_UNIX) as asked:
        try:
            asked.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:  # it listens, and its queue is full
            pass
    raise OSError(errno.EADDRINUSE, "in use")


def _why_no_file(path: Path) -> str:
    """What keeps a socket from being bound to this path; gRPC raises its error without the reason."""
    try:
        with socket.socket(socket.AF_UNIX) as tried:
            tried.bind(str(path))
    except OSError as error:
        return error.strerror or str(error)
    with contextlib.suppress(OSError):
        path.unlink()
    return "gRPC could not bind it"


def _first_reason(hosts: Sequence[str], port: int) -> str | None:
    """Why the first of the hosts that cannot be bound to this port cannot."""
    for host in hosts:
        if (error := _try(host, port)) is not None:
            return f"{joined(host, port)} is in use" if error.errno == errno.EADDRINUSE else error.strerror
    return None


def _is_absent(host: str) -> bool:
    error = _try(host, 0)
    return error is not None and error.errno in _ABSENT


def _try(host: str, port: int) -> OSError | None:
    """What keeps a socket from being bound there. Two listening sockets conflict; one that lingers does not."""
    try:
        with _socket(host, port):
            return None
    except OSError as error:
        return error


def _socket(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, where = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
    )[0]
    tried = socket.socket(family, kind, protocol)
    try:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            tried.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        tried.bind(where)
    except OSError:
        tried.close()
        raise
    return tried


def _free_port(hosts: Sequence[str]) -> int:
    """A port that all of the hosts have free, or that the first one has."""
    for _ in range(_TRIES):
        with _socket(hosts[0], 0) as first:
            port: int = first.getsockname()[1]
            if _first_reason(hosts[1:], port) is None:
                break
    return port
