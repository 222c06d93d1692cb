"""What an engine tells of its jobs, and the ways in which they can end without their images.

Events are for whoever waits for a job, observations for whoever watches the service.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.domain import Environment, Stage, Warning


class EngineError(Exception):
    """A job was not admitted, or ended without its images."""


class Draining(EngineError):
    """The server is on its way out."""


class DeviceLost(EngineError):
    """The device does not answer any more, and this job has a part in the call that does not come back."""


class DeviceUnavailable(EngineError):
    """The device does not answer any more, and the job has no part in that: it is refused, or waits between calls."""


class ResourceExhausted(EngineError):
    """No room for the job, or no time; `retry_after` seconds from now there should be, infinite for never."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(EngineError):
    """The deadline passed before the job was finished, or is too early for it even were it alone."""


class Cancelled(EngineError):
    """Nobody waits for the job any more."""


class ModelFailed(EngineError):
    """The model raised on this job. The cause is in the log, and only there."""


class DeviceFull(EngineError):
    """The device's memory has no room for images as large as this job's."""


@dataclass(frozen=True)
class Queued:
    """Admitted: `position` jobs go first, `eta` seconds until the last image. Told anew when it has changed."""

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
    """All images are out. `waited` seconds from admission to the first call, `ran` seconds from there to the last.

    `environment` is what made them.
    """

    warnings: tuple[Warning, ...]
    waited: float
    ran: float
    environment: Environment


@dataclass(frozen=True)
class Failed:
    """The job ended without finishing."""

    error: EngineError


Event = Queued | Progress | Preview | ImageReady | Finished | Failed


@dataclass
class StageSpan:
    """Calls of one stage for one image, or for several from image `index` on that share them, from first to last.

    Times are on the engine's clock. `device` is what of them is this job's: calls of other jobs may come between.
    """

    stage: Stage
    index: int
    began: float
    ended: float
    calls: int = 0
    device: float = 0.0


@dataclass(frozen=True)
class JobStarted:
    """A job's first call is about to be made, `waited` seconds after its admission."""

    waited: float


@dataclass(frozen=True)
class ModelCall:
    """A call of the model for so many images has ended, whether it failed or not."""

    stage: Stage
    images: int
    seconds: float


@dataclass(frozen=True)
class PreviewDropped:
    """A preview came too late to be drawn or told."""


@dataclass(frozen=True)
class JobEnded:
    """A job has ended with an `outcome`: "finished" or the class name of its error. Times are on the engine's clock.

    `started` is None for a job that never had a call. `predicted_end` was predicted at its admission.
    """

    outcome: str
    admitted: float
    started: float | None
    ended: float
    predicted_end: float
    spans: tuple[StageSpan, ...]


@dataclass(frozen=True)
class ImageEncoded:
    """A finished image was judged, where that is asked for, and coded to a file of `size` bytes.

    That was from `began` to `ended` on the monotonic clock. `filtered` tells that the file shows something else.
    """

    pixels: int
    size: int
    began: float
    ended: float
    filtered: bool = False


@dataclass(frozen=True)
class DeviceTimeAttributed:
    """What a job's `device` seconds were good for is known: whether somebody got all of its images."""

    device: float
    delivered: bool


Observation = JobStarted | ModelCall | PreviewDropped | JobEnded | ImageEncoded | DeviceTimeAttributed

Observe = Callable[[Observation], None]
"""Called from any thread, an engine's lock held, so it must neither block nor raise. What is told of one job is told
in the context (contextvars) of the call that began it."""


def no_observer(observation: Observation) -> None:
    """Nobody watches."""
