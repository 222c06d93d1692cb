"""The channel to a service: TLS, token, retries and load balancing, checked before gRPC sees them."""

import json
import re
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import grpc

from ._messages import MAX_MESSAGE_BYTES
from ._target import is_loopback
from .v1 import text_to_image_pb2 as pb

__all__ = ["TLS"]

MAX_RETRIES = 4  # gRPC makes at most five attempts, whatever its service config says
MAX_RESUBMIT = 1  # a request that crashes servers crashes two of them at most
_MAX_RECONNECT_MS = 5000  # a server that comes back gets its share of calls after seconds, not after two minutes


@dataclass(frozen=True)
class TLS:
    """Certificates for TLS. All are PEM files, read when the client is constructed.

    `ca` holds the certificates to trust, by default gRPC's own bundle. `certificate` and `key` identify this client to
    a service that asks for a client certificate.
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files. Raises OSError for an unreadable one, ValueError for one without PEM or its counterpart."""
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together")
        ca, key, certificate = (
            _read_pem(Path(file)) if file is not None else None for file in (self.ca, self.key, self.certificate)
        )
        return grpc.ssl_channel_credentials(ca, key, certificate)


def _read_pem(file: Path) -> bytes:
    pem = file.read_bytes()
    if b"-----BEGIN " not in pem:  # gRPC takes any bytes, and then every call fails as if the server were down
        raise ValueError(f"{file} is not PEM: it has no line that begins with -----BEGIN")
    return pem


def channel_credentials(tls: TLS | bool | None) -> grpc.ChannelCredentials | None:
    """Return the credentials that `tls` asks for, None for a channel without TLS."""
    if tls is None or tls is False:
        return None
    if tls is True:
        return TLS().credentials()
    if not isinstance(tls, TLS):
        raise TypeError(f"tls must be True, or TLS with the files of certificates, not {tls!r}")
    return tls.credentials()


def call_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """Return the metadata of every call: the bearer token, if there is one. No error message contains the token."""
    if token is None:
        return ()
    if not isinstance(token, str):
        raise TypeError(f"token must be text, not of type {type(token).__name__}")
    if not re.fullmatch(r"[!-~]+", token):
        raise ValueError("a token has visible ASCII characters only")  # gRPC's own message would quote the token
    return (("authorization", f"Bearer {token}"),)


def channel_options(target: str, retries: int, round_robin: bool) -> list[tuple[str, Any]]:
    """Return gRPC's channel options for a complete `target`. Raises ValueError unless `retries` is 0 to 4."""
    retries = check_count("retries", retries, MAX_RETRIES)
    options: list[tuple[str, Any]] = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    if is_loopback(target):
        # gRPC would send even loopback calls to the proxy in http_proxy, and a proxy has another loopback.
        options.append(("grpc.enable_http_proxy", 0))
    service = pb.DESCRIPTOR.services_by_name["TextToImageService"].full_name
    config: dict[str, Any] = {}
    if retries:
        # Health checks are not retried: a probe asks for the state now, not for the state in three seconds.
        # CANCELLED: the service itself cancels no call before its headers. A stopping gRPC server does, for calls that
        # arrive before the client has seen its GOAWAY.
        policy = {
            "maxAttempts": retries + 1,
            "initialBackoff": "0.2s",
            "maxBackoff": "2s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
        }
        config["methodConfig"] = [{"name": [{"service": service}], "retryPolicy": policy}]
    else:
        # This also turns off gRPC's transparent retries. Of calls that began while a server ended, about one in a
        # hundred never returned from a transparent retry, whatever its deadline (grpcio 1.85.1).
        options.append(("grpc.enable_retries", 0))
    if round_robin:
        config["loadBalancingConfig"] = [{"round_robin": {}}]
        config["healthCheckConfig"] = {"serviceName": service}
        options.append(("grpc.max_reconnect_backoff_ms", _MAX_RECONNECT_MS))
    if config:
        options.append(("grpc.service_config", json.dumps(config)))
    return options


def check_count(name: str, value: int, most: int) -> int:
    """Return `value` as an int. Raises ValueError unless it is a whole number from 0 to `most`."""
    # 1.0 and True equal 1 in Python, and not in gRPC's service config.
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= value <= most:
        raise ValueError(f"{name} must be 0 to {most}, not {value!r}")
    return int(value)
