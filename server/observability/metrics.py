"""Prometheus metrics: their table, how observations update them, and the HTTP endpoint.

The engine and the recordings report observations, the interceptor reports calls; nothing depends on the metrics. Labels
have few values, all known in advance. Prompts and callers are never labels.
"""

import logging
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
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
from server.domain import EXPERTS, ModelInfo
from server.engine.events import (
    DeviceTimeAttributed,
    ImageEncoded,
    JobEnded,
    JobStarted,
    ModelCall,
    Observation,
    PreviewDropped,
)
from server.errors import BindError

if TYPE_CHECKING:
    from server.engine.engine import Engine

log = logging.getLogger(__name__)

_FAST_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
_SECONDS = tuple(edge for edge in _FAST_SECONDS if edge >= 0.01)
_SIZES = tuple(4**power for power in range(6, 14))

# Name, help, labels.
_COUNTERS = (
    ("t2i_requests_total", "Calls ended, by status. CANCELLED includes disconnected clients.", ("method", "code")),
    ("t2i_retries_total", "Calls that are retries by a client's gRPC library.", ("method",)),
    ("t2i_jobs_total", "Jobs ended, by outcome, including the warm-up job.", ("outcome",)),
    ("t2i_steps_total", "Network calls of images, by expert. Heun makes two for most steps.", ("stage",)),
    (
        "t2i_device_seconds_total",
        "Device time of ended jobs. delivered: a client received all images. wasted: the job failed, expired or was "
        "cancelled, or no client received all images. The warm-up job is not counted.",
        ("use",),
    ),
    ("t2i_images_filtered_total", "Finished images replaced by the content filter.", ()),
    ("t2i_previews_dropped_total", "Previews dropped because they were late.", ()),
)

# Name, help, labels, bucket bounds.
_HISTOGRAMS: tuple[tuple[str, str, tuple[str, ...], tuple[float, ...]], ...] = (
    ("t2i_request_duration_seconds", "Duration of calls.", ("method",), _SECONDS),
    (
        "t2i_queue_wait_seconds",
        "Time from a job's admission to its first model call. Jobs that end before it are not counted.",
        (),
        _SECONDS,
    ),
    (
        "t2i_model_call_duration_seconds",
        "Duration of model calls. Their sum is the time the device was busy.",
        ("stage",),
        _FAST_SECONDS,
    ),
    (
        "t2i_network_call_images",
        "Images per call of an expert's network.",
        ("stage",),
        tuple(2**power for power in range(7)),
    ),
    (
        "t2i_eta_ratio",
        "Time predicted at admission divided by the time taken, for finished jobs: 1 is exact, more is too long. The "
        "warm-up job is not counted.",
        (),
        (0.25, 0.5, 0.75, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5, 2, 4),
    ),
    ("t2i_image_size_bytes", "Encoded size of finished images, before base64.", (), _SIZES),
    ("t2i_image_size_pixels", "Width x height of finished images.", (), _SIZES),
)

# Name, help, labels.
_GAUGES = (
    ("t2i_queue_limit_jobs", "Maximum number of admitted jobs.", ()),
    ("t2i_compiled_calls", "Network calls that are compiled, each for one shape.", ()),
    ("t2i_compile_seconds", "Time to compile the networks, or to load them from --compile-cache.", ()),
    (
        "t2i_device_memory_bytes",
        "CUDA memory of this process, current and peak. Absent on other devices.",
        ("kind",),
    ),
)

# Name, help, states.
_ENUMS = (
    (
        "t2i_server_state",
        "State of the server. lost: the device does not respond.",
        ["loading", "warming_up", "serving", "draining", "lost"],
    ),
    (
        "t2i_compilation",
        "State of compilation. With --compile-while-serving, network calls are not compiled in compiling and failed.",
        ["off", "compiling", "compiled", "failed"],
    ),
)


class Metrics:
    """Prometheus metrics of one server, in their own registry."""

    def __init__(self, max_queue: int) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, rarely used
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._counters = {name: Counter(name, text, labels, registry=registry) for name, text, labels in _COUNTERS}
        self._histograms = {
            name: Histogram(name, text, labels, buckets=buckets, registry=registry)
            for name, text, labels, buckets in _HISTOGRAMS
        }
        self._gauges = {name: Gauge(name, text, labels, registry=registry) for name, text, labels in _GAUGES}
        self._enums = {name: Enum(name, text, states=states, registry=registry) for name, text, states in _ENUMS}
        self._model = Info("t2i_model", "Served model.", registry=registry)
        self._gauges["t2i_queue_limit_jobs"].set(max_queue)
        # Start at 0, so that a rate includes the first increment.
        for stage in EXPERTS:
            self._counters["t2i_steps_total"].labels(stage)
        for use in ("delivered", "wasted"):
            self._counters["t2i_device_seconds_total"].labels(use)

    def set_state(self, state: str) -> None:
        """Set the server's state: loading, warming_up, serving, draining or lost."""
        self._enums["t2i_server_state"].state(state)

    def set_compilation(self, state: str) -> None:
        """Set the state of compilation: off, compiling, compiled or failed."""
        self._enums["t2i_compilation"].state(state)

    def set_model(self, info: ModelInfo) -> None:
        """Export the served model, its compilation and, on CUDA, its memory."""
        self._model.info(
            {"name": info.name, "device": info.device, "precision": info.precision, "fingerprint": info.fingerprint}
        )
        self._gauges["t2i_compiled_calls"].set(info.compiled_calls)
        self._gauges["t2i_compile_seconds"].set(info.compile_seconds)
        self.set_compilation("compiled" if info.compiled_calls else "off")
        if info.device == "cuda":
            from torch import cuda  # imported by the model by now

            memory = self._gauges["t2i_device_memory_bytes"]
            memory.labels("allocated").set_function(cuda.memory_allocated)
            memory.labels("reserved").set_function(cuda.memory_reserved)
            memory.labels("allocated_peak").set_function(cuda.max_memory_allocated)
            memory.labels("reserved_peak").set_function(cuda.max_memory_reserved)

    def observe(self, observation: Observation) -> None:
        """Count one observation of the engine or the recordings."""
        counters, histograms = self._counters, self._histograms
        match observation:
            case ModelCall(stage=stage, images=images, seconds=seconds):
                histograms["t2i_model_call_duration_seconds"].labels(stage).observe(seconds)
                if stage in EXPERTS:
                    counters["t2i_steps_total"].labels(stage).inc(images)
                    histograms["t2i_network_call_images"].labels(stage).observe(images)
            case JobStarted(waited=waited):
                histograms["t2i_queue_wait_seconds"].observe(waited)
            case PreviewDropped():
                counters["t2i_previews_dropped_total"].inc()
            case ImageEncoded(pixels=pixels, size=size, filtered=filtered):
                histograms["t2i_image_size_pixels"].observe(pixels)
                histograms["t2i_image_size_bytes"].observe(size)
                counters["t2i_images_filtered_total"].inc(filtered)
            case DeviceTimeAttributed(device=device, delivered=delivered):
                counters["t2i_device_seconds_total"].labels("delivered" if delivered else "wasted").inc(device)
            case JobEnded(outcome=outcome, admitted=admitted, ended=ended, predicted_end=predicted_end):
                counters["t2i_jobs_total"].labels(re.sub(r"(?<=.)(?=[A-Z])", "_", outcome).lower()).inc()
                if outcome == "finished" and predicted_end > admitted:
                    histograms["t2i_eta_ratio"].observe((predicted_end - admitted) / (ended - admitted))

    def call_retried(self, method: str) -> None:
        """Count a call that a client's gRPC library retried."""
        self._counters["t2i_retries_total"].labels(method).inc()

    def call_ended(self, method: str, code: grpc.StatusCode, seconds: float) -> None:
        """Count a call that ended with `code` after `seconds`."""
        self._counters["t2i_requests_total"].labels(method, code.name).inc()
        self._histograms["t2i_request_duration_seconds"].labels(method).observe(seconds)

    @property
    def wasted_seconds(self) -> float:
        """Device time of images that no client received."""
        return self.registry.get_sample_value("t2i_device_seconds_total", {"use": "wasted"}) or 0.0

    def listen(self, address: str) -> str:
        """Serve the metrics over HTTP from threads of their own and return the bound HOST:PORT.

        Like gRPC, bind a wildcard for IPv4 and IPv6, and a name at each of its addresses. Raises BindError.
        """
        application = make_wsgi_app(self.registry)
        for host, port in addresses.literal_addresses(address):
            wildcard = host in addresses.WILDCARDS and socket.has_dualstack_ipv6()
            server_class = _MetricsServer6 if wildcard or ":" in host else _MetricsServer
            try:
                server = make_server("::" if wildcard else host, port, application, server_class, _QuietHandler)
            except OSError as error:
                raise BindError(f"cannot listen on {address}: {error.strerror}") from error
            threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
        return f"{address.rpartition(':')[0]}:{server.server_port}"


class _MetricsServer(ThreadingWSGIServer):
    """prometheus_client's server. It logs an interrupted scrape instead of writing a traceback to stderr."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.warning("metrics were not sent: %s", sys.exc_info()[1])


class _MetricsServer6(_MetricsServer):
    """The same on IPv6. A wildcard includes IPv4, whatever the machine's default."""

    address_family = socket.AF_INET6

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(self.server_address[0] != "::"))
        super().server_bind()


class _QuietHandler(WSGIRequestHandler):
    """Does not log requests, which come every few seconds."""

    def log_message(self, *_: Any) -> None:
        pass


class LiveCollector(Collector):
    """Metrics that are read at each scrape: the state of the queue, the device and the retained jobs.

    `detached` returns the numbers of detached jobs that run and that are retained after their end, and the bytes of the
    retained ones.
    """

    def __init__(self, engine: "Engine", detached: Callable[[], tuple[int, int, int]]) -> None:
        self._engine = engine
        self._detached = detached

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics with their current values."""
        statistics = self._engine.statistics()
        yield _gauge(
            "t2i_queue_jobs",
            "Admitted jobs. waiting: before their first model call. running: after it.",
            "state",
            {"waiting": statistics.waiting, "running": statistics.running},
        )
        yield GaugeMetricFamily(
            "t2i_device_call_age_seconds",
            "Age of the model call in flight, 0 between calls.",
            self._engine.busy,
        )
        running, retained, retained_bytes = self._detached()
        yield _gauge(
            "t2i_detached_jobs",
            "Detached jobs. running: not ended. kept: ended and retained.",
            "state",
            {"running": running, "kept": retained},
        )
        yield GaugeMetricFamily("t2i_retained_bytes", "Memory of ended detached jobs.", retained_bytes)


def _gauge(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family
