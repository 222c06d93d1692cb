"""Runs the schedule: admission, the device thread, deadlines, cancellation, failures, events.

One thread, here called the device thread, makes the calls of the model. A job is a script of such calls; between any
two of them the thread asks the schedule anew whose call is next, so a cancelled, expired or abandoned job costs the
device no more than the call in flight, and a short one need not wait for a long one; a GPU may have begun one more call
of those whose call was the last, not to wait for the answer. Where the device has room for two calls at once, prompts
are encoded and images decoded by a second thread, beside the steps of other jobs; prompts also ahead of their turn, as
many as a step has room for. Nothing here knows of torch or gRPC: the model is a protocol of a few calls, and events
leave through a callback.
"""

import contextvars
import heapq
import itertools
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any, TypeVar

from server.domain import Environment, ImageRequest, Notice, OutOfMemory, Stage, StepFailed, Warning
from server.engine.call_times import CallKind, CallTimes
from server.engine.events import (
    Cancelled,
    DeadlineExceeded,
    DeviceFull,
    DeviceLost,
    DeviceUnavailable,
    Draining,
    EngineError,
    Event,
    Failed,
    Finished,
    ImageReady,
    JobEnded,
    JobStarted,
    ModelCall,
    ModelFailed,
    Observe,
    Preview,
    PreviewDropped,
    Progress,
    Queued,
    ResourceExhausted,
    StageSpan,
    no_observer,
)
from server.engine.interface import AnyModel, Conditioning, Submission, Trajectory
from server.engine.scheduling import Forecast, Order, QueueLimits, Reason, Refusal, Schedule
from server.engine.task import ImageTask

log = logging.getLogger(__name__)

SomeModel = TypeVar("SomeModel", bound=AnyModel)

_LEAST_WAIT = 0.1  # seconds before a refused caller is asked back: less would be a busy loop over the network
_RENEWED = 0.5  # seconds between looks at what waiting jobs were told
_NOTABLE = 0.1  # a share of the time left, by which it must have changed to be told anew
_SIDE_QUEUE = 2  # calls that may wait for the side thread: it need not idle, and few finished latents wait
_AGAIN = 60.0  # seconds until images of a size are tried again that did not fit in the device's memory
_EXPERTS = (Stage.BASE, Stage.REFINER)
_DISTURBED = Warning(
    Notice.BATCH_REDUCED,
    "",
    "memory ran out on the way, and the rest was computed in smaller batches, which can change an image's last bits",
)


@dataclass(frozen=True)
class _Call:
    """One call of the model for one job: whatever `make` does or, of an expert, a step of `trajectories`.

    The first of these is image `index`. With this call, each image will have had `calls` of both experts.
    """

    stage: Stage
    index: int = 0
    step: int = 1
    steps: int = 1
    calls: int = 0
    trajectories: Sequence[Trajectory] = ()
    make: Callable[[], Any] = lambda: None


@dataclass(eq=False)
class Job:
    """One admitted request.

    `deliver` takes its events: called from any thread, never blocking, exactly one terminal event (Finished or Failed)
    last. Times are on the engine's clock.
    """

    submission: Submission
    deliver: Callable[[Event], None]
    task: ImageTask
    script: Generator[_Call, Any, tuple[tuple[Warning, ...], Environment]] | None = None
    call: _Call | None = None
    started: float | None = None
    ending: EngineError | None = None
    ended: float = math.inf  # when `ending` was set
    wasted: float = 0.0  # device seconds after that
    calls_made: int = 0
    disturbed: bool = False  # whether the batch was made smaller while it ran
    predicted_end: float = 0.0  # when it should end, as was said at its admission
    told: Queued | None = None
    told_at: float = 0.0
    spans: list[StageSpan] = field(default_factory=list)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    def within(self, do: Callable[..., None], *args: Any, **options: Any) -> None:
        """Log or tell something as the call that submitted the job would."""
        self.context.copy().run(do, *args, **options)  # a copy, since only one thread at a time can be in a context


@dataclass
class Statistics:
    """What an engine has done so far. Times in seconds; of calls that ran beside one another each counts whole.
    `eta_error` is relative to what a job then took, the median of the last thousand that finished. Of the jobs
    admitted, so many are `waiting` for their first call and so many `running`."""

    waiting: int = 0
    running: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    device: float = 0.0
    wasted: float = 0.0
    eta_error: float = math.nan


class Engine:
    """The device thread, the one beside it, and what waits for them.

    `clock` is injected so that tests need no waiting. Admission is bounded by `limits`, the order is the schedule's.
    `observe` is told what is not for the callers.
    """

    def __init__(
        self,
        limits: QueueLimits,
        order: Order = Order.SHORTEST,
        clock: Callable[[], float] = time.monotonic,
        observe: Observe = no_observer,
    ) -> None:
        self._clock = clock
        self._observe = observe
        self._times = CallTimes()
        self._schedule = Schedule(limits, self._times, order)
        self._jobs: dict[ImageTask, Job] = {}
        self._changed = threading.Condition()
        self._refusing: EngineError | None = None
        self._stopping = False
        self._ending: set[Job] = set()
        self._deadlines: list[tuple[float, int, Job]] = []
        self._numbers = itertools.count()
        self._renewed = -math.inf
        self._max_batch = 1
        self._calls_per_step: dict[str, float] = {}  # by scheduler, as planning showed
        self._too_large: tuple[int, float] = (0, -math.inf)  # pixels times rows that had no room at all, until when
        self._began: dict[int, float] = {}  # when the calls in flight began, by thread
        self._in_flight: dict[int, Sequence[Job]] = {}  # the jobs of these calls, by thread
        self._overlapped: set[int] = set()  # threads whose call in flight has had another beside it
        self._overlap_from = math.inf  # when calls may be handed to the side thread (again)
        self._side_queue: deque[Job] = deque()
        self._pending_progress: list[tuple[Job, _Call]] = []  # what was made and is told of beside the next call
        self._side_job: Job | None = None  # whose call is in flight there
        self._ahead: set[Job] = set()  # whose prompts have been given to it, and whose first step is still to come
        self._outcomes: Counter[str] = Counter()
        self._device_seconds = self._wasted_seconds = 0.0
        self._eta_errors: deque[float] = deque(maxlen=1000)
        self._previews = _Previews(self._deliver, observe)
        self._thread: threading.Thread | None = None

    def start(self, load: Callable[[], SomeModel]) -> "Future[SomeModel]":
        """Start the device thread, which loads the model and then serves the queue.

        The model is loaded where it is used, since OpenMP's threads and CUDA's handles are each thread's own. The
        future holds the model, or what `load` raised; then the thread has ended.
        """
        loaded: Future[SomeModel] = Future()
        loaded.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        self._thread = threading.Thread(target=self._run, args=(load, loaded), name="device", daemon=True)
        self._thread.start()
        return loaded

    def submit(self, submission: Submission, deliver: Callable[[Event], None]) -> Job:
        """Admit a request; `deliver` takes its events, as Job says.

        Raises Draining, DeviceUnavailable, ResourceExhausted or DeadlineExceeded; later troubles arrive as Failed.
        """
        request = submission.request
        with self._changed:
            if self._refusing is not None:
                raise self._refusing
            now = self._clock()
            task = ImageTask(
                caller=submission.caller.name,
                calls=[(_kind(request, Stage.ENCODE), 1), *self._expected_calls(request)],
                deadline=now + submission.timeout,
                priority=submission.priority,
                pixels=request.width * request.height * len(request.seeds),
                bytes=_memory(request),
                jobs_per_caller=submission.caller.jobs,
            )
            self._check(task, request, now)
            job = Job(submission, deliver, task)
            self._schedule.add(task, now)
            self._jobs[task] = job
            if submission.timeout < math.inf:
                heapq.heappush(self._deadlines, (task.deadline, next(self._numbers), job))
            forecast = self._schedule.forecast(task, now)
            self._tell(job, forecast, now)
            job.predicted_end = now + forecast.eta
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """End a job after the call in flight, if it has not ended yet."""
        with self._changed:
            self._end_soon(job, Cancelled("the call was cancelled"))
            self._changed.notify_all()

    def drain(self) -> None:
        """Admit nothing more; what is admitted goes on."""
        with self._changed:
            self._refusing = self._refusing or Draining(
                "the server is shutting down; try another one, or again when it is back"
            )

    def stop(self) -> None:
        """Admit nothing more and end every job after the call in flight. `join` waits until that has happened."""
        self.drain()
        with self._changed:
            self._stopping = True
            for job in self._jobs.values():
                self._end_soon(job, Draining("the server shut down before the images were finished"))
            self._changed.notify_all()

    def abandon(self) -> None:
        """Fail every job now, because the call in flight will not come back. The device thread is left where it is.

        The jobs of calls in flight end with DeviceLost, since one of them may be why; all others DeviceUnavailable.
        """
        with self._changed:
            self._stopping = True
            self._refusing = DeviceUnavailable("the device does not answer; this server is about to end")
            suspects = {job for jobs in self._in_flight.values() for job in jobs}
            for job in list(self._jobs.values()):
                lost = DeviceLost(
                    "the device does not answer since a call for this request; this server is about to end"
                )
                self._end(job, Failed(lost if job in suspects else self._refusing))

    def join(self, timeout: float) -> bool:
        """Wait for the device thread to end; False if it still runs after `timeout` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)
        return self._thread is None or not self._thread.is_alive()

    @property
    def admits(self) -> bool:
        """Whether jobs are admitted, as far as there is room."""
        return self._refusing is None

    @property
    def busy(self) -> float:
        """Seconds that the call in flight has taken so far, the longer of two; 0 between calls."""
        with self._changed:
            now = self._clock()
            return max((now - began for began in self._began.values()), default=0.0)

    def statistics(self) -> Statistics:
        with self._changed:
            running = sum(job.script is not None for job in self._jobs.values())
            return Statistics(
                waiting=len(self._jobs) - running,
                running=running,
                outcomes=self._outcomes.copy(),
                device=self._device_seconds,
                wasted=self._wasted_seconds,
                eta_error=median(self._eta_errors) if self._eta_errors else math.nan,
            )

    # Admission.

    def _check(self, task: ImageTask, request: ImageRequest, now: float) -> None:
        """Raises ResourceExhausted if the task cannot be admitted now, DeadlineExceeded if it never can in its time."""
        size, until = self._too_large
        if now < until and _rows(request) * request.width * request.height >= size:
            raise ResourceExhausted(
                f"{request.width} x {request.height} pixels did not fit in the device's memory a moment ago; ask for "
                f"fewer, or try again in {until - now:.0f} s",
                until - now,
            )
        if (refusal := self._schedule.refusal(task, now)) is not None:
            retry_after = max(_LEAST_WAIT, refusal.retry_after)
            when = f"; try again in {retry_after:.1f} s" if retry_after < math.inf else ", were it alone"
            if refusal.reason is Reason.DEADLINE and retry_after == math.inf:
                raise DeadlineExceeded(self._why(refusal, task) + when)  # no room that others leave would help
            raise ResourceExhausted(self._why(refusal, task) + when, retry_after)

    def _why(self, refusal: Refusal, task: ImageTask) -> str:
        limits, work = self._schedule.limits, f"{self._schedule.work:.1f} s of the device"
        match refusal.reason:
            case Reason.JOBS:
                return f"{limits.jobs} requests are waiting already, for {work}"
            case Reason.JOBS_PER_CALLER:
                return f"{self._schedule.jobs_per_caller(task):.0f} requests of this caller are waiting already"
            case Reason.PIXELS:
                return f"the images that wait would have more than {limits.pixels:.0f} pixels with these"
            case Reason.BYTES:
                return f"the requests that wait would need more than {limits.bytes:.0f} bytes with this one"
            case Reason.DEADLINE:
                return f"the deadline cannot be met: the last image could be there in {refusal.finish:.1f} s"
            case Reason.OTHERS:
                count = len(refusal.late)
                return f"{count} admitted request{'s' * (count > 1)} would miss a deadline for this one"

    def _expected_calls(self, request: ImageRequest) -> list[tuple[CallKind, int]]:
        """The calls of a job after the first, as far as known before it is planned."""
        per_step = self._calls_per_step.get(request.scheduler, 1.0)
        base = round(request.steps * request.high_noise_frac * per_step)
        refiner = round(request.steps * per_step) - base
        return _calls(request, {Stage.BASE: base, Stage.REFINER: refiner}, len(request.seeds), self._max_batch)

    # What waiting jobs are told.

    def _tell(self, job: Job, forecast: Forecast, now: float) -> None:
        job.told, job.told_at = Queued(forecast.position, forecast.eta), now
        job.deliver(job.told)

    def _renew(self) -> None:
        """Tell waiting jobs anew when they end, where that has changed."""
        now = self._clock()
        if now < self._renewed + _RENEWED:
            return
        for forecast in self._schedule.forecasts(now):
            job = self._jobs[forecast.task]
            if job.script is not None or job.told is None:
                continue
            expected = job.told.eta - (now - job.told_at)
            if forecast.position != job.told.position or abs(forecast.eta - expected) > _NOTABLE * forecast.eta:
                self._tell(job, forecast, now)
        self._renewed = self._clock()
        # With very many waiting, looking takes long; it must not become a notable share of the device's time.
        self._renewed += 20 * (self._renewed - now)

    # The threads that call the model.

    def _run(self, load: Callable[[], SomeModel], loaded: "Future[SomeModel]") -> None:
        try:
            model = load()
        except Exception as error:  # noqa: BLE001  # whatever it is, the thread that waits for it must know
            loaded.set_exception(error)
            return
        self._max_batch = model.max_batch
        side = threading.Thread(target=self._run_side, args=(model,), name="device side", daemon=True)
        if model.overlaps:
            self._overlap_from = -math.inf
            side.start()
        self._previews.start(model)
        loaded.set_result(model)
        while jobs := self._next(model):
            self._advance(jobs, model)
        if model.overlaps:
            side.join()
        self._previews.stop()

    def _run_side(self, model: AnyModel) -> None:
        """Make the calls that the device thread has handed over, one after the other, and move their jobs on."""
        while (job := self._next_on_side()) is not None:
            self._advance([job], model)
            with self._changed:
                self._side_job = None
                if job.ending is not None:
                    self._end(job, Failed(job.ending))
                self._schedule.resume(job.task)
                self._changed.notify_all()

    def _next_on_side(self) -> Job | None:
        """Wait for the job whose call the side thread makes next; none once stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._side_queue or self._stopping)
            if self._stopping:
                return None
            self._side_job = self._side_queue.popleft()
            self._call_begins([self._side_job])
            self._changed.notify_all()  # there is room for another
            return self._side_job

    def _next(self, model: AnyModel) -> list[Job]:
        """End what must end, then wait for the jobs whose call is made next; none once stopped."""
        with self._changed:
            while True:
                self._sweep()
                if self._stopping:
                    return []
                now = self._clock()
                tasks = self._schedule.choose(now)
                if tasks and tasks[0].kind.shared and model.max_batch > 1:
                    # The side thread encodes ahead, below; here a prompt would have to wait for it.
                    tasks = self._schedule.choose(now, model.max_batch, join=now < self._overlap_from)
                on_side = bool(tasks) and not tasks[0].kind.shared and now >= self._overlap_from
                if self._pending_progress and not (tasks and tasks[0].kind.shared):
                    self._flush_progress()  # no step comes next, beside which it could be told
                if not tasks or (on_side and len(self._side_queue) == _SIDE_QUEUE):
                    # Where too much waits for the side thread, the device is left to it: no step may add to that.
                    self._changed.wait()
                    continue
                self._renew()
                if on_side:
                    self._hand_over(tasks[0], model)
                    continue
                jobs = [self._begun(task, model) for task in tasks]
                self._ahead.difference_update(jobs)
                if now >= self._overlap_from and not self._side_queue and len(self._ahead) < model.max_batch:
                    for task in self._schedule.choose_ahead(Stage.ENCODE):
                        self._hand_over(task, model, ahead=True)
                self._call_begins(jobs)
                return jobs

    def _begun(self, task: ImageTask, model: AnyModel) -> Job:
        """The task's job, which has a call to make."""
        job = self._jobs[task]
        if job.script is None:
            job.started = self._clock()
            job.within(self._observe, JobStarted(job.started - task.admitted))
            job.script = _script(job, model, self._planned, self._deliver)
            job.call = next(job.script)
        return job

    def _hand_over(self, task: ImageTask, model: AnyModel, ahead: bool = False) -> None:
        """Let the side thread make the task's next call. With the lock held."""
        if task.kind.stage is Stage.ENCODE:
            self._ahead.add(self._jobs[task])
        self._schedule.hold(task, ahead)
        self._side_queue.append(self._begun(task, model))
        self._changed.notify_all()

    def _call_begins(self, jobs: Sequence[Job]) -> None:
        """Note that this thread begins a call for these jobs. With the lock held."""
        thread = threading.get_ident()
        if self._began:
            self._overlapped |= {thread, *self._began}
        self._began[thread] = self._clock()
        self._in_flight[thread] = jobs

    def _call_ends(self) -> None:
        """Note that this thread's call, if one is in flight, has ended. With the lock held."""
        self._began.pop(threading.get_ident(), None)
        self._in_flight.pop(threading.get_ident(), None)
        self._overlapped.discard(threading.get_ident())

    def _sweep(self) -> None:
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, job = heapq.heappop(self._deadlines)
            self._end_soon(job, DeadlineExceeded("the deadline passed before the images were finished"))
        for job in list(self._ending):
            assert job.ending is not None
            if job is not self._side_job:  # which ends after its call in flight
                self._end(job, Failed(job.ending))

    def _end_soon(self, job: Job, error: EngineError) -> None:
        if job.task in self._jobs and job.ending is None:
            job.ending, job.ended = error, self._clock()
            self._ending.add(job)
            if job in self._side_queue:
                self._side_queue.remove(job)

    def _advance(self, jobs: list[Job], model: AnyModel) -> None:
        """Make the next call of these jobs together, and move each on."""
        failures: dict[Job, Exception] = {}
        result = None
        began = self._clock()
        if trajectories := [(job, each) for job in jobs if job.call for each in job.call.trajectories]:
            failures = self._step(trajectories, model)
        else:
            (job,) = jobs
            assert job.call is not None
            self._flush_progress()
            try:
                result = job.call.make()
            except Exception as error:  # noqa: BLE001  # the wall between one job's failure and all the others
                if isinstance(error, OutOfMemory) and self._leave_to_one():
                    with self._changed:
                        self._call_ends()
                    return  # the same call will be chosen again
                failures = {job: error}
        self._account(jobs, began)
        for job in jobs:
            if job.call is None:  # abandoned meanwhile
                continue
            if job in failures:
                self._fail(job, failures[job])
            else:
                self._move_on(job, job.call, result)

    def _step(self, together: list[tuple[Job, Trajectory]], model: AnyModel) -> dict[Job, Exception]:
        """One network call for some trajectories; whose failed, and why.

        What fails for all of several is tried again for each half, so that what is wrong with one is not the end of the
        others. When memory runs out, this and all later calls are made smaller.
        """
        failures: dict[Job, Exception] = {}
        alike: dict[Hashable, list[tuple[Job, Trajectory]]] = {}
        for each in together:  # of one kind, and yet there are two of each for a while after a `compile`
            alike.setdefault(each[1].batch_key, []).append(each)
        waiting = list(alike.values())
        while waiting:
            some = waiting.pop()
            error: Exception | None = None
            if len(some) <= model.max_batch:
                try:
                    launched = model.launch([trajectory for _, trajectory in some])
                    self._flush_progress()  # while the device is busy
                    launched.wait()
                    continue
                except StepFailed as failed:
                    failures |= {some[place][0]: cause for place, cause in failed.failures.items()}
                    continue
                except Exception as raised:  # noqa: BLE001  # the wall between one job's failure and all the others
                    error = raised
            if isinstance(error, OutOfMemory) and self._leave_to_one():
                waiting.append(some)
            elif isinstance(error, OutOfMemory) and model.max_batch > 1:
                self._shrink(model)
                waiting.append(some)
            elif error is not None and len(some) == 1:
                failures[some[0][0]] = error
            else:
                half = len(some) // 2
                waiting += [some[half:], some[:half]]
        return failures

    def _leave_to_one(self) -> bool:
        """When memory has run out: whether another call was beside this thread's, which can then be made again alone.

        For a while no calls are handed to the side thread then, and the device thread waits here for the one in flight.
        """
        thread = threading.get_ident()
        with self._changed:
            if thread not in self._overlapped:
                return False
            self._overlap_from = self._clock() + _AGAIN
            while self._side_queue:
                self._schedule.resume(self._side_queue.popleft().task)
            if self._side_job is not None and threading.current_thread() is self._thread:
                self._changed.wait_for(lambda: self._side_job is None)
            self._overlapped.discard(thread)
        log.warning("memory ran out with two calls at once: one after the other for %.0f s", _AGAIN)
        return True

    def _shrink(self, model: AnyModel) -> None:
        """Let fewer images share a call, because memory has run out."""
        with self._changed:
            before, self._max_batch = model.max_batch, model.max_batch // 2
            model.limit_batch(self._max_batch)
            for job in self._jobs.values():
                job.disturbed = job.disturbed or job.script is not None
        log.warning("%d images did not fit in the device's memory together: %d from now on", before, self._max_batch)

    def _account(self, jobs: Sequence[Job], began: float) -> None:
        """Note what a call has cost, and whom."""
        with self._changed:
            now = self._clock()
            self._call_ends()
            self._schedule.record_call([job.task for job in jobs], now - began)
            self._device_seconds += now - began
            calls = [job.call for job in jobs if job.call]
            if calls:
                images = sum(max(1, len(call.trajectories)) for call in calls)
                self._observe(ModelCall(calls[0].stage, images, now - began))
            for job in jobs:
                job.calls_made += 1
                _stretch(job, began, now, (now - began) / len(jobs))
                if job.ending is not None:
                    job.wasted += (now - max(began, job.ended)) / len(jobs)

    def _move_on(self, job: Job, call: _Call, result: Any) -> None:
        """Find out which call is next, and have a step that was made told of while the device is busy again.

        To tell wakes other threads, and while they run this one cannot: the device would wait.
        """
        with self._changed:
            self._pending_progress.append((job, call))
            if not call.trajectories:
                self._flush_progress()
        self._offer_previews(job, call)
        try:
            job.call = job.script.send(result)  # type: ignore[union-attr]  # it has a call
        except StopIteration as finished:
            now = self._clock()
            with self._changed:
                assert job.started is not None
                waited, ran = job.started - job.task.admitted, now - job.started
                warnings, environment = finished.value
                if job.disturbed:
                    warnings = (*warnings, _DISTURBED)
                self._end(job, Finished(warnings, waited, ran, replace(environment, max_batch=self._max_batch)))
        except Exception as error:  # noqa: BLE001
            self._fail(job, error)

    def _flush_progress(self) -> None:
        """Tell of the calls that were made and have not been told of."""
        with self._changed:
            pending, self._pending_progress = self._pending_progress, []
            for job, call in pending:
                if job.task in self._jobs:
                    eta = self._schedule.forecast(job.task, self._clock()).eta
                    for place in range(max(1, len(call.trajectories))):
                        job.deliver(Progress(call.index + place, call.stage, call.step, call.steps, eta))

    def _planned(self, job: Job, calls: Mapping[Stage, int], images: int, batch: int) -> None:
        """Each of the job's `images` left, `batch` of which share them, turns out to need so many calls of experts."""
        with self._changed:
            self._calls_per_step[job.submission.request.scheduler] = sum(calls.values()) / job.submission.request.steps
            if job.task in self._jobs:
                self._schedule.replan(job.task, _calls(job.submission.request, calls, images, batch))

    def _offer_previews(self, job: Job, call: _Call) -> None:
        if call.trajectories and job.submission.preview_interval and call.calls % job.submission.preview_interval == 0:
            for place, trajectory in enumerate(call.trajectories):
                self._previews.offer(job, call.index + place, call.calls, trajectory)

    def _deliver(self, job: Job, event: Event) -> None:
        with self._changed:
            self._flush_progress()  # what came before this
            if job.task in self._jobs:  # nothing may follow the terminal event
                job.deliver(event)
            elif isinstance(event, Preview):
                self._observe(PreviewDropped())

    def _fail(self, job: Job, error: Exception) -> None:
        failure: EngineError
        if isinstance(error, OutOfMemory):
            request = job.submission.request
            failure = DeviceFull(
                f"{request.width} x {request.height} pixels do not fit in the device's memory; ask for fewer"
            )
            job.within(log.error, "%s: %s", job.submission.name, error)
        else:
            failure = ModelFailed("the model failed on this request; the server's log has the cause")
            job.within(log.error, "%s: the model failed", job.submission.name, exc_info=error)
        with self._changed:
            if isinstance(error, OutOfMemory):
                self._too_large = (_rows(request) * request.width * request.height, self._clock() + _AGAIN)
            self._end(job, Failed(failure))

    def _end(self, job: Job, terminal: Finished | Failed) -> None:
        """Let go of a job and tell how it ended. With the lock held."""
        self._flush_progress()
        self._ending.discard(job)
        if self._jobs.pop(job.task, None) is None:
            return
        now = self._clock()
        self._schedule.remove(job.task, now)
        if len(self._deadlines) > 2 * len(self._jobs) + 8:  # most are of jobs that have ended, and hold on to them
            self._deadlines = [each for each in self._deadlines if each[2].task in self._jobs]
            heapq.heapify(self._deadlines)
        self._previews.forget(job)
        self._ahead.discard(job)
        job.script = job.call = None  # lets go of latents and conditioning
        outcome = "finished" if isinstance(terminal, Finished) else type(terminal.error).__name__
        self._outcomes[outcome] += 1
        self._wasted_seconds += job.wasted
        took = now - job.task.admitted
        if isinstance(terminal, Finished) and took > 0:
            self._eta_errors.append(abs(job.predicted_end - now) / took)
        job.within(
            log.info,
            "%s: %s after %d model calls, %.3f s of the device, %.3f s of them after its end; %.2f s, predicted %.2f s",
            job.submission.name,
            outcome,
            job.calls_made,
            job.task.used,
            job.wasted,
            took,
            job.predicted_end - job.task.admitted,
        )
        ended = JobEnded(outcome, job.task.admitted, job.started, now, job.predicted_end, tuple(job.spans))
        job.within(self._observe, ended)
        job.deliver(terminal)


class _Previews:
    """Draws previews on a thread of its own. It never holds up a step: of each image only the newest state waits."""

    def __init__(self, deliver: Callable[[Job, Preview], None], observe: Observe) -> None:
        self._deliver = deliver
        self._observe = observe
        self._waiting: dict[tuple[Job, int], tuple[int, Trajectory]] = {}
        self._changed = threading.Condition()
        self._stopping = False

    def start(self, model: AnyModel) -> None:
        self._thread = threading.Thread(target=self._run, args=(model,), name="previews", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Draw nothing more, and wait for the thread: one that still ends while the process does can abort it."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def offer(self, job: Job, index: int, step: int, trajectory: Trajectory) -> None:
        with self._changed:
            if (job, index) in self._waiting:
                self._observe(PreviewDropped())
            self._waiting[job, index] = step, trajectory
            self._changed.notify()

    def forget(self, job: Job) -> None:
        with self._changed:
            for waiting in [each for each in self._waiting if each[0] is job]:
                del self._waiting[waiting]
                self._observe(PreviewDropped())

    def _run(self, model: AnyModel) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    return
                job, index = next(iter(self._waiting))
                step, trajectory = self._waiting.pop((job, index))
            try:
                pixels = model.preview(trajectory)
            except Exception:  # noqa: BLE001  # a preview is not worth an image
                job.within(log.exception, "%s: no preview of image %d", job.submission.name, index)
                continue
            self._deliver(job, Preview(index, step, len(trajectory.stages), pixels))


def _script(
    job: Job,
    model: AnyModel,
    planned: Callable[[Job, Mapping[Stage, int], int, int], None],
    deliver: Callable[[Job, Event], None],
) -> Generator[_Call, Any, tuple[tuple[Warning, ...], Environment]]:
    """All calls of one job, in order; each yield gets its call's result. Returns the warnings and what made the images.

    As many images as may share a call go through the experts together.
    """
    request = job.submission.request
    conditioning: Conditioning = yield _Call(Stage.ENCODE, make=partial(model.encode, request))
    warnings = list(conditioning.warnings)
    images = list(enumerate(request.seeds))
    while images:
        batch = model.max_batch  # which the other thread may make smaller meanwhile
        group = images[:batch]
        trajectories: list[Trajectory] = [model.plan(request, conditioning, seed) for _, seed in group]
        warnings += (each for trajectory in trajectories for each in trajectory.warnings if each not in warnings)
        stages = trajectories[0].stages
        calls = {stage: stages.count(stage) for stage in _EXPERTS}
        planned(job, calls, len(images), batch)
        images = images[len(group) :]
        done = dict.fromkeys(calls, 0)
        for made, stage in enumerate(stages, 1):
            done[stage] += 1
            yield _Call(stage, group[0][0], done[stage], calls[stage], made, trajectories)
        for (index, seed), trajectory in zip(group, trajectories, strict=True):
            pixels = yield _Call(Stage.DECODE, index, make=partial(model.decode, trajectory))
            deliver(job, ImageReady(index, seed, pixels, calls[Stage.BASE], calls[Stage.REFINER]))
    return tuple(warnings), conditioning.environment


def _stretch(job: Job, began: float, ended: float, device: float) -> None:
    """Note in what stage of the job a call was."""
    if job.call is None:  # abandoned meanwhile
        return
    stage, index = job.call.stage, job.call.index
    last = job.spans[-1] if job.spans else None
    if last is None or (last.stage, last.index) != (stage, index):
        job.spans.append(last := StageSpan(stage, index, began, ended))
    last.ended = ended
    last.calls += 1
    last.device += device


def _calls(request: ImageRequest, calls: Mapping[Stage, int], images: int, batch: int) -> list[tuple[CallKind, int]]:
    """All calls that so many images need after the prompt's, if `batch` of them share the calls of the experts."""
    planned = []
    for group in [batch] * (images // batch) + [images % batch]:
        counts = {**calls, Stage.DECODE: group} if group else {}
        planned += [(_kind(request, stage), count) for stage, count in counts.items() if count]
    return planned


def _kind(request: ImageRequest, stage: Stage) -> CallKind:
    return CallKind(stage, request.width, request.height, _rows(request) if stage in _EXPERTS else 1)


def _rows(request: ImageRequest) -> int:
    """Guidance runs a second row, unconditional, beside the first."""
    return 2 if request.guidance_scale > 1 else 1


def _memory(request: ImageRequest) -> int:
    """Bytes that a job may hold at once: the pixels of its images, and latents, which are fewer."""
    return 2 * 3 * request.width * request.height * len(request.seeds)
