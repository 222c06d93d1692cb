"""Who runs next: admission, queue, deadlines, cancellation, events.

One thread, here called the device thread, makes every call of the model. A job is a script of such calls; between any
two of them the thread looks at the whole queue again, so a cancelled, expired or abandoned job costs the device no more
than the call in flight. Nothing here knows of torch or gRPC: the model is a protocol of five calls, and events leave
through a callback.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from server.domain import ImageRequest, ModelCard, Stage, Warning

log = logging.getLogger(__name__)

_LEAST_WAIT = 0.1  # seconds before a refused caller is asked back: less would be a busy loop over the network


class Conditioning(Protocol):
    """The encoded prompts of one request."""

    @property
    def warnings(self) -> Sequence[Warning]: ...


class Trajectory(Protocol):
    """One image on its way from noise to latents: `stages` has BASE or REFINER for every network call, in order.

    Trajectories whose `batch_key` is equal may share their next network call. It changes with the expert, and there
    is none after the last call.
    """

    @property
    def stages(self) -> Sequence[Stage]: ...
    @property
    def batch_key(self) -> Hashable: ...
    @property
    def warnings(self) -> Sequence[Warning]: ...


class Model(Protocol):
    """What the engine asks of an ensemble. Each call returns when the device has finished it.

    `step` makes one network call for 1 to `max_batch` trajectories of one `batch_key` and moves each on by it. An
    image's bytes do not depend on who shares its calls, but on `max_batch`: each call takes the time and the memory of
    a full one. `step` raises StepFailed when some failed and the others have moved on. Whatever else it raises, none
    has moved and each can be stepped again; after OutOfMemory, `limit_batch` makes all later calls smaller.

    `preview` is a small RGB picture of what the trajectory is about to become. It alone may be called from another
    thread, also while `step` has the same trajectory: it then shows the state before that step or the one after.
    """

    @property
    def card(self) -> ModelCard: ...
    @property
    def max_batch(self) -> int: ...
    def limit_batch(self, images: int) -> None: ...
    def encode(self, request: ImageRequest) -> Any: ...
    def plan(self, request: ImageRequest, conditioning: Any, seed: int) -> Any: ...
    def step(self, trajectories: Sequence[Any]) -> None: ...
    def preview(self, trajectory: Any) -> NDArray[np.uint8]: ...
    def decode(self, trajectory: Any) -> NDArray[np.uint8]: ...


class EngineError(Exception):
    """A job was not admitted, or ended without its images."""


class Draining(EngineError):
    """The server is on its way out."""


class QueueFull(EngineError):
    """No room in the queue; `retry_after` seconds from now there should be."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(EngineError):
    """The deadline passed before the job was finished."""


class Cancelled(EngineError):
    """Nobody waits for the job any more."""


class ModelFailed(EngineError):
    """The model raised on this job. The cause is in the log, and only there."""


@dataclass(frozen=True)
class Queued:
    """Admitted: `position` jobs are ahead, `eta` seconds until the last image."""

    position: int
    eta: float


@dataclass(frozen=True)
class Progress:
    """Call number `step` of `steps` in `stage` of image `index` has ended; `eta` seconds until the last image."""

    index: int
    stage: Stage
    step: int
    steps: int
    eta: float


@dataclass(frozen=True)
class Preview:
    """What image `index` is about to become, a small RGB picture, after `step` of `steps` calls of both experts."""

    index: int
    step: int
    steps: int
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class ImageReady:
    """Image `index` is finished: RGB pixels of shape (height, width, 3)."""

    index: int
    seed: int
    pixels: NDArray[np.uint8]
    base_calls: int
    refiner_calls: int


@dataclass(frozen=True)
class Finished:
    """All images are out. `waited` seconds from admission to the first call, `ran` seconds from there to the last."""

    warnings: tuple[Warning, ...]
    waited: float
    ran: float


@dataclass(frozen=True)
class Failed:
    """The job ended without finishing."""

    error: EngineError


Event = Queued | Progress | Preview | ImageReady | Finished | Failed


@dataclass(frozen=True)
class _Call:
    """One call of the model: which, for whom, and how to make it."""

    stage: Stage
    make: Callable[[], Any]
    index: int = 0
    step: int = 1
    steps: int = 1


@dataclass(eq=False)
class Job:
    """One admitted request, under the `name` that the log knows it by.

    `deliver` takes its events: called from any thread, never blocking, exactly one terminal event (Finished or Failed)
    last. `deadline` is on the engine's clock, infinite for none.
    """

    name: str
    request: ImageRequest
    deliver: Callable[[Event], None]
    deadline: float
    admitted: float
    script: Generator[_Call, Any, tuple[Warning, ...]] | None = None
    call: _Call | None = None
    started: float | None = None
    ending: EngineError | None = None
    calls_made: int = 0
    left: dict[Stage, int] = field(default_factory=dict)


class Engine:
    """The device thread and its queue.

    `clock` is injected so that tests need no waiting. The order is first come, first served: the queue's head runs.
    """

    def __init__(self, max_queue: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_queue = max_queue
        self._clock = clock
        self._jobs: list[Job] = []
        self._changed = threading.Condition()
        self._draining = False
        self._stopping = False
        self._times = CallTimes()
        self._thread: threading.Thread | None = None

    def start(self, load: Callable[[], Model]) -> "Future[ModelCard]":
        """Start the device thread, which loads the model and then serves the queue.

        The model is loaded where it is used, since compiled code and CUDA graphs belong to one thread. The future
        holds the model's card, or what `load` raised; then the thread has ended.
        """
        loaded: Future[ModelCard] = Future()
        loaded.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        self._thread = threading.Thread(target=self._run, args=(load, loaded), name="device", daemon=True)
        self._thread.start()
        return loaded

    def submit(
        self,
        name: str,
        request: ImageRequest,
        deliver: Callable[[Event], None],
        timeout: float = math.inf,
        caller: str = "",
        priority: int = 0,
        preview_interval: int = 0,
    ) -> Job:
        """Admit a request that must end within `timeout` seconds.

        `caller` is who asks, between whom the device is shared fairly. A higher `priority` goes earlier. Every so many
        network calls there is a Preview, with a `preview_interval` of 0 never.
        Raises Draining or QueueFull; later troubles arrive as Failed.
        """
        with self._changed:
            if self._draining:
                raise Draining("the server is shutting down; try another one, or again when it is back")
            if len(self._jobs) >= self._max_queue:
                wait = max(_LEAST_WAIT, self._seconds_left(self._jobs[0]))
                raise QueueFull(f"{self._max_queue} requests are waiting already; try again in {wait:.1f} s", wait)
            now = self._clock()
            job = Job(name, request, deliver, deadline=now + timeout, admitted=now, left=_expected_calls(request))
            self._jobs.append(job)
            deliver(Queued(position=len(self._jobs) - 1, eta=self._eta(job)))
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """End a job after the call in flight, if it has not ended yet."""
        with self._changed:
            job.ending = job.ending or Cancelled("the call was cancelled")
            self._changed.notify()

    def drain(self) -> None:
        """Admit nothing more; what is admitted goes on."""
        with self._changed:
            self._draining = True

    def stop(self) -> None:
        """Admit nothing more and end every job after the call in flight. `join` waits until that has happened."""
        with self._changed:
            self._draining = self._stopping = True
            for job in self._jobs:
                job.ending = job.ending or Draining("the server shut down before the images were finished")
            self._changed.notify()

    def join(self, timeout: float) -> bool:
        """Wait for the device thread to end; False if it still runs after `timeout` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)
        return self._thread is None or not self._thread.is_alive()

    # The device thread.

    def _run(self, load: Callable[[], Model], loaded: "Future[ModelCard]") -> None:
        try:
            model = load()
        except Exception as error:  # noqa: BLE001  # whatever it is, the thread that waits for it must know
            loaded.set_exception(error)
            return
        loaded.set_result(model.card)
        while (job := self._next()) is not None:
            self._advance(job, model)

    def _next(self) -> Job | None:
        """End what must end, then wait for the job whose call is made next; None once stopped."""
        with self._changed:
            while True:
                self._sweep()
                if self._stopping:
                    return None
                if self._jobs:
                    return self._jobs[0]
                self._changed.wait()

    def _sweep(self) -> None:
        now = self._clock()
        for job in list(self._jobs):
            if job.ending is None and now >= job.deadline:
                job.ending = DeadlineExceeded("the deadline passed before the images were finished")
            if job.ending is not None:
                self._end(job, Failed(job.ending))

    def _advance(self, job: Job, model: Model) -> None:
        """Make the job's next call."""
        started = self._clock()
        try:
            if job.script is None or job.call is None:
                job.started = started
                job.script = _script(job, model)
                job.call = next(job.script)
            call, result = job.call, job.call.make()
            job.calls_made += 1
            with self._changed:
                job.left[call.stage] -= 1
                self._times.record(call.stage, job.request, self._clock() - started)
            job.deliver(Progress(call.index, call.stage, call.step, call.steps, self._seconds_left(job)))
            job.call = job.script.send(result)
        except StopIteration as finished:
            now = self._clock()
            self._end(job, Finished(finished.value, job.started - job.admitted, now - job.started))  # type: ignore[operator]
        except Exception:  # the wall between one job's failure and all the others
            log.exception("%s: the model failed", job.name)
            self._end(job, Failed(ModelFailed("the model failed on this request; the server's log has the cause")))

    def _end(self, job: Job, terminal: Finished | Failed) -> None:
        with self._changed:
            self._jobs.remove(job)
        job.script = job.call = None  # lets go of latents and conditioning
        outcome = "finished" if isinstance(terminal, Finished) else type(terminal.error).__name__
        log.info("%s: %s after %d model calls", job.name, outcome, job.calls_made)
        job.deliver(terminal)

    def _eta(self, job: Job) -> float:
        ahead = self._jobs[: self._jobs.index(job) + 1]
        return sum(self._seconds_left(each) for each in ahead)

    def _seconds_left(self, job: Job) -> float:
        return sum(count * self._times.expect(stage, job.request) for stage, count in job.left.items())


def _script(job: Job, model: Model) -> Generator[_Call, Any, tuple[Warning, ...]]:
    """All calls of one job, in order; each yield gets its call's result. Returns the warnings."""
    request = job.request
    conditioning: Conditioning = yield _Call(Stage.ENCODE, partial(model.encode, request))
    warnings = list(conditioning.warnings)
    for index, seed in enumerate(request.seeds):
        trajectory: Trajectory = model.plan(request, conditioning, seed)
        warnings += (warning for warning in trajectory.warnings if warning not in warnings)
        calls = {stage: trajectory.stages.count(stage) for stage in (Stage.BASE, Stage.REFINER)}
        images_left = len(request.seeds) - index
        job.left |= {stage: images_left * count for stage, count in calls.items()}
        done = dict.fromkeys(calls, 0)
        for stage in trajectory.stages:
            done[stage] += 1
            yield _Call(stage, partial(model.step, [trajectory]), index, done[stage], calls[stage])
        pixels = yield _Call(Stage.DECODE, partial(model.decode, trajectory), index)
        job.deliver(ImageReady(index, seed, pixels, calls[Stage.BASE], calls[Stage.REFINER]))
    return tuple(warnings)


def _expected_calls(request: ImageRequest) -> dict[Stage, int]:
    """Calls per stage as far as known before planning: a second-order scheduler turns out to need nearly twice them."""
    images = len(request.seeds)
    base = round(request.steps * request.high_noise_frac)
    return {
        Stage.ENCODE: 1,
        Stage.BASE: images * base,
        Stage.REFINER: images * (request.steps - base),
        Stage.DECODE: images,
    }


class CallTimes:
    """Measured seconds per call, by stage, pixels and rows: an exponential moving average.

    What was never measured is taken from the nearest size of the same stage, scaled by pixels and rows.
    """

    _WEIGHT = 0.2  # of the newest measurement

    def __init__(self) -> None:
        self._seconds: dict[Stage, dict[int, float]] = {}

    def record(self, stage: Stage, request: ImageRequest, seconds: float) -> None:
        sizes = self._seconds.setdefault(stage, {})
        size = _work(request)
        sizes[size] = seconds if size not in sizes else sizes[size] + self._WEIGHT * (seconds - sizes[size])

    def expect(self, stage: Stage, request: ImageRequest) -> float:
        """Expected seconds of one call; 0 before anything of this stage was measured."""
        sizes = self._seconds.get(stage)
        if not sizes:
            return 0.0
        size = _work(request)
        nearest = min(sizes, key=lambda known: abs(math.log(known / size)))
        return sizes[nearest] * size / nearest


def _work(request: ImageRequest) -> int:
    """Pixels times rows: guidance runs a second row, unconditional, beside the first."""
    return request.width * request.height * (2 if request.guidance_scale > 1 else 1)
