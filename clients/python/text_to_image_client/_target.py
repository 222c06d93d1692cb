"""Check and complete the target of a client before gRPC sees it."""

import ipaddress
import re

DEFAULT_PORT = 50051
"""The port of a target that is a host alone."""

_URI = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract|vsock|xds|google-c2p):.+", re.IGNORECASE)
_HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[\w.-]+)(?::(?P<port>\d*))?")
_EXAMPLES = 'for example "127.0.0.1:50051", "images.example.org:443" or "unix:/run/t2i.sock"'


def complete_target(target: str) -> str:
    """Return `target` for gRPC. A host alone gets the port 50051; a gRPC URI such as "dns:///..." is not changed.

    Raises TypeError, or ValueError with a correction, for a target that gRPC would not reach or take for another port.
    """
    if not isinstance(target, str):
        raise TypeError(f"target must be a string, {_EXAMPLES}, not {target!r}")
    if not target.strip():
        raise ValueError(f"target is empty; give HOST:PORT, {_EXAMPLES}")
    if web := re.match(r"(https?|grpcs?|h2c?)://([^/]*)", target, re.IGNORECASE):
        tls = ", and tls=True (`t2i --tls`)" if web[1].lower() in ("https", "grpcs") else ""
        raise ValueError(f'target must be HOST:PORT without {web[1]}://: give "{web[2] or "HOST:PORT"}"{tls}')
    if _URI.fullmatch(target):
        return target
    if _is_address(target, 6):
        raise ValueError(f'an IPv6 address as the target needs brackets: "[{target}]:{DEFAULT_PORT}"')
    if target.startswith("/"):
        raise ValueError(f'a socket file as the target needs the prefix unix: "unix:{target}"')
    if "," in target:
        raise ValueError(
            f'several addresses as the target need the prefix ipv4 or ipv6: "ipv4:{target}", each an IP and a port'
        )
    found = _HOST.fullmatch(target)
    if found is None:
        raise ValueError(f"target must be HOST:PORT, {_EXAMPLES}, not {target!r}")
    if found["port"] is None:
        return f"{target}:{DEFAULT_PORT}"
    if not found["port"] or not 1 <= int(found["port"]) <= 65535:
        raise ValueError(f"the port of the target must be 1 to 65535, not {found['port']!r}: {target}")
    return target


def is_loopback(target: str) -> bool:
    """Return whether all addresses of a complete target are on this machine, where no proxy is needed."""
    scheme, _, rest = target.partition(":") if _URI.fullmatch(target) else ("dns", "", target)
    if scheme.lower().startswith("unix"):
        return True
    addresses = rest.rpartition("/")[2].split(",")  # dns://AUTHORITY/HOST:PORT
    return all(map(_is_loopback_host, addresses))


def _is_loopback_host(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]") if re.search(r":\d+$", address) else address.strip("[]")
    if _is_address(host, 4) or _is_address(host, 6):
        number = ipaddress.ip_address(host)
        return number.is_loopback or number.is_unspecified  # a connection to 0.0.0.0 reaches this machine
    return host.lower() == "localhost" or host.lower().endswith(".localhost")


def _is_address(text: str, version: int) -> bool:
    try:
        return ipaddress.ip_address(text).version == version
    except ValueError:
        return False
