"""What follows when the connection or the server of a request is lost: decisions alone, without a channel or a clock.

A detached job outlives its connection, so its stream attaches to it again. Any other request, and a detached one whose
server is gone, is made again once: the seed stands in the request, so the images are the same.
"""

from dataclasses import dataclass

import grpc

from ._exceptions import TIMEOUT, DeadlineExceeded, is_broken, is_gone
from ._messages import read_event
from ._types import Done, Event, Image
from .v1 import text_to_image_pb2 as pb

ADMITTED = "t2i-admitted"
"""The header of a unary answer by which the server says that it has begun the request."""
_FIRST_DELAY, _LONGEST_DELAY = 0.2, 5.0  # seconds between attempts to attach
RESUME_SECONDS = 600.0
"""After so long without a server that has the job, a stream without a deadline gives up: servers keep none longer, by
default."""


@dataclass(frozen=True)
class Step:
    """The call to make next: StreamGenerate or Attach, by its message, after `delay` seconds.

    `news` is for people, empty where nothing has changed for them since the last step.
    """

    request: pb.GenerateRequest | pb.AttachRequest
    delay: float = 0.0
    news: str = ""


class Course:
    """One stream of events over all the calls that it takes.

    `request` is that of the first call. `number` is that of the newest event, `resubmitted` how often the request was
    made again, `done` whether the last event has come.
    """

    def __init__(self, request: pb.GenerateRequest | pb.AttachRequest, resubmit: int, resume: bool) -> None:
        self.request = request
        self.number = request.after if isinstance(request, pb.AttachRequest) else 0
        self.resubmitted = 0
        self.done = False
        # After an event that the caller already has, there may be nothing more.
        self.complete = self.number > 0
        self._resubmits = resubmit if isinstance(request, pb.GenerateRequest) else 0
        self._resume = resume and _is_detached(request)
        self._images: dict[int, Image] = {}
        self._admitted = False
        self._lost_at: float | None = None
        self._delay = _FIRST_DELAY

    def read(self, message: pb.StreamGenerateResponse) -> Event | None:
        """The event in `message`; None for one that is newer than this client, or an image that was delivered."""
        self._admitted, self._lost_at, self._delay = True, None, _FIRST_DELAY
        self.number = max(self.number, message.number)
        if message.HasField("choice") and message.choice.choice_index in self._images:
            return None
        event = read_event(message, self._images)
        if event is not None:
            self.complete = self.done = isinstance(event, Done)
        return event

    def after(self, error: grpc.RpcError, now: float) -> Step | None:
        """What to do about the error that ended the newest call, at `now` in seconds; None is to raise it."""
        admitted = self._admitted or was_admitted(error)
        resuming = self._lost_at is not None
        if self._resume and is_broken(error) and (resuming or is_gone(error, admitted)):
            news = (
                ""
                if resuming
                else f"the connection broke; attaching to {self.request.request_id} again until it is back"
            )
            self._lost_at = now if self._lost_at is None else self._lost_at
            if now - self._lost_at > RESUME_SECONDS:
                return None
            delay, self._delay = self._delay, min(2 * self._delay, _LONGEST_DELAY)
            return Step(pb.AttachRequest(request_id=self.request.request_id, after=self.number), delay, news)
        forgotten = resuming and error.code() is grpc.StatusCode.NOT_FOUND
        if self._resubmits and isinstance(self.request, pb.GenerateRequest) and (forgotten or is_gone(error, admitted)):
            self._resubmits -= 1
            self.resubmitted += 1
            self.number, self._admitted, self._lost_at, self._delay = 0, False, None, _FIRST_DELAY
            return Step(self._again(self.request))
        return None

    def _again(self, request: pb.GenerateRequest) -> pb.GenerateRequest:
        """The request, with the seed of the images that were delivered, where the server had drawn it."""
        again = pb.GenerateRequest()
        again.CopyFrom(request)
        if self._images and not request.parameter.HasField("seed"):
            index, image = next(iter(self._images.items()))
            again.parameter.seed = (image.seed - index) % 2**32
        return again


def _is_detached(request: pb.GenerateRequest | pb.AttachRequest) -> bool:
    return isinstance(request, pb.AttachRequest) or request.on_disconnect == pb.ON_DISCONNECT_DETACH


def was_admitted(error: grpc.RpcError) -> bool:
    """Whether the server had said that it began the job, before the call ended with `error`."""
    metadata = error.initial_metadata() if hasattr(error, "initial_metadata") else None
    return any(key == ADMITTED for key, _ in metadata or ())


@dataclass(frozen=True)
class Deadline:
    """When a request must be answered, on the clock that `now` is taken from; None for never."""

    at: float | None

    @classmethod
    def after(cls, timeout: float | None, now: float) -> "Deadline":
        return cls(None if timeout is None else now + timeout)

    def left(self, now: float) -> float | None:
        """The seconds that are left. Raises DeadlineExceeded if there are none for another call."""
        if self.at is None:
            return None
        if self.at <= now:
            raise DeadlineExceeded(TIMEOUT, grpc.StatusCode.DEADLINE_EXCEEDED)
        return self.at - now

    def within(self, seconds: float, now: float) -> "Deadline":
        """This deadline, or that of so many seconds from now if it is earlier."""
        return Deadline(now + seconds if self.at is None else min(self.at, now + seconds))
