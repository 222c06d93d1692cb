"""The errors of calls, and the one table that gives each its gRPC status.

Exception
├── CallError              raised by this package
│   ├── Loading            the model is not ready yet
│   ├── Unauthenticated    the call has no known token
│   ├── InvalidRequest     some fields of the request are wrong; it lists all of them
│   ├── Undecodable        the request's bytes are not the method's Protobuf message
│   ├── Unimplemented      no such method
│   ├── UnknownModel       no such model
│   ├── UnknownJob         no such detached job
│   ├── JobAlreadyExists   another detached job has this name
│   ├── SlowReader         the client did not read its stream in time
│   └── InternalError      an unexpected exception, which the log has
├── images.ImageTooLarge   no coding of an image fits into its message
└── events.EngineError     a job was not admitted or did not finish, see engine/events.py

The messages of these errors are written for callers. The text of any other exception never leaves the server.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from server.api import images
from server.engine import events
from text_to_image_client.v1 import text_to_image_pb2 as pb

DEVICE_LOST = "DEVICE_LOST"
"""The reason in google.rpc.ErrorInfo by which clients recognise a lost device."""
_ERROR_DOMAIN = pb.DESCRIPTOR.package  # "text_to_image.v1"

TRAILER_BYTES = 4000
"""The limit on the trailers of a call that fails: message, details and our own metadata, as sent.

nginx buffers one page of 4096 bytes (grpc_buffer_size) and replaces larger trailers with UNAVAILABLE, which clients
retry. Most gRPC clients take 8 KiB and report larger trailers as RESOURCE_EXHAUSTED.
"""
_DETAILS = "grpc-status-details-bin"
_HEADER_BYTES = 32  # HPACK (RFC 7541, 4.1) counts them for each header, in addition to its name and value
_FIELD_BYTES, _DESCRIPTION_BYTES, _MESSAGE_BYTES = 128, 384, 768  # of UTF-8; longer texts are cut


class CallError(Exception):
    """A call cannot be served."""


class Loading(CallError):
    """The model is not ready yet."""


class Unauthenticated(CallError):
    """The call has no known token."""


@dataclass(frozen=True)
class Violation:
    """One wrong field, by its path of JSON names ("parameter.aspect-ratio"), and the rule that it breaks."""

    field: str
    description: str


class InvalidRequest(CallError):
    """Some fields of the request are wrong; `violations` has all of them."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(f"{each.field}: {each.description}" for each in self.violations))


class Undecodable(CallError):
    """The request's bytes are not the Protobuf message of its method."""

    def __init__(self) -> None:
        super().__init__("the request's bytes are not the Protobuf message that this method takes")


class Unimplemented(CallError):
    """The server has no such method."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path[:200]} is not served here; GetModel and reflection show what is")


class UnknownModel(CallError):
    """The server has no model of this name and version."""


class UnknownJob(CallError):
    """No detached job has this name, or it is no longer kept."""


class JobAlreadyExists(CallError):
    """Another detached job has this name."""


class SlowReader(CallError):
    """The client did not read its stream in time."""


class InternalError(CallError):
    """The server failed. Only its log has the cause."""

    def __init__(self) -> None:
        super().__init__("internal error; the server's log has the cause")


STATUS: dict[type[Exception], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    # gRPC's own libraries answer INTERNAL, which pages operators, although the caller is at fault.
    Undecodable: grpc.StatusCode.INVALID_ARGUMENT,
    Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    images.ImageTooLarge: grpc.StatusCode.INVALID_ARGUMENT,
    events.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    events.DeviceFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    # Neither gRPC nor a proxy retries ABORTED by itself: the same request may cost the next server its device, too.
    events.DeviceLost: grpc.StatusCode.ABORTED,
    events.DeviceUnavailable: grpc.StatusCode.UNAVAILABLE,
    Loading: grpc.StatusCode.UNAVAILABLE,
    events.Draining: grpc.StatusCode.UNAVAILABLE,
    events.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    events.Cancelled: grpc.StatusCode.CANCELLED,
    SlowReader: grpc.StatusCode.CANCELLED,
    UnknownModel: grpc.StatusCode.NOT_FOUND,
    UnknownJob: grpc.StatusCode.NOT_FOUND,
    JobAlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    events.ModelFailed: grpc.StatusCode.INTERNAL,
    InternalError: grpc.StatusCode.INTERNAL,
}
"""The status of every error that a caller may see. Other exceptions become InternalError."""


def status_of(error: Exception, max_bytes: int = TRAILER_BYTES) -> status_pb2.Status:
    """Return the google.rpc.Status of an error in STATUS, with its details: BadRequest, RetryInfo or ErrorInfo.

    It takes at most `max_bytes` of a call's trailers. For an InvalidRequest it has the first violations, as many as
    fit, and the number of the others.
    """
    if isinstance(error, InvalidRequest):
        return _bad_request(error.violations, max_bytes)
    message = _cut(str(error), _MESSAGE_BYTES)
    status = status_pb2.Status(code=STATUS[type(error)].value[0], message=message)
    if isinstance(error, events.ResourceExhausted) and error.retry_after < math.inf:
        retry_delay = Duration()
        retry_delay.FromMicroseconds(round(error.retry_after * 1e6))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=retry_delay))
    elif isinstance(error, events.DeviceLost):
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=DEVICE_LOST, domain=_ERROR_DOMAIN))
    return status


def _bad_request(violations: Sequence[Violation], max_bytes: int) -> status_pb2.Status:
    shown: list[Violation] = []
    status = status_pb2.Status(code=STATUS[InvalidRequest].value[0])
    for each in violations:
        shown.append(Violation(_cut(each.field, _FIELD_BYTES), _cut(each.description, _DESCRIPTION_BYTES)))
        others = len(violations) - len(shown)
        longer = status_pb2.Status(
            code=status.code, message=str(InvalidRequest(shown)) + (f"; and {others} more" if others else "")
        )
        bad_request = error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(field=each.field, description=each.description)
                for each in shown
            ]
        )
        longer.details.add().Pack(bad_request)
        if len(shown) > 1 and _trailer_bytes(longer) > max_bytes:
            break
        status = longer
    return status


def _cut(text: str, max_bytes: int) -> str:
    """Return the beginning of `text`, at most `max_bytes` of UTF-8."""
    encoded = text.encode()
    return text if len(encoded) <= max_bytes else encoded[: max_bytes - 3].decode(errors="ignore") + "..."


def _trailer_bytes(status: status_pb2.Status) -> int:
    """Return the size of a status in a call's trailers: the message percent-encoded, the details in base64."""
    message = sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in status.message.encode())
    details: int = -(-status.ByteSize() * 4 // 3)
    names = sum(_HEADER_BYTES + len(name) for name in ("grpc-status", "grpc-message", _DETAILS))
    return names + 2 + message + details


async def abort(context: "grpc.aio.ServicerContext[Any, Any]", error: Exception) -> None:
    """End a gRPC call by an error in STATUS: code, message, and trailing metadata with the details."""
    own = tuple(context.trailing_metadata() or ())
    status = status_of(error, TRAILER_BYTES - sum(_HEADER_BYTES + len(name) + len(value) for name, value in own))
    trailers = (*own, (_DETAILS, status.SerializeToString()))  # `abort` replaces the metadata set before
    try:
        await context.abort(STATUS[type(error)], status.message, trailing_metadata=trailers)
    except grpc.aio.InternalError:  # gRPC raises it if the caller has just left
        raise asyncio.CancelledError from None
