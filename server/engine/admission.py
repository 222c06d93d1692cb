"""Admission: the calls that a request is expected to need, and the errors of requests that are not admitted."""

import math
from collections.abc import Mapping

from server.domain import ImageRequest, Stage
from server.engine.call_times import CallKind
from server.engine.events import DeadlineExceeded, ResourceExhausted
from server.engine.interface import Submission
from server.engine.job import call_kind, calls_after_encoding, memory_bytes, rows
from server.engine.scheduling import Reason, Rejection, Schedule
from server.engine.task import ImageTask

OOM_BACKOFF_SECONDS = 60.0  # after the device ran out of memory, until the same is tried again
_MIN_RETRY_SECONDS = 0.1  # of a rejected caller: less would be a busy loop over the network


class Admission:
    """Turns submissions into tasks, and rejects those that the schedule has no room or no time for.

    It learns how many network calls a scheduler's steps need, and which sizes do not fit in the device's memory.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._calls_per_step: dict[str, float] = {}  # by scheduler
        self._too_large: tuple[int, float] = (0, -math.inf)  # rows times pixels of an image, and until when

    def task(self, submission: Submission, max_batch: int, now: float) -> ImageTask:
        """Return the task of a submission, with the calls that it is expected to need."""
        request = submission.request
        return ImageTask(
            caller=submission.caller.name,
            calls=[(call_kind(request, Stage.ENCODE), 1), *self._expected_calls(request, max_batch)],
            deadline=now + submission.timeout,
            priority=submission.priority,
            pixels=request.width * request.height * len(request.seeds),
            bytes=memory_bytes(request),
            jobs_per_caller=submission.caller.jobs,
        )

    def check(self, task: ImageTask, request: ImageRequest, now: float) -> None:
        """Check that a task can be admitted now.

        Raises ResourceExhausted if the queue has no room or no time for it, with an infinite `retry_after` if it is too
        large even for an empty queue; DeadlineExceeded if it cannot meet its deadline even on an idle device.
        """
        size, until = self._too_large
        if now < until and _size(request) >= size:
            raise ResourceExhausted(
                f"{request.width} x {request.height} pixels did not fit in the device's memory a moment ago; ask for "
                f"fewer, or try again in {until - now:.0f} s",
                until - now,
            )
        if (rejection := self._schedule.rejection(task, now)) is not None:
            retry_after = max(_MIN_RETRY_SECONDS, rejection.retry_after)
            if retry_after == math.inf and (too_large := self._too_large_for_queue(rejection.reason, task)):
                raise ResourceExhausted(too_large, retry_after)
            when = f"; try again in {retry_after:.1f} s" if retry_after < math.inf else ", even on an idle server"
            if rejection.reason is Reason.DEADLINE and retry_after == math.inf:
                raise DeadlineExceeded(self._explain(rejection, task) + when)  # waiting would not help
            raise ResourceExhausted(self._explain(rejection, task) + when, retry_after)

    def record_plan(self, request: ImageRequest, expert_calls: Mapping[Stage, int]) -> None:
        """Learn from a plan how many network calls the scheduler's steps need."""
        self._calls_per_step[request.scheduler] = sum(expert_calls.values()) / request.steps

    def record_out_of_memory(self, request: ImageRequest, now: float) -> None:
        """Reject requests for images of this size or larger for a while: one did not fit in the device's memory."""
        self._too_large = (_size(request), now + OOM_BACKOFF_SECONDS)

    def _explain(self, rejection: Rejection, task: ImageTask) -> str:
        limits, work = self._schedule.limits, f"{self._schedule.work:.1f} s of device time"
        match rejection.reason:
            case Reason.JOBS:
                return f"{limits.jobs} requests are waiting already, for {work}"
            case Reason.JOBS_PER_CALLER:
                return f"{self._schedule.jobs_per_caller(task):.0f} requests of this caller are waiting already"
            case Reason.PIXELS:
                return f"the images in the queue would have more than {limits.pixels:.0f} pixels with these"
            case Reason.BYTES:
                return f"the requests in the queue would need more than {limits.bytes:.0f} bytes with this one"
            case Reason.DEADLINE:
                return f"the deadline cannot be met: the last image would be ready in {rejection.finish:.1f} s"
            case Reason.OTHERS:
                count = len(rejection.late)
                return f"{count} admitted request{'s' * (count > 1)} would miss a deadline because of this one"

    def _too_large_for_queue(self, reason: Reason, task: ImageTask) -> str | None:
        limits = self._schedule.limits
        match reason:
            case Reason.PIXELS:
                needs = f"the images have {task.pixels} pixels, more than --max-queue-pixels {limits.pixels:.0f}"
            case Reason.BYTES:
                needs = f"the request needs {task.bytes} bytes, more than --max-queue-bytes {limits.bytes:.0f}"
            case _:
                return None
        return f"{needs} allows even in an empty queue; ask for fewer or smaller images"

    def _expected_calls(self, request: ImageRequest, max_batch: int) -> list[tuple[CallKind, int]]:
        """Return the calls of a job after the first, as far as known before it is planned."""
        per_step = self._calls_per_step.get(request.scheduler, 1.0)
        base = round(request.steps * request.high_noise_frac * per_step)
        refiner = round(request.steps * per_step) - base
        expert_calls = {Stage.BASE: base, Stage.REFINER: refiner}
        return calls_after_encoding(request, expert_calls, len(request.seeds), max_batch)


def _size(request: ImageRequest) -> int:
    return rows(request) * request.width * request.height
