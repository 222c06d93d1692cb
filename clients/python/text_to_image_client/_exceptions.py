"""What can go wrong, as one tree, and the one table that leads from a gRPC status to it.

TextToImageError
├── InvalidRequest     INVALID_ARGUMENT: the request breaks a rule; `.violations` names every bad field
├── Unavailable        UNAVAILABLE: nobody there, the model is loading, or the server is draining
├── Refused            RESOURCE_EXHAUSTED: the queue is full; `.retry_after` says for how long
├── TooLarge           RESOURCE_EXHAUSTED of gRPC itself: a message or its metadata exceed a limit, here or on the way
├── Unauthenticated    UNAUTHENTICATED: the service needs a token, or does not know this one
├── NotFound           NOT_FOUND: no detached job has this name, or no longer
├── AlreadyExists      ALREADY_EXISTS: the name is that of another detached job
├── DeadlineExceeded   DEADLINE_EXCEEDED: the call's timeout passed, or is too short for the request
├── Cancelled          CANCELLED: the call was given up, here or on its way, or its client is closed
└── ServerError        every other status: the server failed
"""

import copyreg
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

__all__ = [
    "AlreadyExists",
    "Cancelled",
    "DeadlineExceeded",
    "FieldViolation",
    "InvalidRequest",
    "NotFound",
    "Refused",
    "ServerError",
    "TextToImageError",
    "TooLarge",
    "Unauthenticated",
    "Unavailable",
]


@dataclass(frozen=True)
class FieldViolation:
    """One bad field: `field` in the request's JSON names ("parameter.aspect-ratio"), `description` what is wrong."""

    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}"


class TextToImageError(Exception):
    """Base of all errors of this client. `message` is the server's, `code` the gRPC status behind it."""

    def __init__(self, message: str, code: grpc.StatusCode) -> None:
        super().__init__(message)
        self.message = message
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own calls the class with `args` alone, which lack the code. This way an error of a worker process
        # arrives whole: the attributes are set, and no __init__ is called.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]

    @classmethod
    def _from_status(cls, message: str, code: grpc.StatusCode, details: Status) -> Self:
        return cls(message, code)


class InvalidRequest(TextToImageError):
    """The request breaks a rule, found by the server or, before sending, here. Sending it again won't help."""

    def __init__(
        self,
        message: str,
        code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT,
        violations: tuple[FieldViolation, ...] = (),
    ) -> None:
        super().__init__(message, code)
        self.violations = violations

    def __str__(self) -> str:
        untold = [str(each) for each in self.violations if each.description not in self.message]
        return "\n  ".join([self.message, *untold])

    @classmethod
    def _from_status(cls, message: str, code: grpc.StatusCode, details: Status) -> Self:
        bad_request = BadRequest()
        for detail in details.details:
            if detail.Unpack(bad_request):
                break
        violations = tuple(FieldViolation(v.field, v.description) for v in bad_request.field_violations)
        return cls(message, code, violations)


class Unavailable(TextToImageError):
    """The service cannot be reached, is loading its model, or is draining. The message begins with the target."""


class Refused(TextToImageError):
    """The service is full. `retry_after` is in seconds, None if the server did not say."""

    def __init__(
        self,
        message: str,
        code: grpc.StatusCode = grpc.StatusCode.RESOURCE_EXHAUSTED,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, code)
        self.retry_after = retry_after

    @classmethod
    def _from_status(cls, message: str, code: grpc.StatusCode, details: Status) -> Self:
        retry_info = RetryInfo()
        for detail in details.details:
            if detail.Unpack(retry_info):
                return cls(message, code, retry_info.retry_delay.ToTimedelta().total_seconds())
        return cls(message, code)


class TooLarge(TextToImageError):
    """A message or its metadata exceed a limit of gRPC itself, here, at the server or on the way."""


class Unauthenticated(TextToImageError):
    """The service needs a token, or does not know the one that was sent."""


class NotFound(TextToImageError):
    """No detached job has this `request_id` on this server, or it ended too long ago to be kept."""


class AlreadyExists(TextToImageError):
    """The `request_id` is that of another detached job: this request cannot join it."""


class DeadlineExceeded(TextToImageError):
    """The call's timeout passed before its answer was complete, or is too short for the request on this server."""


class Cancelled(TextToImageError):
    """The call was given up before its answer was complete, or its client is closed."""


class ServerError(TextToImageError):
    """The server failed, or answered with what its contract does not allow."""


_BY_CODE: dict[grpc.StatusCode, type[TextToImageError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Refused,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
}


@contextmanager
def translated(target: str) -> Iterator[None]:
    """Raise what gRPC raises, from grpc or grpc.aio, as the error of the tree above."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_from(error, target) from error


TIMEOUT = "the timeout passed before the answer was complete"


def closed_error(what: str = "client") -> Cancelled:
    """The error of a call to a client that is closed, or of a stream that is."""
    return Cancelled(f"this {what} is closed; make another one", grpc.StatusCode.CANCELLED)


def error_from(error: grpc.RpcError, target: str) -> TextToImageError:
    """The tree's error for gRPC's `error` in a call to `target`."""
    code = error.code()
    message = error.details() or code.name
    details = _details(error)
    if code is grpc.StatusCode.UNAVAILABLE:
        message = f"{target}: {message}"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and not details.code:
        message = TIMEOUT  # in gRPC's words "Deadline Exceeded", or "Stream removed (Deadline Exceeded)"
    if code in _BROKEN_CODES and is_broken(error):
        message = f"{target}: the connection broke, or a proxy cut it ({message})"
    kind = _BY_CODE.get(code, ServerError)
    if kind is Refused and not details.code and _TOO_LARGE.search(message):
        kind = TooLarge
    return kind._from_status(message, code, details)


# In gRPC's own words, those of its C core and of other languages' servers: "received metadata size exceeds hard limit",
# "Received message larger than max (5 vs. 4)", "trying to send message larger than max".
_TOO_LARGE = re.compile(r"(metadata|message|header).*(exceed|larger|too large)", re.IGNORECASE)

# What gRPC says of a connection that broke, or of a proxy that cut a call, under INTERNAL, UNKNOWN and CANCELLED. A
# server's own errors never say it: theirs come with a status in words of their own.
_BROKEN = re.compile(r"RST_STREAM|Stream removed|http2|HTTP/2|HTTP status|Socket closed|Connection reset|GOAWAY", re.I)
_BROKEN_CODES = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED}
_NOT_CONNECTED = re.compile("failed to connect|DNS|name resol|connections to all backends", re.IGNORECASE)

DOMAIN = "text_to_image.v1"
"""Of google.rpc.ErrorInfo in the service's errors."""
DEVICE_LOST = "DEVICE_LOST"
"""The reason in the ErrorInfo of a job whose device did not answer any more."""


def is_broken(error: grpc.RpcError) -> bool:
    """Whether the connection to the server broke, or was never made: nothing is known of what the server did."""
    code = error.code()
    if code is grpc.StatusCode.UNAVAILABLE:
        return True
    return code in _BROKEN_CODES and not _details(error).code and bool(_BROKEN.search(error.details() or ""))


def is_gone(error: grpc.RpcError, admitted: bool) -> bool:
    """Whether the server that had the request is gone, so that another one may have it.

    `admitted` says whether the server is known to have begun it. A request that was refused before, or that reached
    no server at all, is gRPC's to send again.
    """
    if error.code() is grpc.StatusCode.ABORTED:
        return _reason(error) == DEVICE_LOST
    if not is_broken(error):
        return False
    answered = bool(_details(error).code)  # the server's own words, and not those of a broken connection
    return admitted or not (answered or _NOT_CONNECTED.search(error.details() or ""))


def _reason(error: grpc.RpcError) -> str:
    info = ErrorInfo()
    reasons = [info.reason for each in _details(error).details if each.Unpack(info) and info.domain == DOMAIN]
    return reasons[0] if reasons else ""


def _details(error: grpc.RpcError) -> Status:
    # grpc.aio's errors answer the same three questions as grpc's, so rpc_status reads both.
    try:
        return cast("Status | None", rpc_status.from_call(cast("grpc.Call", error))) or Status()
    except (ValueError, DecodeError):
        # Details that contradict the status, or that nobody can read: the status alone still tells the kind.
        return Status()
