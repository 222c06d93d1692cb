"""The addresses of a server: HOST:PORT or unix:PATH, or several separated by commas, each bound in full or not at all.

gRPC binds some of a name's addresses and does not report the others, which another server may have. It also removes the
socket file of a server that still runs. Here each address of a name is bound by itself.
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

_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)  # this machine lacks the address family
WILDCARDS = ("0.0.0.0", "::")
_PATH_BYTES = 107  # the kernel's limit for a socket file
_PORT_ATTEMPTS = 20  # to find a port that is free at all addresses of a name


def checked(value: str) -> str:
    """Return the addresses of a flag unchanged. Raises ValueError."""
    for each in value.split(","):
        if each.startswith("unix:"):
            if not 0 < len(socket_path(each).encode()) <= _PATH_BYTES:
                raise ValueError(f"give unix:PATH with a path of at most {_PATH_BYTES} bytes")
        else:
            checked_port(each)
    return value


def checked_port(value: str) -> str:
    """Return one HOST:PORT unchanged. Raises ValueError."""
    matched = re.fullmatch(r"(?:\[[0-9a-fA-F:.]+\]|[^\s,:\[\]]+):([0-9]{1,5})", value)
    if matched is None or int(matched[1]) > 65535:
        raise ValueError("give HOST:PORT, for example 127.0.0.1:50051 or [::1]:50051, with a port of 0 to 65535")
    return value


def are_local(value: str) -> bool:
    """Return whether only this machine can reach the addresses."""
    return all(each.startswith("unix:") or is_loopback(host_and_port(each)[0]) for each in value.split(","))


def is_loopback(host: str) -> bool:
    """Return whether a host, by name or number, is this machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_and_port(address: str) -> tuple[str, int]:
    """Split HOST:PORT; an IPv6 host loses its brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def socket_path(address: str) -> str:
    """Return the path in unix:PATH or unix:///PATH."""
    path = address.removeprefix("unix:")
    return "/" + path.lstrip("/") if path.startswith("//") else path


def bind(addresses: str, add: Callable[[str], int]) -> str:
    """Bind all addresses by calling `add` with literal ones. Return the addresses with their actual ports.

    `add` returns the port, or fails by returning 0 or raising RuntimeError. Raises BindError, and then leaves no socket
    file.
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
    """Remove the socket files of addresses that `bind` returned, for a server that never started.

    gRPC removes the files of a server that stops.
    """
    for each in bound.split(","):
        if each.startswith("unix:"):
            with contextlib.suppress(OSError):
                Path(socket_path(each)).unlink()


def literal_addresses(address: str) -> list[tuple[str, int]]:
    """Return the numeric host and the port of each address of a name, without address families that are absent here.

    A wildcard is one address for both families. Port 0 stays 0 only if there is one address. Raises BindError if one of
    them is in use, or if there is none.
    """
    host, port = host_and_port(address)
    if host in WILDCARDS:
        if port:
            _check_free(address, [each for each in WILDCARDS if not _is_absent(each)], port)
        return [(host, port)]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no name of a host"
        raise BindError(f"cannot listen on {address}: {reason}") from error
    hosts = [each for each in dict.fromkeys(str(endpoint[0]) for *_, endpoint in found) if not _is_absent(each)]
    if not hosts:
        raise BindError(f"cannot listen on {address}: no address of this machine")
    if port == 0 and len(hosts) > 1:
        port = _free_port(hosts)
    _check_free(address, hosts, port)
    return [(each, port) for each in hosts]


def join(host: str, port: int) -> str:
    """Return HOST:PORT, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bind_name(address: str, add: Callable[[str], int]) -> str:
    for host, port in literal_addresses(address):
        try:
            bound = add(join(host, port))
        except RuntimeError:  # older versions of gRPC return port 0 instead
            bound = 0
        if bound == 0:
            raise _in_use(address, join(host, port))
    return f"{address.rpartition(':')[0]}:{bound}"


def _bind_file(address: str, add: Callable[[str], int]) -> str:
    path = Path(socket_path(address))
    try:
        _remove_stale(path)
        add(f"unix:{path}")
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else _bind_failure(path)
        raise BindError(f"cannot listen on {address}: {reason}") from error
    return f"unix:{path}"


def _remove_stale(path: Path) -> None:
    """Remove the socket file that a killed server left, on which nobody listens. Raises OSError."""
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise OSError(errno.EEXIST, "the file is there and is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:  # it listens, and its queue is full
            pass
    raise OSError(errno.EADDRINUSE, "it is in use; stop the other process or give another path")


def _bind_failure(path: Path) -> str:
    """Return the reason why no socket can be bound to this path; gRPC's error has none."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(path))
    except OSError as error:
        return error.strerror or str(error)
    with contextlib.suppress(OSError):
        path.unlink()
    return "gRPC could not bind it"


def _check_free(address: str, hosts: Sequence[str], port: int) -> None:
    """Raise BindError if one of the hosts of an address cannot be bound to this port."""
    for host in hosts:
        if (error := _bind_error(host, port)) is not None:
            if error.errno == errno.EADDRINUSE:
                raise _in_use(address, join(host, port))
            raise BindError(f"cannot listen on {address}: {error.strerror}")


def _in_use(address: str, bound: str) -> BindError:
    taken = "it" if bound == address else bound
    return BindError(f"cannot listen on {address}: {taken} is in use; stop the other process or give another port")


def _is_absent(host: str) -> bool:
    error = _bind_error(host, 0)
    return error is not None and error.errno in _ABSENT


def _bind_error(host: str, port: int) -> OSError | None:
    """Return the error of binding a socket there. A listening socket conflicts; one in TIME_WAIT does not."""
    try:
        with _socket(host, port):
            return None
    except OSError as error:
        return error


def _socket(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, endpoint = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
    )[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(endpoint)
    except OSError:
        bound.close()
        raise
    return bound


def _free_port(hosts: Sequence[str]) -> int:
    """Return a port that is free at all hosts or, failing that, at the first one."""
    for _ in range(_PORT_ATTEMPTS):
        with _socket(hosts[0], 0) as first:
            port: int = first.getsockname()[1]
            if all(_bind_error(host, port) is None for host in hosts[1:]):
                break
    return port
