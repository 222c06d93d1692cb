"""The parts that the threaded and the asyncio client share: arguments, deadlines, and what follows an error.

gRPC itself carries out retries, deadlines and cancellation. These classes configure them and make no call.
"""

import logging
import time
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health_pb2

from ._channel import (
    MAX_RESUBMIT,
    MAX_RETRIES,
    TLS,
    call_metadata,
    channel_credentials,
    channel_options,
    check_count,
)
from ._deadline import Deadline, check_timeout
from ._exceptions import FieldViolation, ServerError, closed_error, error_from
from ._messages import draft_request, with_seed
from ._recovery import NextCall, Recovery
from ._target import complete_target
from ._types import GenerateOptions, ServingStatus
from .v1 import text_to_image_pb2 as pb

VALIDATION_SECONDS = 5.0
"""Time that a server has to name the other bad fields of a request that no message can carry."""

_log = logging.getLogger("text_to_image_client")


class BaseClient:
    """The arguments and the state of a client. Subclasses own the channel and make the calls."""

    def __init__(
        self,
        target: str,
        *,
        timeout: float | None = None,
        retries: int = MAX_RETRIES,
        resubmit: int = MAX_RESUBMIT,
        tls: TLS | bool | None = None,
        token: str | None = None,
        round_robin: bool = False,
    ) -> None:
        self.target = complete_target(target)
        self._timeout = check_timeout(timeout)
        self._resubmit = check_count("resubmit", resubmit, MAX_RESUBMIT)
        self._metadata = call_metadata(token)
        self._options = channel_options(self.target, retries, round_robin)
        self._credentials = channel_credentials(tls)
        self._closed = False
        self._open_channel()

    def _open_channel(self) -> None:
        raise NotImplementedError

    def __reduce__(self) -> NoReturn:
        name = type(self).__name__
        raise TypeError(f"{name} cannot be pickled, since its connection belongs to this process; make one in each")

    def _deadline(self, timeout: float | None) -> Deadline:
        return Deadline.after(self._timeout if timeout is None else check_timeout(timeout), time.monotonic())

    def _call_options(self, deadline: Deadline) -> dict[str, Any]:
        return {"timeout": deadline.left(time.monotonic()), "metadata": self._metadata}

    def _draft(self, prompt: str, options: GenerateOptions) -> tuple[pb.GenerateRequest, tuple[FieldViolation, ...]]:
        """Return the request to send, and the violations that no message can carry."""
        request, violations = draft_request(prompt, options)
        return (with_seed(request) if self._resubmit else request), violations


class BaseEventStream:
    """The state of an event stream. Subclasses own the call and read it."""

    def __init__(self, client: BaseClient, recovery: Recovery, deadline: Deadline) -> None:
        self._client = client
        self._recovery = recovery
        self._deadline = deadline

    @property
    def number(self) -> int:
        """The number of the newest event so far, for `attach(after=...)`. A resubmitted request restarts at 1."""
        return self._recovery.number

    @property
    def resubmitted(self) -> int:
        """How often the request was sent again because its server was lost: 0 or 1."""
        return self._recovery.resubmitted

    def _is_closed(self) -> bool:
        raise NotImplementedError

    def _check_open(self) -> None:
        """Raise Cancelled if this stream or its client is closed."""
        if self._is_closed():
            raise closed_error("stream")
        if self._client._closed:
            raise closed_error()

    def _next_call(self, error: grpc.RpcError) -> tuple[NextCall, float]:
        """Return the call that follows `error`, and the seconds to wait before it. Raises the error if none does."""
        self._check_open()
        target = self._client.target
        call = self._recovery.next_call(error, time.monotonic())
        if call is None:
            raise error_from(error, target) from error
        if call.notice:
            _log.info("%s: %s", target, call.notice)
        left = self._deadline.left(time.monotonic())
        return call, call.delay if left is None else min(call.delay, left)

    def _check_complete(self) -> None:
        if not self._recovery.complete:
            raise ServerError("the stream ended before its `done` event", grpc.StatusCode.INTERNAL)


def health_request(service: str) -> health_pb2.HealthCheckRequest:
    """Return the request for the health of `service`, "" for the whole server."""
    if not isinstance(service, str) or any("\ud800" <= each <= "\udfff" for each in service):
        raise TypeError(f"service must be the full name of a service, or empty, not {service!r}")
    return health_pb2.HealthCheckRequest(service=service)


def serving_status(response: health_pb2.HealthCheckResponse) -> ServingStatus:
    """Return the status in `response`, UNKNOWN for one that is newer than this client."""
    statuses = health_pb2.HealthCheckResponse.ServingStatus
    if response.status not in statuses.values():
        return ServingStatus.UNKNOWN
    return ServingStatus(statuses.Name(response.status))
