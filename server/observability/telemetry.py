"""What an operator sees of the service: metrics, the names of calls, the lines of the log; traces.py has the traces.

It watches and nothing depends on it: engine and recordings tell observations, an interceptor sees the calls. Labels
have few values that are known beforehand, and neither prompts nor callers are among them.
"""

import asyncio
import contextlib
import contextvars
import json
import logging
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO
from wsgiref.simple_server import WSGIRequestHandler, make_server

import grpc
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Enum,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import ThreadingWSGIServer, make_wsgi_app
from prometheus_client.registry import Collector

from server.api import addresses
from server.api.addresses import CannotListen
from server.domain import ModelInfo, Stage
from server.engine.events import (
    DeviceTimeAttributed,
    ImageEncoded,
    JobEnded,
    JobStarted,
    ModelCall,
    Observation,
    PreviewDropped,
)
from server.stubs.inference_v2 import open_inference_pb2 as oip
from server.stubs.model_model_v1alpha import model_public_pb2 as model_public
from server.stubs.model_ray_v1alpha import user_defined_pb2 as user_defined
from text_to_image_client.v1 import text_to_image_pb2 as pb

if TYPE_CHECKING:
    from server.engine.engine import Engine
    from server.observability.traces import Traces

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["TextToImageService"].full_name
INSTILL = user_defined.DESCRIPTOR.services_by_name["UserDefinedService"].full_name
INSTILL_PUBLIC = model_public.DESCRIPTOR.services_by_name["ModelPublicService"].full_name
KSERVE = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
REQUEST_ID = "x-request-id"
_ATTEMPTS = "grpc-previous-rpc-attempts"  # gRPC's own, of calls that are made again
_TRACE_PROTOCOLS = ("grpc", "http/protobuf")  # the first is the default

# By name, since a caller can ask for any number of methods that are not there, and each would be a label.
_METHODS = {
    f"/{service.full_name}/{method.name}"
    for file in (pb.DESCRIPTOR, user_defined.DESCRIPTOR, model_public.DESCRIPTOR, oip.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
}

Behavior = Callable[[Any, Any], Awaitable[Any]]


@dataclass(frozen=True)
class Call:
    """What a call is known by. `trace_id` is 32 hex digits, or empty if neither the caller nor the service traces."""

    request_id: str
    trace_id: str


_call: contextvars.ContextVar[Call | None] = contextvars.ContextVar("call", default=None)
job_of_call: contextvars.ContextVar[str | None] = contextvars.ContextVar("job", default=None)
"""The name of the job that the call under way is about."""


# Metrics.


class Metrics:
    """Prometheus metrics of one server, in a registry of their own."""

    def __init__(self, max_queue: int) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which few use
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def seconds(name: str, text: str, labels: tuple[str, ...] = (), least: float = 0.01) -> Histogram:
            buckets = [edge for edge in _SECONDS if edge >= least]
            return Histogram(name, text, labels, buckets=buckets, registry=registry)

        self._state = Enum(
            "t2i_server_state",
            "What the server is about; lost: the device does not answer any more.",
            states=["loading", "warming_up", "serving", "draining", "lost"],
            registry=registry,
        )
        self._model = Info("t2i_model", "The model that is served.", registry=registry)
        self._requests = Counter(
            "t2i_requests_total",
            "Calls that have ended, by method and gRPC status; CANCELLED includes clients that went away.",
            ("method", "code"),
            registry=registry,
        )
        self._retries = Counter(
            "t2i_retries_total",
            "Calls that gRPC's libraries made again after another attempt had failed, as they say in their metadata.",
            ("method",),
            registry=registry,
        )
        self._request_seconds = seconds(
            "t2i_request_duration_seconds", "From the beginning of a call to its end.", ("method",)
        )
        self._wait_seconds = seconds(
            "t2i_queue_wait_seconds",
            "From a job's admission to its first call of the model, for jobs that came to one.",
        )
        Gauge("t2i_queue_limit_jobs", "Jobs that may be admitted at once.", registry=registry).set(max_queue)
        self._jobs = Counter(
            "t2i_jobs_total",
            "Jobs that have ended, by outcome, the first image included.",
            ("outcome",),
            registry=registry,
        )
        self._steps = Counter(
            "t2i_steps_total", "Denoising steps by expert, counted for each image.", ("stage",), registry=registry
        )
        for stage in (Stage.BASE, Stage.REFINER):
            self._steps.labels(stage)  # from 0 on, so that the first are part of a rate
        self._call_seconds = seconds(
            "t2i_model_call_duration_seconds", "Calls of the model; their sum is the time the device was busy.",
            ("stage",), least=0.001,
        )  # fmt: skip
        self._call_images = Histogram(
            "t2i_network_call_images",
            "Images that shared a network call of an expert.",
            ("stage",),
            buckets=[2**power for power in range(7)],
            registry=registry,
        )
        self._device_seconds = Counter(
            "t2i_device_seconds_total",
            "Device time of jobs, counted when it is known what it was good for. wasted: all calls made for jobs that "
            "failed, expired or were cancelled, or whose images nobody got in full; delivered: those of all others. "
            "The first image of a process counts as neither.",
            ("use",),
            registry=registry,
        )
        for use in ("delivered", "wasted"):
            self._device_seconds.labels(use)
        self._eta_ratio = Histogram(
            "t2i_eta_ratio",
            "Of jobs that finished, the time foretold at admission over the time taken: 1 is right, more was too long. "
            "The first image of a process, of which nothing can be foretold, does not count.",
            buckets=(0.25, 0.5, 0.75, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5, 2, 4),
            registry=registry,
        )
        self._image_bytes = Histogram(
            "t2i_image_size_bytes",
            "Sizes of finished images as files, before base64.",
            buckets=[4**power for power in range(6, 14)],
            registry=registry,
        )
        self._image_pixels = Histogram(
            "t2i_image_size_pixels",
            "Width times height of finished images.",
            buckets=[4**power for power in range(6, 14)],
            registry=registry,
        )
        self._images_filtered = Counter(
            "t2i_images_filtered_total",
            "Finished images that the content filter objected to, and that were replaced.",
            registry=registry,
        )
        self._previews_dropped = Counter(
            "t2i_previews_dropped_total", "Previews that came too late to be drawn or told.", registry=registry
        )

        self._compiled_calls = Gauge(
            "t2i_compiled_calls",
            "Calls of a network, each for one shape, that are compiled.",
            registry=registry,
        )
        self._compile_seconds = Gauge(
            "t2i_compile_seconds", "How long compiling took, or taking it from --compile-cache.", registry=registry
        )
        self._compilation = Enum(
            "t2i_compilation",
            "Whether calls of the networks are compiled; compiling, failed: with --compile-while-serving they are not.",
            states=["off", "compiling", "compiled", "failed"],
            registry=registry,
        )
        self._device_memory = Gauge(
            "t2i_device_memory_bytes",
            "Memory that this process uses of a CUDA device, or used at most; of others there is nothing to tell.",
            ("kind",),
            registry=registry,
        )

    def state(self, state: str) -> None:
        self._state.state(state)

    def compilation(self, state: str) -> None:
        self._compilation.state(state)

    def serves(self, info: ModelInfo) -> None:
        self._model.info(
            {
                "name": info.name,
                "device": info.device,
                "precision": info.precision,
                "fingerprint": info.fingerprint,
            }
        )

        self._compiled_calls.set(info.compiled_calls)
        self._compile_seconds.set(info.compile_seconds)
        self.compilation("compiled" if info.compiled_calls else "off")

        if info.device == "cuda":
            from torch import cuda  # which the model has imported by now

            self._device_memory.labels("allocated").set_function(cuda.memory_allocated)
            self._device_memory.labels("reserved").set_function(cuda.memory_reserved)
            self._device_memory.labels("allocated_peak").set_function(cuda.max_memory_allocated)
            self._device_memory.labels("reserved_peak").set_function(cuda.max_memory_reserved)

    def observe(self, observation: Observation) -> None:
        match observation:
            case ModelCall(stage=stage, images=images, seconds=seconds):
                self._call_seconds.labels(stage).observe(seconds)
                if stage in (Stage.BASE, Stage.REFINER):
                    self._steps.labels(stage).inc(images)
                    self._call_images.labels(stage).observe(images)
            case JobStarted(waited=waited):
                self._wait_seconds.observe(waited)
            case PreviewDropped():
                self._previews_dropped.inc()
            case ImageEncoded(pixels=pixels, size=size, filtered=filtered):
                self._image_pixels.observe(pixels)
                self._image_bytes.observe(size)
                self._images_filtered.inc(filtered)
            case DeviceTimeAttributed(device=device, delivered=delivered):
                self._device_seconds.labels("delivered" if delivered else "wasted").inc(device)
            case JobEnded(outcome=outcome, admitted=admitted, ended=ended, predicted_end=predicted_end):
                self._jobs.labels(re.sub(r"(?<=.)(?=[A-Z])", "_", outcome).lower()).inc()
                if outcome == "finished" and predicted_end > admitted:
                    self._eta_ratio.observe((predicted_end - admitted) / (ended - admitted))

    def call_retried(self, method: str) -> None:
        self._retries.labels(method).inc()

    @property
    def wasted_seconds(self) -> float:
        """Device time whose images no caller got, as the metric has it."""
        return self.registry.get_sample_value("t2i_device_seconds_total", {"use": "wasted"}) or 0.0

    def call_ended(self, method: str, code: grpc.StatusCode, seconds: float) -> None:
        self._requests.labels(method, code.name).inc()
        self._request_seconds.labels(method).observe(seconds)

    def listen(self, address: str) -> str:
        """Answer Prometheus over HTTP from threads of their own; the bound HOST:PORT. Raises CannotListen.

        As gRPC does, a wildcard is bound for IPv4 and IPv6, and a name with every address that it has.
        """
        application = make_wsgi_app(self.registry)
        for host, port in addresses.literal_addresses(address):
            wildcard = host in addresses.WILDCARDS and socket.has_dualstack_ipv6()
            server_class = _MetricsServer6 if wildcard or ":" in host else _MetricsServer
            try:
                server = make_server("::" if wildcard else host, port, application, server_class, _QuietHandler)
            except OSError as error:
                raise CannotListen(f"cannot listen on {address}: {error.strerror}") from error
            threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
        return f"{address.rpartition(':')[0]}:{server.server_port}"


class _MetricsServer(ThreadingWSGIServer):
    """prometheus_client's server, which says in the log, not on stderr, that a scrape was broken off."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.warning("metrics were not sent: %s", sys.exc_info()[1])


class _MetricsServer6(_MetricsServer):
    """The same for IPv6 and, on a wildcard, for IPv4 too, whatever the machine's default is."""

    address_family = socket.AF_INET6

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(self.server_address[0] != "::"))
        super().server_bind()


class _QuietHandler(WSGIRequestHandler):
    """Logs no request: they come every few seconds."""

    def log_message(self, *_: Any) -> None:
        pass


_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)


class LiveCollector(Collector):
    """What is asked for at the moment of telling: how full the queue, the memory and the retention are."""

    def __init__(self, engine: "Engine", detached: Callable[[], tuple[int, int, int]]) -> None:
        self._engine = engine
        self._detached = detached

    def collect(self) -> Iterator[Metric]:
        done = self._engine.statistics()
        yield _gauge(
            "t2i_queue_jobs",
            "Jobs admitted and not ended: those that wait for their first call, and those that have begun.",
            "state",
            {"waiting": done.waiting, "running": done.running},
        )
        yield GaugeMetricFamily(
            "t2i_device_call_age_seconds",
            "How long the call in flight has taken so far, 0 between calls.",
            self._engine.busy,
        )
        running, kept, kept_bytes = self._detached()
        yield _gauge(
            "t2i_detached_jobs",
            "Detached jobs: those that run, and those that have ended and are kept.",
            "state",
            {"running": running, "kept": kept},
        )
        yield GaugeMetricFamily("t2i_retained_bytes", "Memory of detached jobs that have ended.", kept_bytes)


def _gauge(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


# Calls.


class Calls(grpc.aio.ServerInterceptor):
    """Gives each call of the service its names, a span and its place in the metrics.

    OpenTelemetry's own interceptor is not used, because it takes a stream's handler for a generator; ours writes to
    the context, since only so can it see that a client has stopped reading.
    """

    def __init__(self, metrics: Metrics, traces: "Traces | None") -> None:
        self._metrics = metrics
        self._traces = traces

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method not in _METHODS:
            return handler
        service, _, method = handler_call_details.method.lstrip("/").rpartition("/")
        kind = "_".join(
            "stream" if streaming else "unary" for streaming in (handler.request_streaming, handler.response_streaming)
        )
        make: Callable[..., Any] = getattr(grpc, f"{kind}_rpc_method_handler")
        behavior = self._watched(service, method, getattr(handler, kind))
        return make(behavior, handler.request_deserializer, handler.response_serializer)

    def _watched(self, service: str, method: str, behavior: Behavior) -> Behavior:
        async def watched(request: Any, context: Any) -> Any:
            began = time.monotonic()
            metadata = dict(context.invocation_metadata() or ())
            request_id = _request_id(metadata)
            if _ATTEMPTS in metadata:
                self._metrics.call_retried(method)
            context.set_trailing_metadata(((REQUEST_ID, request_id),))
            code = grpc.StatusCode.OK
            tracing = self._traces.call(service, method, metadata, request_id) if self._traces else None
            with tracing or contextlib.nullcontext() as span:
                _call.set(Call(request_id, span.trace_id if span else _trace_id_of_caller(metadata)))
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

        return watched


def _request_id(metadata: Mapping[str, Any]) -> str:
    """The caller's, if it may come near a log, or a new one."""
    given = str(metadata.get(REQUEST_ID, ""))
    return given if re.fullmatch(r"[A-Za-z0-9._:/-]{1,128}", given) else uuid.uuid4().hex


def _trace_id_of_caller(metadata: Mapping[str, Any]) -> str:
    """From a `traceparent` as W3C's Trace Context has it."""
    found = re.fullmatch(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}", str(metadata.get("traceparent", "")))
    return found[1] if found else ""


def traces_of_environment() -> "Traces | None":
    """Traces, if OpenTelemetry's own environment variables name a collector for them and can be used."""
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    endpoint = _of_exporter("ENDPOINT")
    if off or not endpoint:
        return None
    protocol = _of_exporter("PROTOCOL") or _TRACE_PROTOCOLS[0]
    if protocol.strip().lower() not in _TRACE_PROTOCOLS:
        served = " or ".join(_TRACE_PROTOCOLS)
        log.warning("no traces: OTEL_EXPORTER_OTLP_PROTOCOL is %r; what can be sent is %s", protocol, served)
        return None
    try:
        from server.observability.traces import (
            Traces,  # the packages that it needs are an extra, and take long to import
        )

        return Traces(protocol.strip().lower(), endpoint)
    except ImportError as error:
        log.warning("no traces, although the environment names a collector: %s; install the extra [telemetry]", error)
    except Exception as error:  # noqa: BLE001  # whatever a library makes of its variables; the service can do without
        log.warning("no traces: OpenTelemetry cannot use its variables: %s", error)
    return None


def _of_exporter(name: str) -> str:
    """A variable of OpenTelemetry's, that for traces before that for everything."""
    return os.environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}") or os.environ.get(f"OTEL_EXPORTER_OTLP_{name}") or ""


# The log.


def log_to_stderr(level: str, form: str, stream: TextIO | None = None) -> None:
    """Log from this level on, as "text" or "json", to this stream or stderr; exceptions that nobody catches, too."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Json() if form == "json" else _Text())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(form == "json")  # which else come in between as text
    sys.excepthook = lambda *error: log.critical("unexpected error", exc_info=error)
    threading.excepthook = _log_of_thread
    sys.unraisablehook = _log_unraisable
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_about_a_caller_who_is_there)


def _is_about_a_caller_who_is_there(record: logging.LogRecord) -> bool:
    """Whether to log a record of gRPC's: not a traceback of a call whose caller left just before the answer."""
    return not (record.exc_info and isinstance(record.exc_info[1], grpc.aio.InternalError))


def _log_of_thread(args: threading.ExceptHookArgs) -> None:
    name = args.thread.name if args.thread else "that is gone"
    error = args.exc_value or args.exc_type()
    log.critical("unexpected error in the thread %s", name, exc_info=error)


def _log_unraisable(args: "sys.UnraisableHookArgs") -> None:
    words = args.err_msg or "an exception that nobody can catch"
    log.error("%s: %r", words, args.object, exc_info=args.exc_value or True)


def _names() -> dict[str, str]:
    """What the call under way is known by."""
    call = _call.get()
    names = {"request_id": call.request_id, "trace_id": call.trace_id} if call else {}
    names["job"] = job_of_call.get() or ""
    return {name: value for name, value in names.items() if value}


class _Text(logging.Formatter):
    """A line for people, with what its call is known by at the end."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's own name
        line = super().formatMessage(record)
        names = " ".join(f"{name}={value}" for name, value in _names().items())
        return f"{line} [{names}]" if names else line


class _Json(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_names(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)
