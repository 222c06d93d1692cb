"""Traces, if OpenTelemetry's environment variables name a collector. spans.py has the code that needs its packages."""

import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.observability.spans import Traces

log = logging.getLogger(__name__)

_PROTOCOLS = ("grpc", "http/protobuf")  # the first is the default


def traces_from_environment() -> "Traces | None":
    """Return traces if OpenTelemetry's OTEL_... variables name a collector and are valid; log why not otherwise."""
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    endpoint = _exporter_variable("ENDPOINT")
    if off or not endpoint:
        return None
    protocol = (_exporter_variable("PROTOCOL") or _PROTOCOLS[0]).strip().lower()
    if protocol not in _PROTOCOLS:
        log.warning(
            "no traces: OTEL_EXPORTER_OTLP_PROTOCOL is %r; supported are %s", protocol, " and ".join(_PROTOCOLS)
        )
        return None
    try:
        from server.observability.spans import Traces  # an extra, and slow to import

        return Traces(protocol, endpoint)
    except ImportError as error:
        log.warning("no traces, although the environment names a collector: %s; install the extra [telemetry]", error)
    except Exception as error:  # noqa: BLE001  # OpenTelemetry raises anything on invalid variables; serve without it
        log.warning("no traces: OpenTelemetry cannot use its variables: %s", error)
    return None


def _exporter_variable(name: str) -> str:
    """Return OpenTelemetry's variable for the exporter; the one for traces precedes the general one."""
    return os.environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}") or os.environ.get(f"OTEL_EXPORTER_OTLP_{name}") or ""
