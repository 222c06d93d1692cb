"""OpenTelemetry spans: one for each call, a child of its caller's, with a child for each stage of its job.

Imported only if traces are on, since the packages are an extra. OpenTelemetry reads the collector, the sampling and the
service's name from its own OTEL_... environment variables.
"""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import grpc
import requests
from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

from server import __version__
from server.api.addresses import is_loopback
from server.engine.events import ImageEncoded, JobEnded, Observation

_STOP_SECONDS = 3.0  # for the last spans; a collector that does not respond must not delay the exit

# Errors of the server by OpenTelemetry's conventions for RPC, and ABORTED, which is a lost device here.
_FAULTS = {
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}


class CallSpan:
    """The span of one call."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        self.trace_id = trace.format_trace_id(span.get_span_context().trace_id)

    def end(self, code: grpc.StatusCode, job: str | None) -> None:
        self._span.set_attribute("rpc.grpc.status_code", code.value[0])
        if job:
            self._span.set_attribute("t2i.job", job)
        if code in _FAULTS:
            self._span.set_status(trace.StatusCode.ERROR, code.name)


def _exporter(protocol: str, endpoint: str) -> SpanExporter:
    """Return an exporter of protocol "grpc" or "http/protobuf"; without a proxy if the collector is on this machine."""
    is_here = is_loopback(urlsplit(endpoint if "//" in endpoint else f"//{endpoint}").hostname or "")
    if protocol == "grpc":
        options: Any = (("grpc.enable_http_proxy", 0),) if is_here else None
        return GrpcExporter(channel_options=options)
    session = requests.Session()
    session.trust_env = not is_here
    return HttpExporter(session=session)


class Traces:
    """Records spans and sends them to a collector in batches, from a thread of its own.

    `protocol` is "grpc" or "http/protobuf", `endpoint` the collector's from the environment. Raises OpenTelemetry's
    errors of invalid variables.
    """

    def __init__(self, protocol: str, endpoint: str) -> None:
        named = OTELResourceDetector().detect().attributes
        self._provider = TracerProvider(resource=Resource.create({"service.name": "text-to-image", **named}))
        self._provider.add_span_processor(BatchSpanProcessor(_exporter(protocol, endpoint)))
        self._tracer = self._provider.get_tracer("text-to-image", __version__)

    @contextlib.contextmanager
    def call(self, service: str, method: str, metadata: Mapping[str, Any], request_id: str) -> Iterator[CallSpan]:
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method, "t2i.request_id": request_id}
        with self._tracer.start_as_current_span(
            f"{service}/{method}",
            context=propagate.extract(metadata),
            kind=trace.SpanKind.SERVER,
            attributes=attributes,
            record_exception=False,  # exceptions here are how gRPC ends a call with a status
            set_status_on_exception=False,
        ) as span:
            yield CallSpan(span)

    def observe(self, observation: Observation) -> None:
        if not trace.get_current_span().get_span_context().is_valid:  # the warm-up job has no call
            return
        match observation:
            case JobEnded(admitted=admitted, started=started, ended=ended, spans=spans):
                self._span("queue", admitted, ended if started is None else started)
                for each in spans:
                    self._span(
                        each.stage,
                        each.began,
                        each.ended,
                        image=each.index,
                        calls=each.calls,
                        device_seconds=each.device,
                    )
            case ImageEncoded(pixels=pixels, size=size, began=began, ended=ended, filtered=filtered):
                self._span("code image", began, ended, pixels=pixels, bytes=size, filtered=filtered)

    def _span(self, name: str, began: float, ended: float, **attributes: float) -> None:
        """Record a finished child span of the current one; times are on the monotonic clock."""
        epoch = time.time_ns() - time.monotonic_ns()
        of_service = {f"t2i.{key}": value for key, value in attributes.items()}
        span = self._tracer.start_span(name, attributes=of_service, start_time=epoch + int(began * 1e9))
        span.end(epoch + int(ended * 1e9))

    def stop(self) -> None:
        """Send the remaining spans, within a time limit."""
        stopping = threading.Thread(target=self._provider.shutdown, daemon=True)
        stopping.start()
        stopping.join(_STOP_SECONDS)
