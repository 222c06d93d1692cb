"""The services that Ray Serve's gRPC proxies register, with what Ray drops between caller and replica.

A proxy forwards a call's message and metadata to a replica, and its answers back. It drops the deadline and the details
of a stream's error, sends no headers before a unary answer, and answers INTERNAL with a Python error for a lost
replica. This module runs in the proxy's process. It sends the deadline as metadata, takes the status of a failed call
from the replica's last message (see replica.py), and answers UNAVAILABLE for a lost replica, which gRPC retries if no
replica had admitted the call: the unary methods that begin a job are streams between proxy and replica, and their
headers are sent with the replica's first, empty message.
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
"""Metadata from proxy to replica: the seconds to the deadline. The proxy drops a caller's metadata of this name."""

JOBS = ("Generate", "__call__")
"""The unary methods that begin a job."""

_LOST = "the replica that had this call is gone; try again"


def add_text_to_image(servicer: Any, server: Any) -> None:
    """Register the service of proto/text_to_image.proto, for `grpc_servicer_functions`."""
    pb_grpc.add_TextToImageServiceServicer_to_server(servicer, _Ingress(server))  # type: ignore[arg-type]


def add_user_defined(servicer: Any, server: Any) -> None:
    """Register proto/user_defined.proto, by which Instill Core calls its models, for `grpc_servicer_functions`."""
    user_defined_grpc.add_UserDefinedServiceServicer_to_server(servicer, _Ingress(server))  # type: ignore[arg-type]


class _Ingress:
    """The proxy's server for generated code, which registers services with it."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        # Ray's server replaces registered handlers by its own, which call replicas. Ours go to gRPC's server class, and
        # before Ray's, so that gRPC finds them first.
        plain: Any = super(type(self._server), self._server)
        plain.add_generic_rpc_handlers(tuple(_Around(each) for each in handlers))
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Register nothing: gRPC prefers registered methods, and Ray's replacements could not be wrapped."""


class _Around(grpc.GenericRpcHandler):
    """Wraps each method of `inner`, which has Ray's handlers by the time of a call."""

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
    """A call's context for Ray."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._context = context
        self._peer = context.peer()
        self.ended = False
        """Whether the replica has sent the call's status; its message then has no content."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def peer(self) -> str:
        """Return the peer as of the beginning: Ray asks after the call's end, when gRPC would crash."""
        return self._peer

    def invocation_metadata(self) -> list[tuple[str, str | bytes]]:
        metadata = [(key, value) for key, value in self._context.invocation_metadata() or () if key != SECONDS_LEFT]
        left = self._context.time_remaining()
        return metadata if left is None else [*metadata, (SECONDS_LEFT, f"{left:.6f}")]

    def set_trailing_metadata(self, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        """Note whether the call has ended: Ray calls this for every message of a replica, after setting its code."""
        self._context.set_trailing_metadata(tuple(metadata))
        self.ended = bool(self._context.code())

    def finish(self) -> None:
        """Set UNAVAILABLE if Ray set INTERNAL without the replica's status: the replica is lost or unreachable."""
        if not self.ended and self._context.code() == grpc.StatusCode.INTERNAL:
            log.warning("a replica was lost: %s", self._context.details())
            self._context.set_code(grpc.StatusCode.UNAVAILABLE)
            self._context.set_details(_LOST)


def _unary(behavior: Callable[..., Any]) -> Callable[..., Any]:
    async def unary(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        await abort_if_undecodable(request, context)
        call = _Call(context)
        response: bytes = await behavior(request, call)
        call.finish()
        await _abort_if_failed(context)
        return response

    return unary


async def _abort_if_failed(context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """End a unary call by the status that is set.

    gRPC itself would send headers and an empty message before the status, and no client would retry.
    """
    if (code := context.code()) not in (None, grpc.StatusCode.OK):
        await context.abort(code, context.details(), tuple(context.trailing_metadata() or ()))


def _job(behavior: Callable[..., Any]) -> Callable[..., Any]:
    async def job(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        """Send the headers at the replica's first message, which means admission; the second is the answer."""
        admitted, answer = False, b""

        async def take(message: bytes) -> None:
            nonlocal admitted, answer
            if admitted:
                answer = message
            else:
                await context.send_initial_metadata(ADMITTED)
            admitted = True

        await _receive(behavior, request, context, take)
        await _abort_if_failed(context)
        return answer

    return job


def _stream(behavior: Callable[..., Any]) -> Callable[..., Any]:
    async def stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await _receive(behavior, request, context, context.write)

    return stream


async def _receive(
    behavior: Callable[..., Any],
    request: Any,
    context: grpc.aio.ServicerContext[Any, Any],
    take: Callable[[bytes], Awaitable[None]],
) -> None:
    """Pass a replica's messages to `take`, except for the last one of a failed call.

    Ray's generator runs in a task of its own. When the call ends, the generator is then always waiting for a replica,
    which it cancels; it would not if it were suspended at a message.
    """
    await abort_if_undecodable(request, context)
    call = _Call(context)
    messages: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def receive() -> None:
        try:
            async for message in behavior(request, call):
                if message or not call.ended:  # only the first message of a unary method and the last are empty
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
        await asyncio.wait((receiving,))  # gRPC crashes if it uses the context after the call's end
