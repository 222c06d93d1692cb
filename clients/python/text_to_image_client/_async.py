"""The client for asyncio: `AsyncTextToImage` and `AsyncEventStream`, with the same methods as their sync versions."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack, cast

import grpc
import grpc.aio
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

if TYPE_CHECKING:
    from .v1.text_to_image_pb2_grpc import TextToImageServiceAsyncStub

__all__ = ["AsyncEventStream", "AsyncTextToImage"]


class AsyncTextToImage(BaseClient):
    """`TextToImage` for asyncio: the same arguments, methods to await, and `async for` over a stream.

    async with AsyncTextToImage("127.0.0.1:50051") as client:
        result = await client.generate("cat napping", seed=1)

    A client belongs to the event loop of its first call.
    """

    def _open_channel(self) -> None:
        # A channel of grpc.aio is tied to the loop that runs when it is constructed, so the first call opens it.
        self._channel: grpc.aio.Channel | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def generate(
        self, prompt: str, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Result:
        """Draw `prompt`, as `TextToImage.generate` does. Cancelling the task cancels the call."""
        deadline = self._deadline(timeout)
        request, violations = self._draft(prompt, options)
        if violations:
            raise await self._invalid_request(request, violations, deadline)
        resubmits_left = self._resubmit
        with self._translate_errors():
            while True:
                try:
                    return read_result(await self._stub().Generate(request, **self._call_options(deadline)))
                except grpc.RpcError as error:
                    if not may_resubmit(error, resubmits_left):
                        raise
                    resubmits_left -= 1

    def stream(
        self, prompt: str, *, timeout: float | None = None, resume: bool = True, **options: Unpack[GenerateOptions]
    ) -> "AsyncEventStream":
        """Return the events of `prompt`, as `TextToImage.stream` does.

        Cancelling the task that reads the stream cancels the call. InvalidRequest is raised at the first event.
        """
        deadline = self._deadline(timeout)
        request, violations = self._draft(prompt, options)
        invalid = partial(self._invalid_request, request, violations, deadline) if violations else None
        return AsyncEventStream(self, Recovery(request, self._resubmit, resume), deadline, invalid)

    def attach(
        self, request_id: str, after: int = 0, *, timeout: float | None = None, resume: bool = True
    ) -> "AsyncEventStream":
        """Follow a detached job, as `TextToImage.attach` does."""
        request = attach_request(request_id, after)
        return AsyncEventStream(self, Recovery(request, 0, resume), self._deadline(timeout))

    async def cancel(self, request_id: str, *, timeout: float | None = None) -> None:
        """End a detached job, as `TextToImage.cancel` does."""
        request = cancel_request(request_id)
        with self._translate_errors():
            await self._stub().Cancel(request, **self._call_options(self._deadline(timeout)))

    async def model(self, *, timeout: float | None = None) -> ModelInfo:
        """Return the served model, as `TextToImage.model` does."""
        options = self._call_options(self._deadline(timeout))
        with self._translate_errors():
            return read_model(await self._stub().GetModel(pb.GetModelRequest(), **options))

    async def health(self, service: str = "", *, timeout: float | None = None) -> ServingStatus:
        """Return the status of `service`, as `TextToImage.health` does."""
        request = health_request(service)
        options = self._call_options(self._deadline(timeout))
        try:
            with self._translate_errors():
                health: Any = HealthStub(self._connected())
                return serving_status(await health.Check(request, **options))
        except NotFound:
            return ServingStatus.SERVICE_UNKNOWN

    async def aclose(self) -> None:
        """Close the connection. Calls in flight are cancelled, and later calls raise `Cancelled`."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _invalid_request(
        self, request: pb.GenerateRequest, violations: tuple[FieldViolation, ...], deadline: Deadline
    ) -> InvalidRequest:
        """Return the error for `violations`, and for those that the server finds in the rest of the request."""
        try:
            options = self._call_options(deadline.within(VALIDATION_SECONDS, time.monotonic()))
            with self._translate_errors():
                await self._stub().Generate(as_refusable(request), **options)
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
        except grpc.aio.UsageError:
            if not self._closed:
                raise
            raise closed_error() from None
        except asyncio.CancelledError:
            # grpc.aio raises it also for a call whose channel is closed, when no task is being cancelled.
            if not self._closed or _task_is_being_cancelled():
                raise
            raise closed_error() from None

    def _start_stream(
        self, request: pb.GenerateRequest | pb.AttachRequest, deadline: Deadline
    ) -> "grpc.aio.UnaryStreamCall[Any, pb.StreamGenerateResponse]":
        options = self._call_options(deadline)
        with self._translate_errors():
            if isinstance(request, pb.AttachRequest):
                return self._stub().Attach(request, **options)
            return self._stub().StreamGenerate(request, **options)

    def _connected(self) -> grpc.aio.Channel:
        if self._loop is not None and self._loop is not asyncio.get_running_loop():
            raise RuntimeError("this client belongs to the event loop that made its first call; make one in each loop")
        if self._channel is None:
            self._loop = asyncio.get_running_loop()
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self.target, self._options)
            else:
                self._channel = grpc.aio.secure_channel(self.target, self._credentials, self._options)
        return self._channel

    def _stub(self) -> "TextToImageServiceAsyncStub":
        return cast("TextToImageServiceAsyncStub", TextToImageServiceStub(self._connected()))


class AsyncEventStream(BaseEventStream, AsyncIterator[Event]):
    """Iterate over events as `EventStream` does, for asyncio."""

    _client: AsyncTextToImage

    def __init__(
        self,
        client: AsyncTextToImage,
        recovery: Recovery,
        deadline: Deadline,
        invalid_request: Callable[[], Awaitable[InvalidRequest]] | None = None,
    ) -> None:
        super().__init__(client, recovery, deadline)
        self._closed = False
        self._invalid_request = invalid_request
        self._call: grpc.aio.UnaryStreamCall[Any, pb.StreamGenerateResponse] | None = None
        if invalid_request is None:
            self._call = client._start_stream(recovery.request, deadline)

    async def __anext__(self) -> Event:
        while True:
            if self._invalid_request is not None:
                self._check_open()
                raise await self._invalid_request()
            assert self._call is not None
            try:
                while (read := await self._call.read()) is not grpc.aio.EOF:
                    event = self._recovery.read(cast("pb.StreamGenerateResponse", read))
                    if event is not None:
                        if self._recovery.done:
                            await self._read_status()
                        return event
            except grpc.RpcError as error:
                if self._recovery.done:
                    break
                await self._make(*self._next_call(error))
            except asyncio.CancelledError:
                # grpc.aio raises it also for a call that was closed, when no task is being cancelled.
                if not _task_is_being_cancelled():
                    self._check_open()
                raise
            else:
                self._check_complete()
                break
        raise StopAsyncIteration

    async def _read_status(self) -> None:
        """Read the status that follows the last event, as `EventStream._read_status` does."""
        assert self._call is not None
        with contextlib.suppress(grpc.RpcError):
            while await self._call.read() is not grpc.aio.EOF:
                pass

    async def _make(self, call: NextCall, delay: float) -> None:
        await asyncio.sleep(delay)
        self._call = self._client._start_stream(call.request, self._deadline)
        if self._closed:  # by another task, during the delay
            self._call.cancel()

    def _is_closed(self) -> bool:
        return self._closed

    async def aclose(self) -> None:
        """Cancel the call if it is in flight."""
        self._cancel()

    def __del__(self) -> None:
        self._cancel()  # leaving a loop by `break` drops its iterator without closing it

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


def _task_is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
