"""The client for threads: `TextToImage`, and `EventStream`, the iterator over the events of a request."""

import contextlib
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from grpc_health.v1.health_pb2_grpc import HealthStub

from ._base import VALIDATION_SECONDS, BaseClient, BaseEventStream, health_request, serving_status
from ._deadline import Deadline
from ._exceptions import FieldViolation, InvalidRequest, NotFound, TextToImageError, closed_error, translate_errors
from ._messages import (
    as_refusable,
    attach_request,
    cancel_request,
    invalid_request,
    read_model,
    read_result,
    with_server_violations,
)
from ._recovery import NextCall, Recovery, may_resubmit
from ._types import Event, GenerateOptions, ModelInfo, Result, ServingStatus
from .v1 import text_to_image_pb2 as pb
from .v1.text_to_image_pb2_grpc import TextToImageServiceStub

__all__ = ["EventStream", "TextToImage"]


class TextToImage(BaseClient):
    """A client of the text-to-image service at `target`. Threads may share one.

    with TextToImage("127.0.0.1:50051") as client:
        client.generate("cat napping", seed=1).images[0].save("cat.jpg")

    `target`: "host:port", "host" alone for port 50051, "unix:/path" for a socket file, or another gRPC URI. A loopback
    target never goes through the proxy of the environment.

    `timeout`: seconds for each call that sets none of its own, all attempts included. None and infinity mean no limit.

    `retries`, 0 to 4: attempts that gRPC makes when the service is unavailable, with exponential backoff, about 3
    seconds in all. gRPC retries no request that the server has admitted.

    `resubmit`, 0 or 1: how often `generate` and `stream` send a request again when its server is lost, to another
    replica if `target` has several. With `retries=0, resubmit=0` no call is sent twice.

    `tls`: True for a service with TLS, or `TLS` with certificates. `token`: the bearer token, if the service asks for
    one. Over a network a token needs TLS, otherwise others can read it.

    `round_robin`: for a target with several addresses, for example "dns:///NAME:PORT" with the name of a headless
    Service, or "ipv4:HOST:PORT,HOST:PORT". Calls rotate over the servers whose health is SERVING. Only the server that
    runs a detached job knows it, so follow detached jobs at that server's own address.

    All calls raise subclasses of `TextToImageError`. If no server listens at `target`, that is `Unavailable`. The
    constructor raises ValueError or TypeError for a bad argument.
    """

    def _open_channel(self) -> None:
        if self._credentials is None:
            self._channel = grpc.insecure_channel(self.target, self._options)
        else:
            self._channel = grpc.secure_channel(self.target, self._credentials, self._options)
        self._stub = TextToImageServiceStub(self._channel)
        self._health: Any = HealthStub(self._channel)  # types-grpcio-health-checking declares no methods

    def generate(self, prompt: str, *, timeout: float | None = None, **options: Unpack[GenerateOptions]) -> Result:
        """Draw `prompt` and return all its images. `options` are those of `GenerateOptions`."""
        deadline = self._deadline(timeout)
        request = self._request(prompt, options, deadline)
        resubmits_left = self._resubmit
        with self._translate_errors():
            while True:
                try:
                    return read_result(self._stub.Generate(request, **self._call_options(deadline)))
                except grpc.RpcError as error:
                    if not may_resubmit(error, resubmits_left):
                        raise
                    resubmits_left -= 1

    def stream(
        self, prompt: str, *, timeout: float | None = None, resume: bool = True, **options: Unpack[GenerateOptions]
    ) -> "EventStream":
        """Draw `prompt` and return an iterator over its events, the last of which is `Done`.

        The call begins at once. Closing the iterator, leaving its `with` block or dropping it cancels the call, and
        the device is free within one step, unless the request is detached. With `resume`, the stream of a detached
        request attaches again after the connection broke.
        """
        deadline = self._deadline(timeout)
        request = self._request(prompt, options, deadline)
        return EventStream(self, Recovery(request, self._resubmit, resume), deadline)

    def attach(
        self, request_id: str, after: int = 0, *, timeout: float | None = None, resume: bool = True
    ) -> "EventStream":
        """Follow a detached job and return an iterator over its events after number `after`, past and future.

        `timeout` limits the stream and not the job. `Done.result` has the images whose events came after `after`. The
        stream of a failed job raises the job's error. It raises `NotFound` for a job that the server does not know or
        no longer keeps. With `resume`, the stream attaches again after the connection broke.
        """
        request = attach_request(request_id, after)
        return EventStream(self, Recovery(request, 0, resume), self._deadline(timeout))

    def cancel(self, request_id: str, *, timeout: float | None = None) -> None:
        """End a detached job if it still runs, and delete its images. Raises `NotFound`."""
        request = cancel_request(request_id)
        with self._translate_errors():
            self._stub.Cancel(request, **self._call_options(self._deadline(timeout)))

    def model(self, *, timeout: float | None = None) -> ModelInfo:
        """Return the served model with its defaults and limits. Raises `Unavailable` until it is loaded."""
        options = self._call_options(self._deadline(timeout))
        with self._translate_errors():
            return read_model(self._stub.GetModel(pb.GetModelRequest(), **options))

    def health(self, service: str = "", *, timeout: float | None = None) -> ServingStatus:
        """Return the grpc.health.v1 status of `service`, "" for the whole server. gRPC does not retry this call."""
        request = health_request(service)
        options = self._call_options(self._deadline(timeout))
        try:
            with self._translate_errors():
                return serving_status(self._health.Check(request, **options))
        except NotFound:
            return ServingStatus.SERVICE_UNKNOWN  # Check reports an unknown service by this status

    def close(self) -> None:
        """Close the connection. Calls in flight are cancelled, and later calls raise `Cancelled`."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, prompt: str, options: GenerateOptions, deadline: Deadline) -> pb.GenerateRequest:
        """Return the request to send. Raises InvalidRequest if no message can carry it."""
        request, violations = self._draft(prompt, options)
        if violations:
            raise self._invalid_request(request, violations, deadline)
        return request

    def _invalid_request(
        self, request: pb.GenerateRequest, violations: tuple[FieldViolation, ...], deadline: Deadline
    ) -> InvalidRequest:
        """Return the error for `violations`, and for those that the server finds in the rest of the request."""
        try:
            options = self._call_options(deadline.within(VALIDATION_SECONDS, time.monotonic()))
            with self._translate_errors():
                self._stub.Generate(as_refusable(request), **options)
        except InvalidRequest as error:
            return invalid_request(with_server_violations(violations, error.violations))
        except TextToImageError:
            pass  # the violations found here hold, whatever the server answers
        return invalid_request(violations)

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Raise gRPC's errors as subclasses of TextToImageError, and Cancelled if this client is closed."""
        if self._closed:
            raise closed_error()
        try:
            with translate_errors(self.target):
                yield
        except ValueError:  # gRPC raises it for a channel that was closed just now
            if not self._closed:
                raise
            raise closed_error() from None

    def _start_stream(self, request: pb.GenerateRequest | pb.AttachRequest, deadline: Deadline) -> Any:
        options = self._call_options(deadline)
        with self._translate_errors():
            if isinstance(request, pb.AttachRequest):
                return self._stub.Attach(request, **options)
            return self._stub.StreamGenerate(request, **options)


class EventStream(BaseEventStream, Iterator[Event]):
    """Iterate over the events of one request as they happen. A context manager; leaving it early cancels the call."""

    _client: TextToImage

    def __init__(self, client: TextToImage, recovery: Recovery, deadline: Deadline) -> None:
        super().__init__(client, recovery, deadline)
        self._closed = threading.Event()
        self._call: Any = None
        self._call = client._start_stream(recovery.request, deadline)

    def __next__(self) -> Event:
        while True:
            try:
                for message in self._call:
                    event = self._recovery.read(message)
                    if event is not None:
                        if self._recovery.done:
                            self._read_status()
                        return event
            except grpc.RpcError as error:
                if self._recovery.done:
                    break
                self._make(*self._next_call(error))
            else:
                self._check_complete()
                break
        raise StopIteration

    def _read_status(self) -> None:
        """Read the status that follows the last event.

        Otherwise a caller that closes the stream after that event makes the server count the call as cancelled.
        """
        with contextlib.suppress(grpc.RpcError):  # the answer is complete, however the connection ends
            for _ in self._call:
                pass

    def _make(self, call: NextCall, delay: float) -> None:
        self._closed.wait(delay)
        if not self._closed.is_set():
            self._call = self._client._start_stream(call.request, self._deadline)
        if self._closed.is_set():  # by another thread, before the call or while it began
            self.close()

    def _is_closed(self) -> bool:
        return self._closed.is_set()

    def close(self) -> None:
        """Cancel the call if it is in flight."""
        self._closed.set()
        if self._call is not None:
            self._call.cancel()

    def __del__(self) -> None:
        self.close()  # leaving a `for` loop by `break` drops its iterator without closing it

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
