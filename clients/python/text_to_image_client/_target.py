"""Where a service is: what people write for it, checked and completed before gRPC sees it."""

import ipaddress
import re

DEFAULT_PORT = 50051
"""Of a target that names a host alone."""

_URI = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract|vsock|xds|google-c2p):.+", re.IGNORECASE)
_HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[\w.-]+)(?::(?P<port>\d*))?")
_EXAMPLES = 'for example "127.0.0.1:50051", "images.example.org:443" or "unix:/run/t2i.sock"'


def complete(target: str) -> str:
    """The target as gRPC takes it: HOST alone gets the port 50051; a URI of gRPC's, such as "dns:///...", stays.

    Raises ValueError with what to write instead, for what gRPC would look for in vain or at another port.
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
        raise ValueError(f'an IPv6 address as the target stands in brackets: "[{target}]:{DEFAULT_PORT}"')
    if target.startswith("/"):
        raise ValueError(f'a socket file as the target begins with unix: "unix:{target}"')
    if "," in target:
        raise ValueError(
            f'several addresses as the target begin with ipv4 or ipv6: "ipv4:{target}", each an IP address and a port'
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
    """Whether all addresses of a complete target are this machine's own, which no proxy reaches."""
    scheme, _, rest = target.partition(":") if _URI.fullmatch(target) else ("dns", "", target)
    if scheme.lower().startswith("unix"):
        return True
    addresses = rest.rpartition("/")[2].split(",")  # dns://AUTHORITY/HOST:PORT
    return all(map(_is_loopback_host, addresses))


def _is_loopback_host(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]") if re.search(r":\d+$", address) else address.strip("[]")
    if _is_address(host, 4) or _is_address(host, 6):
        number = ipaddress.ip_address(host)
        return number.is_loopback or number.is_unspecified  # 0.0.0.0, as a server's flag has it, connects to itself
    return host.lower() == "localhost" or host.lower().endswith(".localhost")


def _is_address(text: str, version: int) -> bool:
    try:
        return ipaddress.ip_address(text).version == version
    except ValueError:
        return False
