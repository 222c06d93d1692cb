"""The events of a job, the errors that it can end with, and the observations of the engine.

Events are for the caller of a job. Observations are for the operator of the service: metrics and traces.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.domain import Environment, Stage, Warning


class EngineError(Exception):
    """A job was not admitted, or ended without its images."""


class Draining(EngineError):
    """The server is shutting down."""


class DeviceLost(EngineError):
    """The device no longer answers, and this job is part of the call that does not return."""


class DeviceUnavailable(EngineError):
    """The device no longer answers, and the job is not part of the cause: it is rejected, or waits between calls."""


class ResourceExhausted(EngineError):
    """The queue has no room or no time for the job.

    It should after `retry_after` seconds. Infinity means never: the job is too large even for an empty queue.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(EngineError):
    """The deadline passed before the job had finished, or is too early even for an idle device."""


class Cancelled(EngineError):
    """The caller cancelled the job or has gone away."""


class ModelFailed(EngineError):
    """The model raised an error on this job. Only the log has the cause."""


class DeviceFull(EngineError):
    """Images of this job's size do not fit in the device's memory."""


@dataclass(frozen=True)
class Queued:
    """The job is admitted: `position` jobs go first, and its last image is ready in `eta` seconds.

    Repeated when either has changed notably.
    """

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
    """A small RGB picture of what image `index` will become, after `step` of `steps` calls of both experts."""

    index: int
    step: int
    steps: int
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class ImageReady:
    """Image `index` is finished: RGB `pixels` of shape (height, width, 3)."""

    index: int
    seed: int
    pixels: NDArray[np.uint8]
    base_calls: int
    refiner_calls: int


@dataclass(frozen=True)
class Finished:
    """All images are finished.

    `waited` is the time from admission to the first call and `ran` the time from there to the end, in seconds.
    `environment` made the images.
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
    """The calls of one stage for image `index`, or for several images from there on that share them.

    Times are on the engine's clock, from the first call to the last; calls of other jobs may run in between. `device`
    is this job's share of the device time, in seconds.
    """

    stage: Stage
    index: int
    began: float
    ended: float
    calls: int = 0
    device: float = 0.0


@dataclass(frozen=True)
class JobStarted:
    """A job's first call is about to begin, `waited` seconds after its admission."""

    waited: float


@dataclass(frozen=True)
class ModelCall:
    """A call of the model for one or more images has ended, whether or not it failed."""

    stage: Stage
    images: int
    seconds: float


@dataclass(frozen=True)
class PreviewDropped:
    """A preview came too late to be drawn or delivered."""


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
    """A finished image has passed the content filter, if there is one, and is encoded to a file of `size` bytes.

    `began` and `ended` are on the monotonic clock. `filtered` means that the filter replaced the image.
    """

    pixels: int
    size: int
    began: float
    ended: float
    filtered: bool = False


@dataclass(frozen=True)
class DeviceTimeAttributed:
    """The use of a job's `device` seconds is known: `delivered` means that a caller got all of its images."""

    device: float
    delivered: bool


Observation = JobStarted | ModelCall | PreviewDropped | JobEnded | ImageEncoded | DeviceTimeAttributed

Observe = Callable[[Observation], None]
"""Takes observations. It is called from any thread with the engine's lock held, so it must neither block nor raise.
Observations of a job arrive in the context (contextvars) of its submission."""


def no_observer(observation: Observation) -> None:
    """Ignore the observation."""
