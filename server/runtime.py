"""The served model with its engine, frontend and metrics: the part that every way of serving shares.

`python -m server` adds ports (lifecycle.py), Ray Serve its own ingress (deploy/ray).
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from server import before_imports
from server.acceleration.kernels import cpu_library
from server.acceleration.kernels.cpu_library import BuildError
from server.api import auth, content_filter
from server.api.decode_errors import DecodeErrorInterceptor
from server.api.frontend import Frontend
from server.domain import ImageRequest, ModelInfo, default_request
from server.engine.engine import Engine
from server.engine.events import Event, Failed, Finished, ImageReady, Observation
from server.engine.interface import AnyServedModel, Submission
from server.engine.scheduling import Order
from server.engine.totals import Statistics
from server.ensemble import checkpoint
from server.errors import DeviceHung, StartupError, WarmUpError
from server.observability.interceptor import TelemetryInterceptor
from server.observability.metrics import LiveCollector, Metrics
from server.observability.traces import traces_from_environment
from server.settings import Settings

log = logging.getLogger(__name__)

_CHECKS = 20  # of the device within the timeout
_DEVICE_SECONDS = 10.0  # for the model call in flight to return when the process stops


class CallAge:
    """Age of the model call in flight, without the time for which this process was paused.

    A paused process (SIGSTOP, a frozen container or virtual machine) makes no progress while its clock runs. Updates
    come every `interval` seconds, so a much longer time between two of them is a pause.
    """

    def __init__(self, interval: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_step = 2 * interval  # on a busy machine an update is late by less
        self._clock = clock
        self._updated = clock()
        self._age = 0.0

    def update(self, busy: float) -> float:
        """Return the age in seconds, given `busy`, the age by the clock, or 0 between calls."""
        now = self._clock()
        self._age = min(busy, self._age + min(now - self._updated, self._max_step))
        self._updated = now
        return self._age


class Runtime:
    """Serves one model to any number of ports. `load` loads the model and runs on the device thread.

    Raises CredentialsError, ContentFilterError, or the error of a custom content filter.
    """

    def __init__(self, settings: Settings, load: Callable[[], AnyServedModel]) -> None:
        self._settings = settings
        self._load = load
        self.metrics = Metrics(settings.max_queue)
        self._traces = traces_from_environment()
        self.engine = Engine(settings.queue, Order(settings.scheduling_policy), observe=self._observe)
        self._screening = content_filter.load(settings)
        self.frontend = Frontend(self.engine, settings, self._observe, self._screening)
        gates = [] if settings.tokens is None else [auth.TokenAuthInterceptor(settings.tokens)]
        self.tokens = gates[0].files if gates else None
        """The file of tokens, or None if calls need no token."""
        self.interceptors: list[grpc.aio.ServerInterceptor] = [
            TelemetryInterceptor(self.metrics, self._traces),
            *gates,
            DecodeErrorInterceptor(),
        ]
        """For every server of this runtime, in this order: the first also observes calls that the others reject."""
        self._compiling: asyncio.Task[None] | None = None
        self._compiler: threading.Thread | None = None
        self._lost = False
        self._warm_up_totals: Statistics | None = None

    def _observe(self, observation: Observation) -> None:
        self.metrics.observe(observation)
        if self._traces is not None:
            self._traces.observe(observation)

    def serve_metrics(self) -> None:
        """Serve metrics to Prometheus if the settings name an address. Raises BindError."""
        if self._settings.metrics_listen is None:
            return
        self.metrics.registry.register(LiveCollector(self.engine, lambda: self.frontend.detached))
        address = self.metrics.listen(self._settings.metrics_listen)
        log.info("metrics on http://%s/metrics", address)

    async def open(self) -> ModelInfo:
        """Load the model, generate a first image and admit calls; compile while serving if the settings say so.

        Raises WarmUpError, or the error of loading.
        """
        model = await asyncio.wrap_future(self.engine.start(self._load))
        info = model.info
        self.metrics.set_model(info)
        self.metrics.set_state("warming_up")
        log.info("loaded %s on %s in %s; warming up", info.name, info.device, info.precision)
        first = await self._warm_up(_reference_request(info))
        self._warm_up_totals = self.engine.statistics()
        info = await self._serve(model.set_info, info, first)
        self.metrics.set_state("serving")
        if self._settings.compile_while_serving:
            self._compiling = asyncio.create_task(self._compile(model))
        return info

    async def _serve(self, adopt: Callable[[ModelInfo], None], info: ModelInfo, first: NDArray[np.uint8]) -> ModelInfo:
        """Publish `info` with the hash of the reference image `first`, let the model `adopt` it, and return it."""
        reference = hashlib.sha256(first.tobytes()).hexdigest()
        info = replace(info, environment=replace(info.environment, reference=reference))
        info = await self._with_content_filter(info, first)
        adopt(info)
        self.frontend.open(info)
        self.metrics.set_model(info)
        return info

    async def _compile(self, model: AnyServedModel) -> None:
        """Compile the networks while eager ones serve. If that fails, keep serving those."""
        log.info("compiling; eager networks serve until it ends")
        self.metrics.set_compilation("compiling")
        compiled: Future[tuple[ModelInfo, NDArray[np.uint8]]] = Future()
        compiled.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        compile_ = partial(model.compile, _reference_request(model.info))
        # A daemon thread, not the event loop's pool, which waits for its threads at exit: compiling can take minutes.
        self._compiler = threading.Thread(target=_set_result, args=(compile_, compiled), name="compiler", daemon=True)
        self._compiler.start()
        try:
            info = await self._serve(model.use_compiled, *await asyncio.wrap_future(compiled))
        except Exception as error:  # a faster path that fails must not affect serving
            self.metrics.set_compilation("failed")
            log.error(
                "%s; eager networks keep serving", error, exc_info=None if isinstance(error, StartupError) else error
            )
        else:
            log.info("compiled %d calls in %.1f s; new images use them", info.compiled_calls, info.compile_seconds)

    async def _with_content_filter(self, info: ModelInfo, first: NDArray[np.uint8]) -> ModelInfo:
        """Run the content filter on the first image and return `info` with its name, since it decides bytes too."""
        if self._screening is None:
            return info
        try:
            await asyncio.to_thread(self._screening.rejects, first)
        except Exception as error:  # an operator's own filter may raise anything
            raise WarmUpError(f"the content filter cannot judge the first image: {error}") from error
        found = self._screening.info
        version = {"content_filter": f"{found.name} from {found.threshold:g}"}
        environment = replace(info.environment, versions={**info.environment.versions, **version})
        return replace(info, content_filter=found, environment=environment)

    async def _warm_up(self, request: ImageRequest) -> NDArray[np.uint8]:
        """Generate an image like most requests: it allocates memory, measures the calls and proves the weights.

        It is the reference image, whose hash says whether two processes compute the same.
        """
        loop = asyncio.get_running_loop()
        pixels: list[NDArray[np.uint8]] = []
        ended: asyncio.Queue[Finished | Failed] = asyncio.Queue()

        def deliver(event: Event) -> None:
            if isinstance(event, ImageReady):
                pixels.append(event.pixels)
            elif isinstance(event, Finished | Failed):
                loop.call_soon_threadsafe(ended.put_nowait, event)

        self.engine.submit(Submission("warm-up", request), deliver)
        terminal = await ended.get()
        if isinstance(terminal, Failed):
            raise WarmUpError(f"the model could not make its first image: {terminal.error}") from terminal.error
        return pixels[0]

    async def watch_device(self) -> None:
        """Watch the model's calls; if one hangs, end all calls with an error, admit no more and raise DeviceHung."""
        timeout = self._settings.device_timeout_seconds
        call = CallAge(timeout / _CHECKS)
        while (age := call.update(self.engine.busy)) < timeout:
            await asyncio.sleep(timeout / _CHECKS)
        self._lost = True
        self.engine.abandon()
        self.metrics.set_state("lost")
        raise DeviceHung(f"the device has not responded for {age:.0f} s; start a new process, and check the device")

    def drain(self) -> None:
        """Admit no more calls; jobs that are admitted go on."""
        self.metrics.set_state("draining")
        self.engine.drain()

    async def wait_until_idle(self) -> None:
        """Wait until no job runs and no call is open."""
        await self.frontend.wait_until_idle()

    def stop(self) -> None:
        """End every job with an error."""
        self.engine.stop()

    async def close(self) -> bool:
        """Wait for the model call in flight, unless it hangs, and return whether it and compiling have ended.

        Call `stop` first.
        """
        ended = await asyncio.to_thread(self.engine.join, 0 if self._lost else _DEVICE_SECONDS)
        if self._compiler is not None:
            ended = ended and not self._compiler.is_alive()
        self._log_totals()
        if self._traces is not None:
            await asyncio.to_thread(self._traces.stop)
        return ended

    def _log_totals(self) -> None:
        """Log the totals of all jobs but the warm-up, if the server came so far."""
        if self._warm_up_totals is None:
            return
        totals = self.engine.statistics()
        outcomes = totals.outcomes - self._warm_up_totals.outcomes
        eta = f", ETA off by {100 * totals.eta_error:.0f} % (median)" if totals.eta_error >= 0 else ""
        jobs = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())) or "none"
        log.info(
            "stopped; jobs: %s; device time %.1f s, %.3f s of it wasted%s",
            jobs,
            totals.device - self._warm_up_totals.device,
            self.metrics.wasted_seconds,
            eta,
        )


def _reference_request(info: ModelInfo) -> ImageRequest:
    """Return the request of the reference image."""
    return default_request(info, "a photo of a cat")


def _set_result(call: Callable[[], Any], result: "Future[Any]") -> None:
    try:
        result.set_result(call())
    except Exception as error:  # noqa: BLE001  # raised again where the result is awaited
        result.set_exception(error)


def _prepare_cpu_kernels(settings: Settings) -> None:
    """Find or build the C++ kernels in a thread, if the model probably needs them; importing torch takes longer."""
    is_cpu = settings.device == "cpu" or (settings.device == "auto" and not Path("/dev/nvidiactl").exists())
    is_fp32 = settings.precision in ("auto", "fp32")
    if is_cpu and is_fp32 and settings.compile != "off" and not settings.offload and cpu_library.can_run_here():

        def prepare() -> None:
            with contextlib.suppress(BuildError):  # which the model's own attempt reports
                cpu_library.load(settings.compile_cache)

        threading.Thread(target=prepare, name="build kernels", daemon=True).start()


def _name_folder_for_torch() -> None:
    """Set TORCHINDUCTOR_CACHE_DIR to a folder that exists if torch could not create its own, as it does on import."""
    try:
        Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("no folder is writable, so torch compiles nothing; set TMPDIR (%s)", error.strerror)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.sep


def load(settings: Settings) -> AnyServedModel:
    """Load the ensemble that the settings name. Raises StartupError."""
    _prepare_cpu_kernels(settings)
    with contextlib.closing(checkpoint.inspect(*settings.experts)) as experts:
        experts.hasher.start()
        _name_folder_for_torch()
        # Imported on the device thread, since torch takes seconds and the port is open by then.
        from server import model

        before_imports.resume_garbage_collection()
        return model.load(
            experts,
            settings.device,
            settings.precision,
            settings.model_name,
            max_batch=settings.max_batch,
            overlap=settings.overlap,
            compile=settings.compile,
            compile_cache=settings.compile_cache,
            compile_while_serving=settings.compile_while_serving,
            compile_sizes=settings.sizes_to_compile,
            preview_decoder=settings.preview_decoder,
            offload=settings.offload,
        )
