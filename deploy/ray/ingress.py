"""What Ray Serve's gRPC proxies register: our services, and around Ray's own handling what Ray drops on the way.

A proxy hands a call's message and metadata to a replica and its answers back. It does not hand on the deadline, has no
way for a stream's error to bring details, sends no headers before a unary answer, and says INTERNAL for a lost replica,
with Python's own words. Here, in the proxy's process, the deadline becomes metadata, a replica's last word of a failed
call becomes that call's status (see replica.py), and a lost replica becomes UNAVAILABLE, which gRPC retries where no
replica had admitted the call: the unary methods that begin a job are streams between here and the replicas, and their
headers leave when the replica sends a first, empty message.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from server.api.decode_errors import abort_if_undecodable, decode_or_error
from server.api.grpc_calls import ADMITTED
from server.stubs.model_ray_v1alpha import user_defined_pb2_grpc as user_defined_grpc
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)

SECONDS_LEFT = "t2i-seconds-left"
"""Metadata between proxy and replica: how long the caller still waits. What callers send under this name is dropped."""

JOBS = ("Generate", "__call__")
"""The unary methods that begin a job."""

_LOST = "the replica that had this call is gone; try again"


def add_text_to_image(servicer: Any, server: Any) -> None:
    """For `grpc_servicer_functions`: the service of proto/text_to_image.proto."""
    pb_grpc.add_TextToImageServiceServicer_to_server(servicer, _Ingress(server))  # type: ignore[arg-type]


def add_user_defined(servicer: Any, server: Any) -> None:
    """For `grpc_servicer_functions`: proto/user_defined.proto, by which Instill Core calls its models."""
    user_defined_grpc.add_UserDefinedServiceServicer_to_server(servicer, _Ingress(server))  # type: ignore[arg-type]


class _Ingress:
    """A proxy's server, as generated code registers services with it."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        # The server's class is Ray's, which replaces what is registered by what calls replicas. Ours are registered as
        # with any server, and before those, so that they are asked first.
        plain: Any = super(type(self._server), self._server)
        plain.add_generic_rpc_handlers(tuple(_Around(each) for each in handlers))
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Nothing: these would be asked before all others, and with Ray's replacements none could come around them."""


class _Around(grpc.GenericRpcHandler):
    """Around each method of another one, which by the time of a call has Ray's."""

    def __init__(self, inner: grpc.GenericRpcHandler) -> None:
        self._inner = inner

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        handler: Any = self._inner.service(details)
        if handler is None:
            return None
        decode = decode_or_error(handler.request_deserializer)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(_stream(handler.unary_stream), decode)
        if details.method.rpartition("/")[2] in JOBS:
            return grpc.unary_unary_rpc_method_handler(_job(handler.unary_stream), decode)  # Ray has both ways for each
        return grpc.unary_unary_rpc_method_handler(_unary(handler.unary_unary), decode)


class _Call:
    """A call's context, as Ray sees it."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._context = context
        self._peer = context.peer()
        self.ended = False
        """Whether the replica said how the call ends: there is nothing more in what it sends."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def peer(self) -> str:
        """Kept, since Ray asks for it when the call may have ended, and gRPC has no answer then but a crash."""
        return self._peer

    def invocation_metadata(self) -> list[tuple[str, str | bytes]]:
        metadata = [(key, value) for key, value in self._context.invocation_metadata() or () if key != SECONDS_LEFT]
        left = self._context.time_remaining()
        return metadata if left is None else [*metadata, (SECONDS_LEFT, f"{left:.6f}")]

    def set_trailing_metadata(self, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        """Ray calls this with every message of a replica, after it has set that one's code, if it has any."""
        self._context.set_trailing_metadata(tuple(metadata))
        self.ended = bool(self._context.code())

    def finish(self) -> None:
        """Where the replica said nothing and Ray INTERNAL, the replica is gone, or Ray could not reach it."""
        if not self.ended and self._context.code() == grpc.StatusCode.INTERNAL:
            log.warning("a replica was lost: %s", self._context.details())
            self._context.set_code(grpc.StatusCode.UNAVAILABLE)
            self._context.set_details(_LOST)


def _unary(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    async def unary(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        await abort_if_undecodable(request, context)
        call = _Call(context)
        response: bytes = await behaviour(request, call)
        call.finish()
        await _abort_if_failed(context)
        return response

    return unary


async def _abort_if_failed(context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """End a unary call by the status that is set.

    Left to gRPC, headers and an empty message would go before the status, and no client would try again.
    """
    if (code := context.code()) not in (None, grpc.StatusCode.OK):
        await context.abort(code, context.details(), tuple(context.trailing_metadata() or ()))


def _job(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    async def job(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        """The replica's first message says that the call is admitted, and commits it; the second is the answer."""
        admitted, answer = False, b""

        async def take(message: bytes) -> None:
            nonlocal admitted, answer
            if admitted:
                answer = message
            else:
                await context.send_initial_metadata(ADMITTED)
            admitted = True

        await _receive(behaviour, request, context, take)
        await _abort_if_failed(context)
        return answer

    return job


def _stream(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    async def stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await _receive(behaviour, request, context, context.write)

    return stream


async def _receive(
    behaviour: Callable[..., Any],
    request: Any,
    context: grpc.aio.ServicerContext[Any, Any],
    take: Callable[[bytes], Awaitable[None]],
) -> None:
    """Hand a replica's messages to `take`, but for the one that only brings the call's end.

    Ray's generator runs in a task of its own, so that the end of the call always finds it waiting for a replica, which
    it then cancels; left in the middle of a message, it would not.
    """
    await abort_if_undecodable(request, context)
    call = _Call(context)
    messages: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def receive() -> None:
        try:
            async for message in behaviour(request, call):
                if message or not call.ended:  # none of ours is empty but what is first of a unary answer, or the end
                    messages.put_nowait(message)
        finally:
            messages.put_nowait(None)

    receiving = asyncio.create_task(receive())
    try:
        while (message := await messages.get()) is not None:
            await take(message)
        await receiving
        call.finish()
    finally:
        receiving.cancel()
        await asyncio.wait((receiving,))  # what it asks of the context after the call's end, gRPC dies of
