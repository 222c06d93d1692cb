"""The errors of the client as one tree, and the table from gRPC statuses to them.

TextToImageError
├── InvalidRequest     INVALID_ARGUMENT: the request breaks a rule; `.violations` names every bad field
├── Unavailable        UNAVAILABLE: no server listens, the model is loading, or the server is draining
├── ResourceExhausted  RESOURCE_EXHAUSTED: the queue is full; `.retry_after` is the time to wait
├── MessageTooLarge    RESOURCE_EXHAUSTED from gRPC itself: a message or its metadata exceed a limit
├── Unauthenticated    UNAUTHENTICATED: the service needs a token, or does not know this one
├── NotFound           NOT_FOUND: the server knows no detached job of this name, or no longer keeps it
├── AlreadyExists      ALREADY_EXISTS: another detached job has this name
├── DeadlineExceeded   DEADLINE_EXCEEDED: the call's timeout passed, or is too short for the request
├── Cancelled          CANCELLED: the call was cancelled, or the client is closed
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
    "MessageTooLarge",
    "NotFound",
    "ResourceExhausted",
    "ServerError",
    "TextToImageError",
    "Unauthenticated",
    "Unavailable",
]


@dataclass(frozen=True)
class FieldViolation:
    """One bad field: `field` is its JSON path ("parameter.aspect-ratio"), `description` the rule that it breaks."""

    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}"


class TextToImageError(Exception):
    """The base of all errors of this client. `message` is the server's message, `code` the gRPC status."""

    def __init__(self, message: str, code: grpc.StatusCode) -> None:
        super().__init__(message)
        self.message = message
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception.__reduce__ calls the class with `args`, which lack the code. This one restores all attributes and
        # calls no __init__, so that errors leave worker processes unchanged.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]

    @classmethod
    def _from_status(cls, message: str, code: grpc.StatusCode, details: Status) -> Self:
        return cls(message, code)


class InvalidRequest(TextToImageError):
    """The request breaks a rule. The server found it, or the client before sending. Do not send it again."""

    def __init__(
        self,
        message: str,
        code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT,
        violations: tuple[FieldViolation, ...] = (),
    ) -> None:
        super().__init__(message, code)
        self.violations = violations

    def __str__(self) -> str:
        missing = [str(each) for each in self.violations if each.description not in self.message]
        return "\n  ".join([self.message, *missing])

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


class ResourceExhausted(TextToImageError):
    """The queue is full. `retry_after` is the time to wait in seconds, None if the server gave none."""

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


class MessageTooLarge(TextToImageError):
    """A message or its metadata exceed a limit of gRPC itself, in the client, the server or a proxy."""


class Unauthenticated(TextToImageError):
    """The service needs a token, or does not know the token of this client."""


class NotFound(TextToImageError):
    """The server knows no detached job with this `request_id`, or no longer keeps it."""


class AlreadyExists(TextToImageError):
    """Another detached job has this `request_id`, and the request differs from that job's."""


class DeadlineExceeded(TextToImageError):
    """The timeout passed before the answer was complete, or is too short for the request on this server."""


class Cancelled(TextToImageError):
    """The call was cancelled before its answer was complete, or its client is closed."""


class ServerError(TextToImageError):
    """The server failed, or its answer violates the contract."""


_BY_CODE: dict[grpc.StatusCode, type[TextToImageError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
}


@contextmanager
def translate_errors(target: str) -> Iterator[None]:
    """Raise the errors of grpc and grpc.aio as subclasses of TextToImageError."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_from(error, target) from error


TIMEOUT_MESSAGE = "the timeout passed before the answer was complete"


def closed_error(what: str = "client") -> Cancelled:
    """Return the error of a call on a closed client or stream."""
    return Cancelled(f"this {what} is closed; make another one", grpc.StatusCode.CANCELLED)


def error_from(error: grpc.RpcError, target: str) -> TextToImageError:
    """Return the TextToImageError for gRPC's `error` in a call to `target`."""
    code = error.code()
    message = error.details() or code.name
    details = _details(error)
    if code is grpc.StatusCode.UNAVAILABLE:
        message = f"{target}: {message}"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and not details.code:
        message = TIMEOUT_MESSAGE  # gRPC says "Deadline Exceeded", or "Stream removed (Deadline Exceeded)"
    if code in _BROKEN_CODES and is_connection_broken(error):
        message = f"{target}: the connection broke, or a proxy cut it ({message})"
    kind = _BY_CODE.get(code, ServerError)
    if kind is ResourceExhausted and not details.code and _TOO_LARGE.search(message):
        kind = MessageTooLarge
    return kind._from_status(message, code, details)


# Messages of gRPC's C core and of servers in other languages: "received metadata size exceeds hard limit", "Received
# message larger than max (5 vs. 4)", "trying to send message larger than max".
_TOO_LARGE = re.compile(r"(metadata|message|header).*(exceed|larger|too large)", re.IGNORECASE)

# Messages of gRPC for a broken connection or a call that a proxy cut, with the codes INTERNAL, UNKNOWN and CANCELLED.
# Errors of the service itself carry a google.rpc.Status, so they are never mistaken for these.
_BROKEN = re.compile(r"RST_STREAM|Stream removed|http2|HTTP/2|HTTP status|Socket closed|Connection reset|GOAWAY", re.I)
_BROKEN_CODES = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED}
_NOT_CONNECTED = re.compile("failed to connect|DNS|name resol|connections to all backends", re.IGNORECASE)

DOMAIN = "text_to_image.v1"
"""The domain of google.rpc.ErrorInfo in the service's errors."""
DEVICE_LOST = "DEVICE_LOST"
"""The reason in the ErrorInfo of a job whose device stopped answering."""


def is_connection_broken(error: grpc.RpcError) -> bool:
    """Return whether the connection broke or was never established, so that the state of the request is unknown."""
    code = error.code()
    if code is grpc.StatusCode.UNAVAILABLE:
        return True
    return code in _BROKEN_CODES and not _details(error).code and bool(_BROKEN.search(error.details() or ""))


def is_server_lost(error: grpc.RpcError, admitted: bool) -> bool:
    """Return whether the server that ran the request is lost, so that the client may send it to another.

    `admitted`: whether the server is known to have admitted the request. gRPC itself retries requests that a server
    rejected or that reached none.
    """
    if error.code() is grpc.StatusCode.ABORTED:
        return _reason(error) == DEVICE_LOST
    if not is_connection_broken(error):
        return False
    answered = bool(_details(error).code)  # by the service itself
    return admitted or not (answered or _NOT_CONNECTED.search(error.details() or ""))


def _reason(error: grpc.RpcError) -> str:
    info = ErrorInfo()
    reasons = [info.reason for each in _details(error).details if each.Unpack(info) and info.domain == DOMAIN]
    return reasons[0] if reasons else ""


def _details(error: grpc.RpcError) -> Status:
    # grpc.aio's errors have the methods that rpc_status reads from grpc's.
    try:
        return cast("Status | None", rpc_status.from_call(cast("grpc.Call", error))) or Status()
    except (ValueError, DecodeError):
        # The details contradict the status or cannot be parsed. The status alone still selects the error class.
        return Status()
