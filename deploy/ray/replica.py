"""A replica of the service under Ray Serve: one process, one device, the engine and the servicers.

Ray calls a method of this class for each call that its proxy gets. The call goes through the same interceptors and
servicers as on a port of our own, with a context that is made here. Settings come from T2I_... variables. Run it with
`serve run deploy.ray.replica:application`, or with a config file of this folder.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty
from ray import serve
from ray.serve.grpc_util import RayServegRPCContext

from deploy.ray.ingress import SECONDS_LEFT
from server.api.errors import InternalError, abort
from server.api.instill import InstillServicer
from server.observability.logs import log_to_stderr
from server.runtime import Runtime, load
from server.servicer import TextToImageServicer
from server.settings import Settings, read
from server.stubs.model_ray_v1alpha import user_defined_pb2_grpc as user_defined_grpc
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)

Metadata = Sequence[tuple[str, str | bytes]]


def _services(runtime: Runtime, settings: Settings) -> list[tuple[Callable[[Any, Any], None], Any]]:
    """Return the function that registers each service, and its servicer.

    The methods of each are below, and its line is in ingress.py.
    """
    servicer = TextToImageServicer(runtime.frontend, settings.slow_reader_seconds)
    return [
        (pb_grpc.add_TextToImageServiceServicer_to_server, servicer),
        (user_defined_grpc.add_UserDefinedServiceServicer_to_server, InstillServicer(runtime.frontend)),
    ]


def _unary(method: str) -> Callable[..., Any]:
    async def unary(self: "Replica", request: Any, grpc_context: RayServegRPCContext) -> Any:
        context = Context(grpc_context)
        response = await self.answer(method, request, context)
        return Empty() if context.code() else response

    return unary


def _job(method: str) -> Callable[..., Any]:
    """Return a unary method that begins a job: an empty message on admission, then the answer (see ingress.py)."""

    async def job(self: "Replica", request: Any, grpc_context: RayServegRPCContext) -> AsyncIterator[Any]:
        context = Context(grpc_context)
        answering = asyncio.create_task(self.answer(method, request, context))
        try:
            async for message in context.written(answering):
                yield message
            yield Empty() if context.code() else answering.result()
        finally:
            answering.cancel()

    return job


def _stream(method: str) -> Callable[..., Any]:
    async def stream(self: "Replica", request: Any, grpc_context: RayServegRPCContext) -> AsyncIterator[Any]:
        context = Context(grpc_context)
        answering = asyncio.create_task(self.answer(method, request, context))
        try:
            async for message in context.written(answering):
                yield message
            if context.code():
                yield Empty()  # the context's status only travels with a message
        finally:
            answering.cancel()

    return stream


class Replica:
    """One device and its services: Ray's constructor, health check and destructor, and one method for each of ours.

    The methods' names are the last parts of the paths. When a call fails, its last message is empty and its context has
    the status: the ingress drops the message and takes the status.
    """

    async def __init__(self) -> None:  # type: ignore[misc]  # Ray awaits it
        settings = read()
        log_to_stderr(settings.log_level, settings.log_format)
        self._runtime = Runtime(settings, partial(load, settings))
        self._runtime.serve_metrics()
        self._handlers = _Handlers()
        for add, servicer in _services(self._runtime, settings):
            add(servicer, self._handlers)
        info = await self._runtime.open()
        self._watching = asyncio.create_task(self._runtime.watch_device())
        log.info("serving %s", info.name)

    Generate = _job("/text_to_image.v1.TextToImageService/Generate")
    StreamGenerate = _stream("/text_to_image.v1.TextToImageService/StreamGenerate")
    Attach = _stream("/text_to_image.v1.TextToImageService/Attach")
    Cancel = _unary("/text_to_image.v1.TextToImageService/Cancel")
    GetModel = _unary("/text_to_image.v1.TextToImageService/GetModel")
    __call__ = _job("/model.ray.v1alpha.UserDefinedService/__call__")

    async def check_health(self) -> None:
        """Raise DeviceHung if the device has hung, when every call has ended: Ray then replaces this process."""
        if self._watching.done():
            self._watching.result()

    async def __del__(self) -> None:
        self._watching.cancel()
        self._runtime.stop()
        await self._runtime.close()

    async def answer(self, method: str, request: Any, context: "Context") -> Any:
        """Answer a call as a port of our own would. The context then has its status."""
        details = SimpleNamespace(method=method, invocation_metadata=tuple(context.invocation_metadata()))
        find = self._handlers.find
        for interceptor in reversed(self._runtime.interceptors):
            find = partial(interceptor.intercept_service, find)
        try:
            handler = await find(details)
            behavior = handler.unary_unary or handler.unary_stream or handler.stream_stream
            return await behavior(request, context)
        except grpc.aio.AbortError:
            return None
        except Exception:
            log.exception("%s failed", method)
            with contextlib.suppress(grpc.aio.AbortError):
                await abort(context, InternalError())  # type: ignore[arg-type]
        finally:
            context.end()


class _Handlers:
    """Handlers by path, for generated code, which registers them with a server."""

    def __init__(self) -> None:
        self._handlers: list[grpc.GenericRpcHandler] = []

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Register nothing: these are the generic handlers again."""

    async def find(self, details: Any) -> Any:
        return next(found for handler in self._handlers if (found := handler.service(details)))


class Context:
    """The part of grpc.aio.ServicerContext that our code uses, over the context that Ray passes."""

    def __init__(self, passed: RayServegRPCContext) -> None:
        self._passed = passed
        left = dict(passed.invocation_metadata()).get(SECONDS_LEFT)
        self._deadline = None if left is None else time.monotonic() + float(left)
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        self._callbacks: list[Callable[[Context], None]] = []

    def invocation_metadata(self) -> Metadata:
        return [(key, value) for key, value in self._passed.invocation_metadata() if key != SECONDS_LEFT]

    def peer(self) -> str:
        return str(self._passed.peer())

    def time_remaining(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def trailing_metadata(self) -> Metadata:
        return tuple(self._passed.trailing_metadata())

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        self._passed.set_trailing_metadata(list(metadata))

    def code(self) -> grpc.StatusCode | None:
        return self._passed.code() or None

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> None:
        self._passed.set_code(code)
        self._passed.set_details(details)
        self._passed.set_trailing_metadata([each for each in trailing_metadata if each[0] != "request_id"])  # Ray's own
        raise grpc.aio.AbortError

    def add_done_callback(self, callback: "Callable[[Context], None]") -> None:
        self._callbacks.append(callback)

    async def send_initial_metadata(self, metadata: Metadata) -> None:
        """Send an empty message, at which the ingress sends the headers of a unary method."""
        await self.write(Empty())

    async def write(self, message: Any) -> None:
        self._messages.put_nowait(message)

    async def written(self, answering: "asyncio.Task[Any]") -> AsyncIterator[Any]:
        """Yield the written messages until `answering` has ended. Raises its exception."""
        answering.add_done_callback(lambda _: self._messages.put_nowait(None))
        while (message := await self._messages.get()) is not None:
            yield message
        await answering

    def end(self) -> None:
        for callback in self._callbacks:
            callback(self)


deployment = serve.deployment(Replica, name="TextToImage")
application = deployment.bind()
