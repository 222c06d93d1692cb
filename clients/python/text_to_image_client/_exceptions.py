"""What can go wrong, as one tree, and the one table that leads from a gRPC status to it.

TextToImageError
├── InvalidRequest     INVALID_ARGUMENT: the request breaks a rule; `.violations` names every bad field
├── Unavailable        UNAVAILABLE: nobody there, the model is loading, or the server is draining
├── Refused            RESOURCE_EXHAUSTED: the queue is full; `.retry_after` says for how long
├── Unauthenticated    UNAUTHENTICATED: the service needs a token, or does not know this one
├── NotFound           NOT_FOUND: no detached job has this name, or no longer
├── AlreadyExists      ALREADY_EXISTS: the name is that of another detached job
├── DeadlineExceeded   DEADLINE_EXCEEDED: the call's timeout passed
├── Cancelled          CANCELLED: the call was given up, here or on its way
└── ServerError        every other status: the server failed
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
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


class Unauthenticated(TextToImageError):
    """The service needs a token, or does not know the one that was sent."""


class NotFound(TextToImageError):
    """No detached job has this `request_id` on this server, or it ended too long ago to be kept."""


class AlreadyExists(TextToImageError):
    """The `request_id` is that of another detached job: this request cannot join it."""


class DeadlineExceeded(TextToImageError):
    """The call's timeout passed before its answer was complete."""


class Cancelled(TextToImageError):
    """The call was given up before its answer was complete."""


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


def error_from(error: grpc.RpcError, target: str) -> TextToImageError:
    """The tree's error for gRPC's `error` in a call to `target`."""
    code = error.code()
    message = error.details() or code.name
    if code is grpc.StatusCode.UNAVAILABLE:
        message = f"{target}: {message}"
    return _BY_CODE.get(code, ServerError)._from_status(message, code, _details(error))


def _details(error: grpc.RpcError) -> Status:
    # grpc.aio's errors answer the same three questions as grpc's, so rpc_status reads both.
    try:
        return cast("Status | None", rpc_status.from_call(cast("grpc.Call", error))) or Status()
    except (ValueError, DecodeError):
        # Details that contradict the status, or that nobody can read: the status alone still tells the kind.
        return Status()
