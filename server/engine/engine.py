"""The engine: runs the schedule's calls on the device, ends jobs, and reports events.

One thread, the device thread, makes the calls of the model. A job is a script of calls. Between any two calls the
thread asks the schedule whose call is next. A job that is cancelled, expired or abandoned therefore wastes at most the
call in flight, and a short job need not wait for a long one. On a GPU the next call of the same jobs may already have
been launched, so that the device is never idle between steps.

Where the device has room for two calls at once, a second thread, the side thread, encodes prompts and decodes images
during the steps of other jobs. It also encodes prompts before their turn, as many as a step has room for. The engine
uses neither torch nor gRPC: the model is a protocol of a few calls, and events leave through a callback.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from server.domain import Notice, OutOfMemory, Stage, StepFailed, Warning
from server.engine.admission import OOM_BACKOFF_SECONDS, Admission
from server.engine.call_times import CallTimes
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
    JobEnded,
    JobStarted,
    ModelCall,
    ModelFailed,
    Observe,
    Preview,
    PreviewDropped,
    Progress,
    Queued,
    no_observer,
)
from server.engine.in_flight import CallsInFlight, SideQueue
from server.engine.interface import AnyModel, Submission, TrajectoryLike
from server.engine.job import Job, JobCall, calls_after_encoding, script
from server.engine.previews import Previews
from server.engine.scheduling import Forecast, Order, QueueLimits, Schedule
from server.engine.task import ImageTask
from server.engine.timeouts import Timeouts
from server.engine.totals import Statistics, Totals

log = logging.getLogger(__name__)

SomeModel = TypeVar("SomeModel", bound=AnyModel)

_REFRESH_SECONDS = 0.5  # between two looks at the estimates of waiting jobs
_NOTABLE_CHANGE = 0.1  # a relative change of an estimate above this is reported
_BATCH_REDUCED = Warning(
    Notice.BATCH_REDUCED,
    "",
    "memory ran out during the request; the rest ran in smaller batches, which can change the last bits of an image",
)


class Engine:
    """The device thread, the side thread, and the jobs that they serve.

    `limits` bound admission and `order` is the scheduling policy. `clock` is injected so that tests need not wait.
    `observe` gets the observations for the service's operator. Every method may be called from any thread.
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
        self._changed = threading.Condition()  # locks all that follows
        self._schedule = Schedule(limits, CallTimes(), order)
        self._admission = Admission(self._schedule)
        self._jobs: dict[ImageTask, Job] = {}
        self._timeouts = Timeouts(lambda job: job.task in self._jobs)
        self._ending: set[Job] = set()  # jobs with an error that end after the call in flight
        self._rejecting: EngineError | None = None
        self._stopping = False
        self._max_batch = 1
        self._in_flight = CallsInFlight()
        self._side = SideQueue()
        self._pending_progress: list[tuple[Job, JobCall]] = []  # calls that are reported once the device is busy again
        self._next_refresh = -math.inf
        self._totals = Totals()
        self._previews = Previews(self._deliver, observe)
        self._thread: threading.Thread | None = None

    def start(self, load: Callable[[], SomeModel]) -> "Future[SomeModel]":
        """Start the device thread, which loads the model and then serves the queue.

        The thread that uses the model loads it, because OpenMP's threads and CUDA's handles belong to a thread. The
        future holds the model, or the error that `load` raised; then the thread has ended.
        """
        loaded: Future[SomeModel] = Future()
        loaded.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        self._thread = threading.Thread(target=self._run, args=(load, loaded), name="device", daemon=True)
        self._thread.start()
        return loaded

    def submit(self, submission: Submission, deliver: Callable[[Event], None]) -> Job:
        """Admit a request. `deliver` takes the events of its job, as `Job` says.

        Raises Draining, DeviceUnavailable, ResourceExhausted or DeadlineExceeded; later errors arrive as Failed.
        """
        with self._changed:
            if self._rejecting is not None:
                raise self._rejecting
            now = self._clock()
            task = self._admission.task(submission, self._max_batch, now)
            self._admission.check(task, submission.request, now)
            job = Job(submission, deliver, task)
            self._schedule.add(task, now)
            self._jobs[task] = job
            self._timeouts.add(job)
            forecast = self._schedule.forecast(task, now)
            self._report_queued(job, forecast, now)
            job.predicted_end = now + forecast.eta
            self._changed.notify_all()
        return job

    def cancel(self, job: Job, message: str = "the call was cancelled") -> None:
        """End a job with Cancelled(message) after the call in flight, if it has not ended yet."""
        with self._changed:
            self._request_end(job, Cancelled(message))
            self._changed.notify_all()

    def drain(self) -> None:
        """Admit no more jobs; admitted ones continue."""
        with self._changed:
            self._rejecting = self._rejecting or Draining(
                "the server is shutting down; try another one, or again when it is back"
            )

    def stop(self) -> None:
        """Admit no more jobs and end every job after the call in flight. `join` waits until that has happened."""
        self.drain()
        with self._changed:
            self._stopping = True
            for job in self._jobs.values():
                self._request_end(job, Draining("the server shut down before the images were finished"))
            self._changed.notify_all()

    def abandon(self) -> None:
        """Fail every job now, because the call in flight will not return. The device thread is left as it is.

        The jobs of calls in flight end with DeviceLost, because one of them may be the cause; all others end with
        DeviceUnavailable.
        """
        with self._changed:
            self._stopping = True
            self._rejecting = DeviceUnavailable("the device does not answer; this server is about to end")
            suspects = self._in_flight.jobs
            for job in list(self._jobs.values()):
                lost = DeviceLost(
                    "the device does not answer since a call for this request; this server is about to end"
                )
                self._end(job, Failed(lost if job in suspects else self._rejecting))

    def join(self, timeout: float) -> bool:
        """Wait for the device thread to end. Returns False if it still runs after `timeout` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)
        return self._thread is None or not self._thread.is_alive()

    @property
    def admits(self) -> bool:
        """Whether jobs are admitted, as far as there is room."""
        return self._rejecting is None

    @property
    def busy(self) -> float:
        """Seconds since the call in flight began, the longer of two; 0 between calls."""
        with self._changed:
            return self._in_flight.longest(self._clock())

    def statistics(self) -> Statistics:
        """Return a snapshot of the engine's counters."""
        with self._changed:
            running = sum(job.script is not None for job in self._jobs.values())
            return self._totals.snapshot(len(self._jobs) - running, running)

    # The device thread and the side thread.

    def _run(self, load: Callable[[], SomeModel], loaded: "Future[SomeModel]") -> None:
        try:
            model = load()
        except Exception as error:  # noqa: BLE001  # any error must reach the thread that waits for the model
            loaded.set_exception(error)
            return
        self._max_batch = model.max_batch
        side = threading.Thread(target=self._run_side, args=(model,), name="device side", daemon=True)
        if model.overlaps:
            self._side.accepts_from = -math.inf
            side.start()
        self._previews.start(model)
        loaded.set_result(model)
        while jobs := self._next_jobs(model):
            self._run_call(jobs, model)
        if model.overlaps:
            side.join()
        self._previews.stop()

    def _run_side(self, model: AnyModel) -> None:
        """Make the calls that the device thread has handed over, one after the other."""
        while (job := self._next_side_job()) is not None:
            self._run_call([job], model)
            with self._changed:
                self._side.running = None
                if job.error is not None:
                    self._end(job, Failed(job.error))
                self._schedule.resume(job.task)
                self._changed.notify_all()

    def _next_side_job(self) -> Job | None:
        """Wait for the job whose call the side thread makes next. Returns None once the engine stops."""
        with self._changed:
            self._changed.wait_for(lambda: self._side.waiting or self._stopping)
            if self._stopping:
                return None
            self._side.running = self._side.waiting.popleft()
            self._in_flight.begin([self._side.running], self._clock())
            self._changed.notify_all()  # the side queue has room again
            return self._side.running

    def _next_jobs(self, model: AnyModel) -> list[Job]:
        """End all jobs that are due to end, then wait for the jobs of the next call. Returns [] once it stops."""
        with self._changed:
            while True:
                self._end_due_jobs()
                if self._stopping:
                    return []
                now = self._clock()
                overlaps = self._side.accepts(now)
                tasks = self._schedule.choose(now)
                if tasks and tasks[0].kind.shared and model.max_batch > 1:
                    # With a side thread, prompts are encoded ahead, below, and the step need not wait for them.
                    tasks = self._schedule.choose(now, model.max_batch, join=not overlaps)
                is_step = bool(tasks) and tasks[0].kind.shared
                if not is_step:
                    self._flush_progress()  # no step comes next that it could run next to
                for_side = bool(tasks) and not is_step and overlaps
                if not tasks or (for_side and self._side.full):
                    # While the side queue is full, no step runs: it could add to the queue.
                    self._changed.wait()
                    continue
                self._refresh_estimates()
                if for_side:
                    self._hand_over(tasks[0], model)
                    continue
                jobs = [self._started_job(task, model) for task in tasks]
                self._side.encoded_ahead.difference_update(jobs)
                if overlaps and not self._side.waiting and len(self._side.encoded_ahead) < model.max_batch:
                    for task in self._schedule.choose_ahead(Stage.ENCODE):
                        self._hand_over(task, model, ahead=True)
                self._in_flight.begin(jobs, self._clock())
                return jobs

    def _started_job(self, task: ImageTask, model: AnyModel) -> Job:
        """Return the task's job, started if this is its first call."""
        job = self._jobs[task]
        if job.script is None:
            job.started = self._clock()
            job.run_in_context(self._observe, JobStarted(job.started - task.admitted))
            job.script = script(job, model, self._replan, self._deliver)
            job.call = next(job.script)
        return job

    def _hand_over(self, task: ImageTask, model: AnyModel, ahead: bool = False) -> None:
        """Let the side thread make the task's next call. With the lock held."""
        job = self._started_job(task, model)
        if task.kind.stage is Stage.ENCODE:
            self._side.encoded_ahead.add(job)
        self._schedule.hold(task, ahead)
        self._side.waiting.append(job)
        self._changed.notify_all()

    # One call.

    def _run_call(self, jobs: list[Job], model: AnyModel) -> None:
        """Make the next call of these jobs, in one call together, and continue their scripts."""
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
                result = job.call.run()
            except Exception as error:  # noqa: BLE001  # one job's failure must not reach the others
                if isinstance(error, OutOfMemory) and self._serialize_after_oom():
                    with self._changed:
                        self._in_flight.end()
                    return  # the schedule chooses the same call again
                failures = {job: error}
        self._record_call(jobs, began)
        for job in jobs:
            if job.call is None:  # `abandon` ended it during the call
                continue
            if job in failures:
                self._fail(job, failures[job])
            else:
                self._continue_script(job, job.call, result)

    def _step(self, together: list[tuple[Job, TrajectoryLike]], model: AnyModel) -> dict[Job, Exception]:
        """Make one step of some trajectories. Returns the jobs that failed and why.

        An error of a whole call is not the end of all its jobs: each half is tried again. When memory runs out, this
        and all later calls become smaller.
        """
        failures: dict[Job, Exception] = {}
        batches: dict[Hashable, list[tuple[Job, TrajectoryLike]]] = {}
        for each in together:  # of one kind, but of two batch keys for a while after compilation
            batches.setdefault(each[1].batch_key, []).append(each)
        waiting = list(batches.values())
        while waiting:
            batch = waiting.pop()
            error: Exception | None = None
            if len(batch) <= model.max_batch:
                try:
                    launched = model.launch([trajectory for _, trajectory in batch])
                    self._flush_progress()  # while the device is busy
                    launched.wait()
                    continue
                except StepFailed as failed:
                    failures |= {batch[place][0]: cause for place, cause in failed.failures.items()}
                    continue
                except Exception as raised:  # noqa: BLE001  # one job's failure must not reach the others
                    error = raised
            if isinstance(error, OutOfMemory) and self._serialize_after_oom():
                waiting.append(batch)
            elif isinstance(error, OutOfMemory) and model.max_batch > 1:
                self._reduce_batch(model)
                waiting.append(batch)
            elif error is not None and len(batch) == 1:
                failures[batch[0][0]] = error
            else:
                half = len(batch) // 2
                waiting += [batch[half:], batch[:half]]
        return failures

    def _serialize_after_oom(self) -> bool:
        """Return whether this thread's call can be repeated alone: it ran out of memory at the same time as another.

        If so, the side thread gets no calls for a while, and the device thread waits here for the one in flight there.
        """
        with self._changed:
            if not self._in_flight.overlapped:
                return False
            self._side.accepts_from = self._clock() + OOM_BACKOFF_SECONDS
            while self._side.waiting:
                self._schedule.resume(self._side.waiting.popleft().task)
            if threading.current_thread() is self._thread:
                self._changed.wait_for(lambda: self._side.running is None)
            self._in_flight.repeat_alone()
        log.warning("memory ran out with two calls at once; calls run one at a time for %.0f s", OOM_BACKOFF_SECONDS)
        return True

    def _reduce_batch(self, model: AnyModel) -> None:
        """Halve the number of images that share a call, because memory has run out."""
        with self._changed:
            before, self._max_batch = model.max_batch, model.max_batch // 2
            model.limit_batch(self._max_batch)
            for job in self._jobs.values():
                job.batch_reduced = job.batch_reduced or job.script is not None
        log.warning(
            "%d images did not fit in the device's memory together; calls have at most %d from now on",
            before,
            self._max_batch,
        )

    def _record_call(self, jobs: Sequence[Job], began: float) -> None:
        """Record the cost of this thread's call and charge it to its jobs."""
        with self._changed:
            now = self._clock()
            self._in_flight.end()
            self._schedule.record_call([job.task for job in jobs], now - began)
            self._totals.device_seconds += now - began
            calls = [job.call for job in jobs if job.call]
            if calls:
                images = sum(max(1, len(call.trajectories)) for call in calls)
                self._observe(ModelCall(calls[0].stage, images, now - began))
            for job in jobs:
                job.record_call(began, now, len(jobs))

    def _continue_script(self, job: Job, call: JobCall, result: Any) -> None:
        """Find the job's next call. The progress of a step is reported later, while the device is busy again.

        A report wakes other threads. While they hold the interpreter, this one cannot launch the next call.
        """
        assert job.script is not None
        with self._changed:
            self._pending_progress.append((job, call))
            if not call.trajectories:
                self._flush_progress()
        self._previews.offer(job, call)
        try:
            job.call = job.script.send(result)
        except StopIteration as finished:
            now = self._clock()
            with self._changed:
                assert job.started is not None
                waited, ran = job.started - job.task.admitted, now - job.started
                warnings, environment = finished.value
                if job.batch_reduced:
                    warnings = (*warnings, _BATCH_REDUCED)
                self._end(job, Finished(warnings, waited, ran, replace(environment, max_batch=self._max_batch)))
        except Exception as error:  # noqa: BLE001  # one job's failure must not reach the others
            self._fail(job, error)

    def _replan(self, job: Job, expert_calls: Mapping[Stage, int], images: int, batch: int) -> None:
        """Take over the calls of a plan: each of the job's `images` left needs them, and `batch` images share them."""
        request = job.submission.request
        with self._changed:
            self._admission.record_plan(request, expert_calls)
            if job.task in self._jobs:
                self._schedule.replan(job.task, calls_after_encoding(request, expert_calls, images, batch))

    # Events.

    def _report_queued(self, job: Job, forecast: Forecast, now: float) -> None:
        job.last_queued, job.last_queued_time = Queued(forecast.position, forecast.eta), now
        job.deliver(job.last_queued)

    def _refresh_estimates(self) -> None:
        """Report the position and the predicted end of waiting jobs again, where they have changed notably."""
        now = self._clock()
        if now < self._next_refresh:
            return
        for forecast in self._schedule.forecasts(now):
            job = self._jobs[forecast.task]
            if job.script is not None or job.last_queued is None:
                continue
            expected = job.last_queued.eta - (now - job.last_queued_time)
            change = abs(forecast.eta - expected)
            if forecast.position != job.last_queued.position or change > _NOTABLE_CHANGE * forecast.eta:
                self._report_queued(job, forecast, now)
        # With very many jobs a refresh takes long; it must stay a small share of the device's time.
        done = self._clock()
        self._next_refresh = done + 20 * (done - now) + _REFRESH_SECONDS

    def _flush_progress(self) -> None:
        """Report the calls that were made and have not been reported."""
        with self._changed:
            pending, self._pending_progress = self._pending_progress, []
            for job, call in pending:
                if job.task in self._jobs:
                    eta = self._schedule.forecast(job.task, self._clock()).eta
                    for place in range(max(1, len(call.trajectories))):
                        job.deliver(Progress(call.index + place, call.stage, call.step, call.steps, eta))

    def _deliver(self, job: Job, event: Event) -> None:
        """Deliver an event after all earlier ones, and none after the terminal event."""
        with self._changed:
            self._flush_progress()
            if job.task in self._jobs:
                job.deliver(event)
            elif isinstance(event, Preview):
                self._observe(PreviewDropped())

    # Ends.

    def _request_end(self, job: Job, error: EngineError) -> None:
        """Let a job end with an error after the call in flight, if it has not ended. With the lock held."""
        if job.task in self._jobs and job.error is None:
            job.error, job.error_time = error, self._clock()
            self._ending.add(job)
            self._side.discard(job)

    def _end_due_jobs(self) -> None:
        for job in self._timeouts.expired(self._clock()):
            self._request_end(job, DeadlineExceeded("the deadline passed before the images were finished"))
        for job in list(self._ending):
            assert job.error is not None
            if job is not self._side.running:  # that job ends after its call in flight
                self._end(job, Failed(job.error))

    def _fail(self, job: Job, error: Exception) -> None:
        """End a job with an error of the model, whose details stay in the log."""
        name, request = job.submission.name, job.submission.request
        failure: EngineError
        if isinstance(error, OutOfMemory):
            failure = DeviceFull(
                f"{request.width} x {request.height} pixels do not fit in the device's memory; ask for fewer"
            )
            job.run_in_context(log.error, "%s: %s", name, error)
        else:
            failure = ModelFailed("the model failed on this request; the server's log has the cause")
            job.run_in_context(log.error, "%s: the model failed", name, exc_info=error)
        with self._changed:
            if isinstance(error, OutOfMemory):
                self._admission.record_out_of_memory(request, self._clock())
            self._end(job, Failed(failure))

    def _end(self, job: Job, terminal: Finished | Failed) -> None:
        """Remove a job, log it and deliver its terminal event. With the lock held."""
        self._flush_progress()
        self._ending.discard(job)
        if self._jobs.pop(job.task, None) is None:
            return
        now = self._clock()
        self._schedule.remove(job.task, now)
        self._timeouts.prune(len(self._jobs))
        self._previews.discard(job)
        self._side.encoded_ahead.discard(job)
        job.script = job.call = None  # releases the latents and the conditioning
        outcome = self._totals.record_end(job, terminal, now)
        admitted = job.task.admitted
        job.run_in_context(
            log.info,
            "%s: %s after %d model calls, %.3f s of device time, %.3f s of it after the cancellation; took %.2f s%s",
            job.submission.name,
            outcome,
            job.calls_made,
            job.task.used,
            job.seconds_after_cancel,
            now - admitted,
            f", predicted {job.predicted_end - admitted:.2f} s" if job.has_prediction else "",
        )
        ended = JobEnded(outcome, admitted, job.started, now, job.predicted_end, tuple(job.spans))
        job.run_in_context(self._observe, ended)
        job.deliver(terminal)
