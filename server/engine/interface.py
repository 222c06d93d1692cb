"""The messages and protocols between the engine and its neighbours: plain data, no torch, no gRPC."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from server.domain import Caller, Environment, ImageRequest, ModelInfo, Stage, Warning

NOBODY = Caller("")
"""The caller of the server's own jobs."""


@dataclass(frozen=True)
class Submission:
    """One request for images and the terms of its job.

    `name` identifies the job in the log. The job must end within `timeout` seconds. The device is shared fairly between
    callers by `Caller.name`; `Caller.jobs`, if given, replaces the engine's limit on the jobs of one caller. A higher
    `priority` runs earlier. A Preview follows every `preview_interval` network calls; 0 means never.
    """

    name: str
    request: ImageRequest
    caller: Caller = NOBODY
    timeout: float = math.inf
    priority: int = 0
    preview_interval: int = 0


class ConditioningLike(Protocol):
    """The encoded prompts of one request, and the `environment` that makes its images."""

    @property
    def warnings(self) -> Sequence[Warning]: ...
    @property
    def environment(self) -> Environment: ...


class TrajectoryLike(Protocol):
    """The way of one image from noise to clean latents.

    `stages` has BASE or REFINER for every network call, in order. Trajectories with equal `batch_key` may share their
    next one.
    """

    @property
    def stages(self) -> Sequence[Stage]: ...
    @property
    def batch_key(self) -> Hashable: ...
    @property
    def warnings(self) -> Sequence[Warning]: ...


@dataclass(frozen=True)
class LaunchedStep:
    """A network call that has been launched; `wait` returns when each of its trajectories has moved on by it.

    `wait` is called once, by the thread that launched. It raises StepFailed when some trajectories failed and the
    others have moved on. After any other error no trajectory has moved, and each can be stepped again.
    """

    wait: Callable[[], None]


ConditioningT = TypeVar("ConditioningT", bound=ConditioningLike)
TrajectoryT = TypeVar("TrajectoryT", bound=TrajectoryLike)


class Model(Protocol[ConditioningT, TrajectoryT]):
    """The calls that the engine makes of an ensemble. Each returns when the device has finished it, except `launch`.

    `launch` starts one network call for 1 to `max_batch` trajectories of one batch key, and may raise what
    `LaunchedStep.wait` raises. An image's bytes depend on `max_batch` and not on the others that share its calls; each
    call takes the time and the memory of a full one. After OutOfMemory, `limit_batch` makes all later calls smaller.

    `preview` returns a small RGB picture of the image that the trajectory will become. Another thread may call it,
    also during a step of the same trajectory: it then shows the state before or after that step. With `overlaps`, a
    second thread may call `encode` and `decode` during steps of other trajectories, and both threads may call `plan`.
    """

    @property
    def max_batch(self) -> int: ...
    @property
    def overlaps(self) -> bool: ...
    def limit_batch(self, images: int) -> None: ...
    def encode(self, request: ImageRequest) -> ConditioningT: ...
    def plan(self, request: ImageRequest, conditioning: ConditioningT, seed: int) -> TrajectoryT: ...
    def launch(self, trajectories: Sequence[TrajectoryT]) -> LaunchedStep: ...
    def preview(self, trajectory: TrajectoryT) -> NDArray[np.uint8]: ...
    def decode(self, trajectory: TrajectoryT) -> NDArray[np.uint8]: ...


class ServedModel(Model[ConditioningT, TrajectoryT], Protocol[ConditioningT, TrajectoryT]):
    """A model with what its service publishes and compiles.

    `set_info` replaces the description; images whose prompts are encoded later have its environment. Another thread may
    call `compile` during any other call. It returns the `info` of the compiled calls, and the first image that they
    make for the request. After `use_compiled(info)`, images whose prompts are encoded later use the compiled calls
    throughout; the others finish as they began.
    """

    @property
    def info(self) -> ModelInfo: ...
    def set_info(self, info: ModelInfo) -> None: ...
    def use_compiled(self, info: ModelInfo) -> None: ...
    def compile(self, request: ImageRequest) -> tuple[ModelInfo, NDArray[np.uint8]]: ...


AnyModel: TypeAlias = Model[Any, Any]
AnyServedModel: TypeAlias = ServedModel[Any, Any]
