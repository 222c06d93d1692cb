"""Decide which call follows when a connection or a server is lost. Pure: no channel, no clock.

A detached job outlives its connection, so its stream attaches again. Any other request is sent once more, and so is a
detached one whose server is lost. The seed is part of the request, so both servers draw the same images.
"""

from dataclasses import dataclass

import grpc

from ._exceptions import is_connection_broken, is_server_lost
from ._messages import read_event
from ._types import Done, Event, Image
from .v1 import text_to_image_pb2 as pb

ADMITTED_HEADER = "t2i-admitted"
"""The initial metadata of `Generate` by which the server says that it admitted the request."""
RESUME_SECONDS = 600.0
"""Time after which a stream without a deadline stops to look for its job: servers keep none longer, by default."""
_FIRST_DELAY, _LONGEST_DELAY = 0.2, 5.0  # seconds between attempts to attach


@dataclass(frozen=True)
class NextCall:
    """The call to make after an error: StreamGenerate or Attach, by the type of `request`, after `delay` seconds.

    `notice` is one line for the log. It is empty for repeated attempts.
    """

    request: pb.GenerateRequest | pb.AttachRequest
    delay: float = 0.0
    notice: str = ""


class Recovery:
    """The state of one event stream across all the calls that it takes.

    `request` is the request of the first call, `number` the number of the newest event, `resubmitted` how often the
    request was sent again. `done` is true after the last event, `complete` when the server may end the stream.
    """

    def __init__(self, request: pb.GenerateRequest | pb.AttachRequest, resubmit: int, resume: bool) -> None:
        self.request = request
        self.number = request.after if isinstance(request, pb.AttachRequest) else 0
        self.resubmitted = 0
        self.done = False
        self.complete = self.number > 0  # `after` may be the number of the job's last event
        self._resubmits_left = resubmit if isinstance(request, pb.GenerateRequest) else 0
        self._resume = resume and _is_detached(request)
        self._images: dict[int, Image] = {}
        self._admitted = False
        self._lost_at: float | None = None
        self._delay = _FIRST_DELAY

    def read(self, message: pb.StreamGenerateResponse) -> Event | None:
        """Return the event in `message`, or None for one to skip: an unknown kind, or an image delivered before."""
        self._admitted, self._lost_at, self._delay = True, None, _FIRST_DELAY
        self.number = max(self.number, message.number)
        if message.HasField("choice") and message.choice.choice_index in self._images:
            return None
        event = read_event(message, self._images)
        if event is not None:
            self.complete = self.done = isinstance(event, Done)
        return event

    def next_call(self, error: grpc.RpcError, now: float) -> NextCall | None:
        """Return the call that follows `error`, which ended the newest call at `now` seconds; None to raise it."""
        admitted = self._admitted or was_admitted(error)
        resuming = self._lost_at is not None
        if self._resume and is_connection_broken(error) and (resuming or is_server_lost(error, admitted)):
            return self._attach(now)
        forgotten = resuming and error.code() is grpc.StatusCode.NOT_FOUND
        if forgotten or is_server_lost(error, admitted):
            return self._resubmit()
        return None

    def _attach(self, now: float) -> NextCall | None:
        notice = ""
        if self._lost_at is None:
            self._lost_at = now
            notice = f"the connection broke; attaching to {self.request.request_id} again until it is back"
        if now - self._lost_at > RESUME_SECONDS:
            return None
        delay, self._delay = self._delay, min(2 * self._delay, _LONGEST_DELAY)
        return NextCall(pb.AttachRequest(request_id=self.request.request_id, after=self.number), delay, notice)

    def _resubmit(self) -> NextCall | None:
        if not self._resubmits_left or not isinstance(self.request, pb.GenerateRequest):
            return None
        self._resubmits_left -= 1
        self.resubmitted += 1
        self.number, self._admitted, self._lost_at, self._delay = 0, False, None, _FIRST_DELAY
        again = pb.GenerateRequest()
        again.CopyFrom(self.request)
        if self._images and not again.parameter.HasField("seed"):  # the server drew the seed of the delivered images
            index, image = next(iter(self._images.items()))
            again.parameter.seed = (image.seed - index) % 2**32
        return NextCall(again)


def may_resubmit(error: grpc.RpcError, resubmits_left: int) -> bool:
    """Return whether a unary call that ended with `error` is to be sent to another server."""
    return resubmits_left > 0 and is_server_lost(error, was_admitted(error))


def was_admitted(error: grpc.RpcError) -> bool:
    """Return whether the server said that it admitted the request, before the call ended with `error`."""
    metadata = error.initial_metadata() if hasattr(error, "initial_metadata") else None
    return any(key == ADMITTED_HEADER for key, _ in metadata or ())


def _is_detached(request: pb.GenerateRequest | pb.AttachRequest) -> bool:
    return isinstance(request, pb.AttachRequest) or request.on_disconnect == pb.ON_DISCONNECT_DETACH
