"""The interceptor that gives each call its identifiers, its span and its metrics."""

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import grpc

from server.api.service_names import METHODS
from server.domain import is_request_id
from server.observability.call_context import CallIds, call_ids, job_of_call
from server.observability.metrics import Metrics

if TYPE_CHECKING:
    from server.observability.spans import Traces

REQUEST_ID = "x-request-id"
_ATTEMPTS = "grpc-previous-rpc-attempts"  # set by gRPC's libraries on retries

Behavior = Callable[[Any, Any], Awaitable[Any]]


class TelemetryInterceptor(grpc.aio.ServerInterceptor):
    """Sets a call's identifiers, records its span and counts it. Calls of unknown methods are not observed.

    OpenTelemetry's own interceptor requires that a streaming handler is a generator. Ours writes to the context,
    because only then it notices that a client has stopped reading.
    """

    def __init__(self, metrics: Metrics, traces: "Traces | None") -> None:
        self._metrics = metrics
        self._traces = traces

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Wrap the method's handler. A method label of the metrics is always a known method's."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method not in METHODS:
            return handler
        service, _, method = handler_call_details.method.lstrip("/").rpartition("/")
        kind = "_".join(
            "stream" if streaming else "unary" for streaming in (handler.request_streaming, handler.response_streaming)
        )
        make: Callable[..., Any] = getattr(grpc, f"{kind}_rpc_method_handler")
        behavior = self._observed(service, method, getattr(handler, kind))
        return make(behavior, handler.request_deserializer, handler.response_serializer)

    def _observed(self, service: str, method: str, behavior: Behavior) -> Behavior:
        async def observed(request: Any, context: Any) -> Any:
            began = time.monotonic()
            metadata = dict(context.invocation_metadata() or ())
            request_id = _request_id(metadata)
            if _ATTEMPTS in metadata:
                self._metrics.call_retried(method)
            context.set_trailing_metadata(((REQUEST_ID, request_id),))
            code = grpc.StatusCode.OK
            tracing = self._traces.call(service, method, metadata, request_id) if self._traces else None
            with tracing or contextlib.nullcontext() as span:
                call_ids.set(CallIds(request_id, span.trace_id if span else _trace_id_of_caller(metadata)))
                try:
                    return await behavior(request, context)
                except asyncio.CancelledError:
                    code = grpc.StatusCode.CANCELLED
                    raise
                except Exception:
                    code = context.code() or grpc.StatusCode.UNKNOWN
                    raise
                finally:
                    self._metrics.call_ended(method, code, time.monotonic() - began)
                    if span:
                        span.end(code, job_of_call.get())

        return observed


def _request_id(metadata: Mapping[str, Any]) -> str:
    """Return the caller's x-request-id if it is safe to log, else a new one."""
    given = str(metadata.get(REQUEST_ID, ""))
    return given if is_request_id(given) else uuid.uuid4().hex


def _trace_id_of_caller(metadata: Mapping[str, Any]) -> str:
    """Return the trace id of a W3C `traceparent`, or ""."""
    found = re.fullmatch(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}", str(metadata.get("traceparent", "")))
    return found[1] if found else ""
