"""The client, once for threads and once for asyncio, over the request building and message reading of _messages.

Retries, deadlines and cancellation are gRPC's own; this file sets them, and makes the calls that _course decides on.
"""

import asyncio
import contextlib
import json
import logging
import math
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self, Unpack, cast

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from ._course import Course, Deadline, Step, was_admitted
from ._exceptions import (
    FieldViolation,
    InvalidRequest,
    NotFound,
    ServerError,
    TextToImageError,
    closed_error,
    error_from,
    is_gone,
    translated,
)
from ._messages import (
    MAX_MESSAGE_BYTES,
    as_refusable,
    attach_request,
    cancel_request,
    draft_request,
    invalid,
    read_model,
    read_result,
    with_seed,
    with_those_of_the_server,
)
from ._target import complete, is_loopback
from ._types import Event, GenerateOptions, ModelInfo, Result, ServingStatus
from .v1 import text_to_image_pb2 as pb
from .v1.text_to_image_pb2_grpc import TextToImageServiceStub

if TYPE_CHECKING:
    from .v1.text_to_image_pb2_grpc import TextToImageServiceAsyncStub

__all__ = ["TLS", "AsyncEventStream", "AsyncTextToImage", "EventStream", "TextToImage"]

_log = logging.getLogger("text_to_image_client")

MAX_RETRIES = 4  # gRPC makes at most five attempts, whatever it is told
MAX_RESUBMIT = 1  # a request that ends its servers ends two of them at most
_LONGEST_TIMEOUT = 1e8  # seconds, three years; longer ones never pass
_CHECK_SECONDS = 5.0  # that a server has to say what else is wrong with a request
_MAX_RECONNECT_MS = 5000  # a server that comes back at its address has its share of calls soon, not in two minutes


@dataclass(frozen=True)
class TLS:
    """How to make sure of the service, and it of this client. All are PEM files, read when the client is made.

    `ca` has the certificates to trust, by default those that gRPC comes with; `certificate` and `key` are this
    client's own, for a service that asks for them.
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises OSError for a file that cannot be read, ValueError for one that is no PEM or lacks its counterpart."""
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together")
        ca, key, certificate = (
            _read_pem(Path(file)) if file is not None else None for file in (self.ca, self.key, self.certificate)
        )
        return grpc.ssl_channel_credentials(ca, key, certificate)


class TextToImage:
    """A text-to-image service at `target` for threads. Many threads may share one.

    with TextToImage("127.0.0.1:50051") as client:
        client.generate("cat napping", seed=1).images[0].save("cat.jpg")

    `target` is "host:port", or "host" alone for port 50051, "unix:/path" for a socket file, or another of gRPC's URIs.
    No proxy of the environment stands between this client and a target on its own machine.

    `timeout` in seconds holds for every call that does not set its own, with all that is tried within it; None and
    infinity wait as long as it takes. `retries`, 0 to 4, are made by gRPC when the service is unavailable, with
    exponential backoff, about 3 seconds in all, and never once an answer has begun. `resubmit`, 0 or 1: how often
    `generate` and `stream` make a request again, on another replica, when the one that had it is gone. With both 0 no
    call is ever sent twice.

    `tls` is True for a service with TLS, or `TLS` with certificates; `token` is for a service that asks who calls;
    over a network, a token needs TLS, or others can read it. Every call raises the errors of `TextToImageError`;
    nobody listening at `target` is `Unavailable`. ValueError or TypeError, from here alone, is a bad argument.

    `round_robin` is for a target of several addresses, such as "dns:///NAME:PORT" with a headless Service's name or
    "ipv4:HOST:PORT,HOST:PORT": calls go in turn to those whose health is SERVING, so that none meets a server that
    loads or drains. Detached jobs are to be had from their own server alone, so follow them without it.
    """

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
        self.target = complete(target)
        self._timeout = _checked_timeout(timeout)
        self._resubmit = _checked("resubmit", resubmit, MAX_RESUBMIT)
        self._metadata = _metadata(token)
        self._closed = False
        options = _channel_options(self.target, retries, round_robin)
        credentials = _credentials(tls)
        if credentials is None:
            self._channel = grpc.insecure_channel(self.target, options)
        else:
            self._channel = grpc.secure_channel(self.target, credentials, options)
        self._service = TextToImageServiceStub(self._channel)
        self._health: Any = HealthStub(self._channel)  # the stubs of types-grpcio-health-checking know no methods

    def generate(self, prompt: str, *, timeout: float | None = None, **options: Unpack[GenerateOptions]) -> Result:
        """Draw `prompt` and wait for all its images. `GenerateOptions` has the options, all optional."""
        deadline = self._deadline(timeout)
        request = self._request(prompt, options, deadline)
        resubmits = self._resubmit
        with self._calling():
            while True:
                try:
                    return read_result(self._service.Generate(request, **self._call_options(deadline)))
                except grpc.RpcError as error:
                    if not resubmits or not is_gone(error, was_admitted(error)):
                        raise
                    resubmits -= 1

    def stream(
        self, prompt: str, *, timeout: float | None = None, resume: bool = True, **options: Unpack[GenerateOptions]
    ) -> "EventStream":
        """Draw `prompt` and follow it: an iterator over events, the last of which is `Done`.

        The call begins at once. Closing the iterator, leaving its `with` block or dropping it cancels the call, and
        the device is free within one step, unless the request is to be detached. With `resume`, the stream of a
        detached request attaches to it again by itself when the connection breaks.
        """
        deadline = self._deadline(timeout)
        request = self._request(prompt, options, deadline)
        return EventStream(self, Course(request, self._resubmit, resume), deadline)

    def attach(
        self, request_id: str, after: int = 0, *, timeout: float | None = None, resume: bool = True
    ) -> "EventStream":
        """Follow a detached job: its events after number `after`, those that have happened and those that will.

        `timeout` is the stream's alone. `Done.result` has those images whose events came after `after`. A job that
        failed raises its error again; `NotFound` is one that is not known here, or no longer kept. With `resume`, the
        stream attaches again by itself when the connection breaks.
        """
        request = attach_request(request_id, after)
        return EventStream(self, Course(request, 0, resume), self._deadline(timeout))

    def cancel(self, request_id: str, *, timeout: float | None = None) -> None:
        """End a detached job, if it still runs, and have it forgotten in either case. Raises `NotFound`."""
        request = cancel_request(request_id)
        with self._calling():
            self._service.Cancel(request, **self._call_options(self._deadline(timeout)))

    def model(self, *, timeout: float | None = None) -> ModelInfo:
        """What is served, with its defaults and limits. `Unavailable` until the model is loaded."""
        options = self._call_options(self._deadline(timeout))
        with self._calling():
            return read_model(self._service.GetModel(pb.GetModelRequest(), **options))

    def health(self, service: str = "", *, timeout: float | None = None) -> ServingStatus:
        """The state of `service`, "" for the whole server, by grpc.health.v1. Never retried."""
        request = health_pb2.HealthCheckRequest(service=_checked_service(service))
        options = self._call_options(self._deadline(timeout))
        try:
            with self._calling():
                return _serving_status(self._health.Check(request, **options))
        except NotFound:
            return ServingStatus.SERVICE_UNKNOWN  # which is how grpc.health.v1 answers Check

    def close(self) -> None:
        """Close the connection; calls still under way are cancelled, and later ones are `Cancelled`."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise _unpicklable(self)

    def _request(self, prompt: str, options: GenerateOptions, deadline: Deadline) -> pb.GenerateRequest:
        """The message to send. Raises InvalidRequest for what none can carry, with what else the server finds."""
        request, violations = draft_request(prompt, options)
        if violations:
            with contextlib.suppress(TextToImageError):  # what is known here stands, whatever the server says
                violations = with_those_of_the_server(violations, self._found_by_server(request, deadline))
            raise invalid(violations)
        return with_seed(request) if self._resubmit else request

    def _found_by_server(self, request: pb.GenerateRequest, deadline: Deadline) -> tuple[FieldViolation, ...]:
        options = self._call_options(deadline.within(_CHECK_SECONDS, time.monotonic()))
        try:
            with self._calling():
                self._service.Generate(as_refusable(request), **options)
        except InvalidRequest as error:
            return error.violations
        return ()

    @contextlib.contextmanager
    def _calling(self) -> Iterator[None]:
        """Raise what goes wrong in a call as an error of the tree."""
        if self._closed:
            raise closed_error()
        try:
            with translated(self.target):
                yield
        except ValueError:
            if not self._closed:
                raise
            raise closed_error() from None  # gRPC's own error for a channel that has just been closed

    def _open(self, request: pb.GenerateRequest | pb.AttachRequest, deadline: Deadline) -> Any:
        """Begin the call of a stream."""
        options = self._call_options(deadline)
        with self._calling():
            if isinstance(request, pb.AttachRequest):
                return self._service.Attach(request, **options)
            return self._service.StreamGenerate(request, **options)

    def _deadline(self, timeout: float | None) -> Deadline:
        return Deadline.after(self._timeout if timeout is None else _checked_timeout(timeout), time.monotonic())

    def _call_options(self, deadline: Deadline) -> dict[str, Any]:
        return {"timeout": deadline.left(time.monotonic()), "metadata": self._metadata}


class AsyncTextToImage:
    """`TextToImage` for asyncio: the same calls, awaited, and `async for` over a stream.

    async with AsyncTextToImage("127.0.0.1:50051") as client:
        result = await client.generate("cat napping", seed=1)

    It belongs to the event loop that makes its first call.
    """

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
        self.target = complete(target)
        self._timeout = _checked_timeout(timeout)
        self._resubmit = _checked("resubmit", resubmit, MAX_RESUBMIT)
        self._metadata = _metadata(token)
        self._options = _channel_options(self.target, retries, round_robin)
        self._credentials = _credentials(tls)
        self._channel: grpc.aio.Channel | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def generate(
        self, prompt: str, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Result:
        """As `TextToImage.generate`. Cancelling the task cancels the call."""
        deadline = self._deadline(timeout)
        request, violations = self._draft(prompt, options)
        if violations:
            raise await self._invalid(request, violations, deadline)
        resubmits = self._resubmit
        with self._calling():
            while True:
                try:
                    return read_result(await self._service().Generate(request, **self._call_options(deadline)))
                except grpc.RpcError as error:
                    if not resubmits or not is_gone(error, was_admitted(error)):
                        raise
                    resubmits -= 1

    def stream(
        self, prompt: str, *, timeout: float | None = None, resume: bool = True, **options: Unpack[GenerateOptions]
    ) -> "AsyncEventStream":
        """As `TextToImage.stream`. Cancelling the task that reads the stream cancels the call, too.

        What is wrong with the request is raised where the first event is awaited.
        """
        deadline = self._deadline(timeout)
        request, violations = self._draft(prompt, options)
        refusal = partial(self._invalid, request, violations, deadline) if violations else None
        return AsyncEventStream(self, Course(request, self._resubmit, resume), deadline, refusal)

    def attach(
        self, request_id: str, after: int = 0, *, timeout: float | None = None, resume: bool = True
    ) -> "AsyncEventStream":
        """As `TextToImage.attach`."""
        request = attach_request(request_id, after)
        return AsyncEventStream(self, Course(request, 0, resume), self._deadline(timeout))

    async def cancel(self, request_id: str, *, timeout: float | None = None) -> None:
        """As `TextToImage.cancel`."""
        request = cancel_request(request_id)
        with self._calling():
            await self._service().Cancel(request, **self._call_options(self._deadline(timeout)))

    async def model(self, *, timeout: float | None = None) -> ModelInfo:
        """As `TextToImage.model`."""
        options = self._call_options(self._deadline(timeout))
        with self._calling():
            return read_model(await self._service().GetModel(pb.GetModelRequest(), **options))

    async def health(self, service: str = "", *, timeout: float | None = None) -> ServingStatus:
        """As `TextToImage.health`."""
        request = health_pb2.HealthCheckRequest(service=_checked_service(service))
        options = self._call_options(self._deadline(timeout))
        try:
            with self._calling():
                health: Any = HealthStub(self._connected())
                return _serving_status(await health.Check(request, **options))
        except NotFound:
            return ServingStatus.SERVICE_UNKNOWN

    async def aclose(self) -> None:
        """Close the connection; calls still under way are cancelled, and later ones are `Cancelled`."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __reduce__(self) -> NoReturn:
        raise _unpicklable(self)

    def _draft(self, prompt: str, options: GenerateOptions) -> tuple[pb.GenerateRequest, tuple[FieldViolation, ...]]:
        request, violations = draft_request(prompt, options)
        return (with_seed(request) if self._resubmit else request), violations

    async def _invalid(
        self, request: pb.GenerateRequest, violations: tuple[FieldViolation, ...], deadline: Deadline
    ) -> InvalidRequest:
        """The error of a request that no message can carry, with what else the server finds."""
        try:
            options = self._call_options(deadline.within(_CHECK_SECONDS, time.monotonic()))
            with self._calling():
                await self._service().Generate(as_refusable(request), **options)
        except InvalidRequest as error:
            return invalid(with_those_of_the_server(violations, error.violations))
        except TextToImageError:
            pass  # what is known here stands, whatever the server says
        return invalid(violations)

    @contextlib.contextmanager
    def _calling(self) -> Iterator[None]:
        """Raise what goes wrong in a call as an error of the tree."""
        if self._closed:
            raise closed_error()
        try:
            with translated(self.target):
                yield
        except grpc.aio.UsageError:
            if not self._closed:
                raise
            raise closed_error() from None
        except asyncio.CancelledError:
            # grpc.aio raises it for a call whose channel was closed, too, and then no task is being cancelled.
            if not self._closed or _is_being_cancelled():
                raise
            raise closed_error() from None

    def _open(
        self, request: pb.GenerateRequest | pb.AttachRequest, deadline: Deadline
    ) -> "grpc.aio.UnaryStreamCall[Any, pb.StreamGenerateResponse]":
        """Begin the call of a stream."""
        options = self._call_options(deadline)
        with self._calling():
            if isinstance(request, pb.AttachRequest):
                return self._service().Attach(request, **options)
            return self._service().StreamGenerate(request, **options)

    def _connected(self) -> grpc.aio.Channel:
        if self._loop is not None and self._loop is not asyncio.get_running_loop():
            raise RuntimeError("this client belongs to the event loop that made its first call; make one in each loop")
        if self._channel is None:  # a channel of grpc.aio is tied to the loop running when it is made
            self._loop = asyncio.get_running_loop()
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self.target, self._options)
            else:
                self._channel = grpc.aio.secure_channel(self.target, self._credentials, self._options)
        return self._channel

    def _service(self) -> "TextToImageServiceAsyncStub":
        return cast("TextToImageServiceAsyncStub", TextToImageServiceStub(self._connected()))

    def _deadline(self, timeout: float | None) -> Deadline:
        return Deadline.after(self._timeout if timeout is None else _checked_timeout(timeout), time.monotonic())

    def _call_options(self, deadline: Deadline) -> dict[str, Any]:
        return {"timeout": deadline.left(time.monotonic()), "metadata": self._metadata}


class EventStream(Iterator[Event]):
    """The events of one request as they happen. A context manager; leaving it early cancels the call."""

    def __init__(self, client: TextToImage, course: Course, deadline: Deadline) -> None:
        self._client = client
        self._course = course
        self._deadline = deadline
        self._closed = threading.Event()
        self._call: Any = None
        self._call = client._open(course.request, deadline)

    @property
    def number(self) -> int:
        """That of the newest event so far, where `attach` goes on. It begins at 1 again with a resubmitted request."""
        return self._course.number

    @property
    def resubmitted(self) -> int:
        """How often the request was made again because the server that had it was gone: 0 or 1."""
        return self._course.resubmitted

    def __next__(self) -> Event:
        while True:
            try:
                for message in self._call:
                    event = self._course.read(message)
                    if event is not None:
                        if self._course.done:
                            self._wait_for_end()
                        return event
            except grpc.RpcError as error:
                if self._course.done:
                    break
                if self._closed.is_set():
                    raise closed_error("stream") from error
                if self._client._closed:
                    raise closed_error() from error
                step = self._course.after(error, time.monotonic())
                if step is None:
                    raise error_from(error, self._client.target) from error
                self._begin(step)
            else:
                _check_complete(self._course.complete)
                break
        raise StopIteration

    def _wait_for_end(self) -> None:
        """Read the status that follows the last event.

        A caller may close the stream once it has that event, and the server would count the call as cancelled.
        """
        with contextlib.suppress(grpc.RpcError):  # the answer is whole, however the connection ends
            for _ in self._call:
                pass

    def _begin(self, step: Step) -> None:
        _report(step, self._client.target)
        left = self._deadline.left(time.monotonic())
        self._closed.wait(step.delay if left is None else min(step.delay, left))
        if not self._closed.is_set():
            self._call = self._client._open(step.request, self._deadline)
        if self._closed.is_set():  # by another thread, before the call or while it began
            self.close()

    def close(self) -> None:
        """Cancel the call if it is still under way."""
        self._closed.set()
        if self._call is not None:
            self._call.cancel()

    def __del__(self) -> None:
        self.close()  # a loop that is broken out of drops its iterator without a word

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncEventStream(AsyncIterator[Event]):
    """`EventStream` for asyncio."""

    def __init__(
        self,
        client: AsyncTextToImage,
        course: Course,
        deadline: Deadline,
        refusal: Callable[[], Awaitable[InvalidRequest]] | None = None,
    ) -> None:
        self._client = client
        self._course = course
        self._deadline = deadline
        self._closed = False
        self._refusal = refusal
        self._call: grpc.aio.UnaryStreamCall[Any, pb.StreamGenerateResponse] | None = None
        if refusal is None:
            self._call = client._open(course.request, deadline)

    @property
    def number(self) -> int:
        """As `EventStream.number`."""
        return self._course.number

    @property
    def resubmitted(self) -> int:
        """As `EventStream.resubmitted`."""
        return self._course.resubmitted

    async def __anext__(self) -> Event:
        while True:
            if self._refusal is not None:
                self._check_open()
                raise await self._refusal()
            assert self._call is not None
            try:
                while (read := await self._call.read()) is not grpc.aio.EOF:
                    event = self._course.read(cast("pb.StreamGenerateResponse", read))
                    if event is not None:
                        if self._course.done:
                            await self._wait_for_end()
                        return event
            except grpc.RpcError as error:
                if self._course.done:
                    break
                self._check_open()
                step = self._course.after(error, time.monotonic())
                if step is None:
                    raise error_from(error, self._client.target) from error
                await self._begin(step)
            except asyncio.CancelledError:
                # grpc.aio raises it for a call that was closed, too, and then no task is being cancelled.
                if not _is_being_cancelled():
                    self._check_open()
                raise
            else:
                _check_complete(self._course.complete)
                break
        raise StopAsyncIteration

    async def _wait_for_end(self) -> None:
        """As `EventStream._wait_for_end`."""
        assert self._call is not None
        with contextlib.suppress(grpc.RpcError):
            while await self._call.read() is not grpc.aio.EOF:
                pass

    def _check_open(self) -> None:
        """Raises Cancelled."""
        if self._closed:
            raise closed_error("stream")
        if self._client._closed:
            raise closed_error()

    async def _begin(self, step: Step) -> None:
        _report(step, self._client.target)
        left = self._deadline.left(time.monotonic())
        await asyncio.sleep(step.delay if left is None else min(step.delay, left))
        self._call = self._client._open(step.request, self._deadline)
        if self._closed:  # by another task, during the delay
            self._call.cancel()

    async def aclose(self) -> None:
        """Cancel the call if it is still under way."""
        self._cancel()

    def __del__(self) -> None:
        self._cancel()  # a loop that is broken out of drops its iterator without a word

    def _cancel(self) -> None:
        self._closed = True
        if self._call is not None:
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _read_pem(file: Path) -> bytes:
    """The file's bytes. gRPC takes any, and then fails with every call as if nobody were there."""
    pem = file.read_bytes()
    if b"-----BEGIN " not in pem:
        raise ValueError(f"{file} is not PEM: it has no line that begins with -----BEGIN")
    return pem


def _metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    if token is None:
        return ()
    if not isinstance(token, str):
        raise TypeError(f"token must be text, not of type {type(token).__name__}")  # never with the token in the words
    if not re.fullmatch(r"[!-~]+", token):
        raise ValueError("a token has visible ASCII characters only")  # gRPC would say so with the token in its words
    return (("authorization", f"Bearer {token}"),)


def _credentials(tls: TLS | bool | None) -> grpc.ChannelCredentials | None:
    if tls is None or tls is False:
        return None
    if tls is True:
        return TLS().credentials()
    if not isinstance(tls, TLS):
        raise TypeError(f"tls must be True, or TLS with the files of certificates, not {tls!r}")
    return tls.credentials()


def _checked(name: str, value: int, most: int) -> int:
    # 1.0 and True count as 1 to Python, and not to gRPC's configuration.
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= value <= most:
        raise ValueError(f"{name} must be 0 to {most}, not {value!r}")
    return int(value)


def _checked_timeout(timeout: float | None) -> float | None:
    """The seconds as gRPC can count them. Its clocks overflow in some centuries, which ends a call at once."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, Real):
        raise TypeError(f"timeout must be a number of seconds, or None, not {timeout!r}")
    if timeout > _LONGEST_TIMEOUT:
        return None
    if math.isnan(timeout):
        raise ValueError("timeout must be a number of seconds, or None, not nan")
    return float(max(timeout, 0))


def _checked_service(service: str) -> str:
    if not isinstance(service, str) or any("\ud800" <= each <= "\udfff" for each in service):
        raise TypeError(f"service must be the full name of a service, or empty, not {service!r}")
    return service


def _unpicklable(client: object) -> TypeError:
    name = type(client).__name__
    return TypeError(f"{name} cannot be pickled, since its connection belongs to this process; make one in each")


def _channel_options(target: str, retries: int, round_robin: bool) -> list[tuple[str, Any]]:
    retries = _checked("retries", retries, MAX_RETRIES)
    options: list[tuple[str, Any]] = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    if is_loopback(target):
        # gRPC would ask the proxy that http_proxy names even for this machine, and a proxy has another loopback.
        options.append(("grpc.enable_http_proxy", 0))
    service = pb.DESCRIPTOR.services_by_name["TextToImageService"].full_name
    config: dict[str, Any] = {}
    if retries:
        # Health checks are left out: a probe wants to know what is, not what may be in three seconds.
        # CANCELLED: the service cancels no call before its headers. gRPC's server does as it stops, to calls that reach
        # it before the client has seen its GOAWAY.
        policy = {
            "maxAttempts": retries + 1,
            "initialBackoff": "0.2s",
            "maxBackoff": "2s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
        }
        config["methodConfig"] = [{"name": [{"service": service}], "retryPolicy": policy}]
    else:
        # Nor those that gRPC makes of its own where a call did not get out: of calls that began as a server ended, one
        # in some hundred never came back from them, whatever its deadline (grpcio 1.85.1).
        options.append(("grpc.enable_retries", 0))
    if round_robin:
        config["loadBalancingConfig"] = [{"round_robin": {}}]
        config["healthCheckConfig"] = {"serviceName": service}
        options.append(("grpc.max_reconnect_backoff_ms", _MAX_RECONNECT_MS))
    if config:
        options.append(("grpc.service_config", json.dumps(config)))
    return options


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _report(step: Step, target: str) -> None:
    if step.news:
        _log.info("%s: %s", target, step.news)


def _serving_status(response: health_pb2.HealthCheckResponse) -> ServingStatus:
    return ServingStatus(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


def _check_complete(complete: bool) -> None:
    if not complete:
        raise ServerError("the stream ended before its `done` event", grpc.StatusCode.INTERNAL)
