"""One job: its state, the script of its model calls, and the calls that a request needs."""

import contextvars
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from server.domain import EXPERTS, Environment, ImageRequest, Stage, Warning
from server.engine.call_times import CallKind
from server.engine.events import EngineError, Event, ImageReady, Queued, StageSpan
from server.engine.interface import ConditioningT, Model, Submission, TrajectoryLike, TrajectoryT
from server.engine.task import ImageTask


@dataclass(frozen=True)
class JobCall:
    """One call of the model for one job: `run`, or for an expert one step of `trajectories`.

    The first trajectory is image `index`. This is call `step` of `steps` in its stage, and the last of the
    `expert_calls` that each image has had so far.
    """

    stage: Stage
    index: int = 0
    step: int = 1
    steps: int = 1
    expert_calls: int = 0
    trajectories: Sequence[TrajectoryLike] = ()
    run: Callable[[], Any] = lambda: None


Script: TypeAlias = Generator[JobCall, Any, tuple[tuple[Warning, ...], Environment]]
"""All calls of one job, in order. Each yield receives the result of its call."""


@dataclass(eq=False)
class Job:
    """One admitted request.

    `deliver` takes its events. It is called from any thread, must not block, and gets exactly one terminal event
    (Finished or Failed), as the last. Times are on the engine's clock.
    """

    submission: Submission
    deliver: Callable[[Event], None]
    task: ImageTask
    script: Script | None = None
    call: JobCall | None = None
    started: float | None = None
    error: EngineError | None = None  # with which the job ends after the call in flight
    error_time: float = math.inf
    seconds_after_cancel: float = 0.0  # of device time, after `error_time`
    calls_made: int = 0
    batch_reduced: bool = False  # while it ran
    predicted_end: float = 0.0  # at admission
    last_queued: Queued | None = None
    last_queued_time: float = 0.0
    spans: list[StageSpan] = field(default_factory=list)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    @property
    def has_prediction(self) -> bool:
        """Whether call times were known at admission; they are not for the first job, the warm-up."""
        return self.predicted_end > self.task.admitted

    def run_in_context(self, function: Callable[..., None], *args: Any, **options: Any) -> None:
        """Call a function in the context (contextvars) of the job's submission."""
        self.context.copy().run(function, *args, **options)  # a copy: only one thread at a time can enter a context

    def record_call(self, began: float, ended: float, jobs: int) -> None:
        """Record a model call of this job and the number of jobs that shared it."""
        self.calls_made += 1
        if self.error is not None:
            self.seconds_after_cancel += (ended - max(began, self.error_time)) / jobs
        if self.call is None:  # the engine abandoned the job during the call
            return
        stage, index = self.call.stage, self.call.index
        last = self.spans[-1] if self.spans else None
        if last is None or (last.stage, last.index) != (stage, index):
            self.spans.append(last := StageSpan(stage, index, began, ended))
        last.ended = ended
        last.calls += 1
        last.device += (ended - began) / jobs


def script(
    job: Job,
    model: Model[ConditioningT, TrajectoryT],
    replan: Callable[[Job, Mapping[Stage, int], int, int], None],
    deliver: Callable[[Job, Event], None],
) -> Script:
    """Yield all calls of a job, in order. Returns the warnings and the environment that made the images.

    As many images as may share a call go through the experts together. `replan` gets the number of calls of each
    expert per image, the number of images left, and how many of them share their calls.
    """
    request = job.submission.request
    conditioning: ConditioningT = yield JobCall(Stage.ENCODE, run=partial(model.encode, request))
    warnings = list(conditioning.warnings)
    images = list(enumerate(request.seeds))
    while images:
        batch = model.max_batch  # the other thread may reduce it at any time
        group = images[:batch]
        trajectories = [model.plan(request, conditioning, seed) for _, seed in group]
        warnings += (each for trajectory in trajectories for each in trajectory.warnings if each not in warnings)
        stages = trajectories[0].stages
        calls = {stage: stages.count(stage) for stage in EXPERTS}
        replan(job, calls, len(images), batch)
        images = images[len(group) :]
        done = dict.fromkeys(calls, 0)
        for expert_calls, stage in enumerate(stages, 1):
            done[stage] += 1
            yield JobCall(stage, group[0][0], done[stage], calls[stage], expert_calls, trajectories)
        for (index, seed), trajectory in zip(group, trajectories, strict=True):
            pixels = yield JobCall(Stage.DECODE, index, run=partial(model.decode, trajectory))
            deliver(job, ImageReady(index, seed, pixels, calls[Stage.BASE], calls[Stage.REFINER]))
    return tuple(warnings), conditioning.environment


def calls_after_encoding(
    request: ImageRequest, expert_calls: Mapping[Stage, int], images: int, batch: int
) -> list[tuple[CallKind, int]]:
    """Return all calls for a number of images after the prompt's, if `batch` of them share the calls of experts."""
    planned = []
    for group in [batch] * (images // batch) + [images % batch]:
        counts = {**expert_calls, Stage.DECODE: group} if group else {}
        planned += [(call_kind(request, stage), count) for stage, count in counts.items() if count]
    return planned


def call_kind(request: ImageRequest, stage: Stage) -> CallKind:
    """Return the kind of the request's calls in a stage."""
    return CallKind(stage, request.width, request.height, rows(request) if stage in EXPERTS else 1)


def rows(request: ImageRequest) -> int:
    """Return the rows per image of a U-Net call: classifier-free guidance needs a second, unconditional one."""
    return 2 if request.guidance_scale > 1 else 1


def memory_bytes(request: ImageRequest) -> int:
    """Return the bytes of host memory that a job may hold: the pixels of its images, and latents, which are fewer."""
    return 2 * 3 * request.width * request.height * len(request.seeds)
