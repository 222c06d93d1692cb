"""The engine with its model, and the frontend above it: the part that every way of serving has in common.

`python -m server` puts a port before it (lifecycle.py), Ray Serve its own ingress (deploy/ray).
"""

import asyncio
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from server import starting
from server.api import auth, content_filter
from server.api.decode_errors import DecodeErrorInterceptor
from server.api.frontend import Frontend
from server.domain import ImageRequest, ModelInfo, default_request
from server.engine.engine import Engine
from server.engine.events import Event, Failed, Finished, ImageReady, Observation
from server.engine.interface import AnyServedModel, Submission
from server.engine.scheduling import Order
from server.ensemble import checkpoint
from server.errors import DeviceHung, StartupError, WarmUpError
from server.observability.interceptor import TelemetryInterceptor
from server.observability.metrics import LiveCollector, Metrics
from server.observability.traces import traces_from_environment
from server.settings import Settings

log = logging.getLogger(__name__)

_LOOKS = 20  # at the device, in the time after which it is given up


class Silence:
    """How long the call in flight has not returned, without the time for which this process itself was paused.

    A process that is stopped (SIGSTOP, a frozen container, a paused virtual machine) makes no progress, and its clock
    goes on. A check every `interval` seconds notices: the time between two checks is then much longer.
    """

    def __init__(self, interval: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._longest = 2 * interval  # that counts between two looks; a busy machine is late by less
        self._clock = clock
        self._looked = clock()
        self._silent = 0.0

    def after_look(self, busy: float) -> float:
        """Seconds of silence, when the call in flight began `busy` seconds ago by the clock, or 0 between calls."""
        now = self._clock()
        self._silent = min(busy, self._silent + min(now - self._looked, self._longest))
        self._looked = now
        return self._silent


class Runtime:
    """All of a service but its port. `load` brings the model and is called on the device thread.

    Raises CredentialsError, ContentFilterError, or whatever making a content filter raised.
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
        """The file of tokens, None where calls need none."""
        self.interceptors: list[grpc.aio.ServerInterceptor] = [
            TelemetryInterceptor(self.metrics, self._traces),
            *gates,
            DecodeErrorInterceptor(),
        ]
        """What calls go through. The first sees every call, those that the others turn away included."""
        self._compiling: asyncio.Task[None] | None = None
        self._compiler: threading.Thread | None = None

    def _observe(self, observation: Observation) -> None:
        self.metrics.observe(observation)
        if self._traces is not None:
            self._traces.observe(observation)

    def serve_metrics(self) -> None:
        """Serve metrics to Prometheus, where the settings name an address for it. Raises BindError."""
        if self._settings.metrics_listen is None:
            return
        self.metrics.registry.register(LiveCollector(self.engine, lambda: self.frontend.detached))
        address = self.metrics.listen(self._settings.metrics_listen)
        log.info("metrics on http://%s/metrics", address)

    async def open(self) -> ModelInfo:
        """Load the model, make one real image, and admit calls from then on; compile meanwhile, if that is so set.

        Raises WarmUpError, or whatever loading the model raised.
        """
        model = await asyncio.wrap_future(self.engine.start(self._load))
        info = model.info
        self.metrics.set_model(info)
        self.metrics.set_state("warming_up")
        log.info("loaded %s on %s in %s; warming up", info.name, info.device, info.precision)
        first = await self._warm_up(_reference(info))
        info = await self._serve(model, info, first)
        if self._settings.compile_while_serving:
            self._compiling = asyncio.create_task(self._compile(model))
        return info

    async def _serve(self, model: AnyServedModel, info: ModelInfo, first: NDArray[np.uint8]) -> ModelInfo:
        """Have images made as the info says, of which this is the reference image; the info, which tells that, too."""
        reference = hashlib.sha256(first.tobytes()).hexdigest()
        info = replace(info, environment=replace(info.environment, reference=reference))
        info = await self._screened(info, first)
        model.info = info
        self.frontend.open(info)
        self.metrics.set_model(info)
        return info

    async def _compile(self, model: AnyServedModel) -> None:
        """Compile beside what is served. Where that fails, images are made as before."""
        log.info("compiling; meanwhile images are made by calls that are not compiled")
        self.metrics.set_compilation("compiling")
        made: Future[tuple[ModelInfo, NDArray[np.uint8]]] = Future()
        made.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        compile_ = partial(model.compile, _reference(model.info))
        # Not the event loop's own threads, since nobody may wait for this one: compiling can take minutes.
        self._compiler = threading.Thread(target=_keep, args=(compile_, made), name="compiler", daemon=True)
        self._compiler.start()
        try:
            info = await self._serve(model, *await asyncio.wrap_future(made))
        except Exception as error:  # the wall between what would be faster and what is served
            self.metrics.set_compilation("failed")
            told = None if isinstance(error, StartupError) else error
            log.error("%s; images are still made by calls that are not compiled", error, exc_info=told)
        else:
            log.info(
                "compiled %d calls in %.1f s; images that begin now are made by them",
                info.compiled_calls, info.compile_seconds,
            )  # fmt: skip

    async def _screened(self, info: ModelInfo, first: NDArray[np.uint8]) -> ModelInfo:
        """The info with what judges images, which decides their bytes too; it has judged the first."""
        if self._screening is None:
            return info
        try:
            await asyncio.to_thread(self._screening.rejects, first)
        except Exception as error:  # an operator's own code, which may raise anything
            raise WarmUpError(f"the content filter cannot judge the first image: {error}") from error
        found = self._screening.info
        told = {"content_filter": f"{found.name} from {found.threshold:g}"}
        environment = replace(info.environment, versions={**info.environment.versions, **told})
        return replace(info, content_filter=found, environment=environment)

    async def _warm_up(self, request: ImageRequest) -> NDArray[np.uint8]:
        """Make one real image as most callers will ask for it: compiles, allocates, measures, proves the weights.

        It is the reference image: what this process computes, measured.
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
        """Raises DeviceHung when a call of the model does not come back; no more calls are admitted then.

        The calls that are under way fail with `engine.abandon`, which is for the one who awaits this.
        """
        patience = self._settings.device_timeout_seconds
        silence = Silence(patience / _LOOKS)
        while (silent := silence.after_look(self.engine.busy)) < patience:
            await asyncio.sleep(patience / _LOOKS)
        raise DeviceHung(f"the device has not answered for {silent:.0f} s; it needs a new process, or a look")

    async def close(self, device_seconds: float) -> bool:
        """Let go of the device, within so many seconds, and of what compiles, at once; whether their calls had ended.

        The engine is stopped before.
        """
        let_go = await asyncio.to_thread(self.engine.join, device_seconds)
        if self._compiler is not None:
            let_go = let_go and not self._compiler.is_alive()
        done = self.engine.statistics()
        foretold = f", times foretold to {100 * done.eta_error:.0f} % (median error)" if done.eta_error >= 0 else ""
        log.info(
            "stopped; %s, %.1f s of the device, %.3f s of them wasted%s",
            ", ".join(f"{count} {outcome}" for outcome, count in sorted(done.outcomes.items())) or "no jobs",
            done.device, self.metrics.wasted_seconds, foretold,
        )  # fmt: skip
        if self._traces is not None:
            await asyncio.to_thread(self._traces.stop)
        return let_go


def _reference(info: ModelInfo) -> ImageRequest:
    """What shows how a process computes."""
    return default_request(info, "a photo of a cat")


def _keep(call: Callable[[], Any], result: "Future[Any]") -> None:
    try:
        result.set_result(call())
    except Exception as error:  # noqa: BLE001  # whatever it is, who waits for it must know
        result.set_exception(error)


def _name_folder_for_torch() -> None:
    """Name a folder that is there where torch could not make its own, which it does as soon as it is imported."""
    try:
        Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("there is no folder to write to, so torch compiles nothing; TMPDIR names one (%s)", error.strerror)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.sep


def load(settings: Settings) -> AnyServedModel:
    """The ensemble that the settings name. Raises CheckpointError."""
    with closing(checkpoint.inspect(*settings.experts)) as experts:
        _name_folder_for_torch()
        # Imported on the device thread: torch takes seconds, and the port should be open by then.
        from server import model

        starting.resume_garbage_collection()
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
            warm_up=settings.sizes_to_compile,
            preview_decoder=settings.preview_decoder,
            offload=settings.offload,
        )
