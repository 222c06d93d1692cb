"""What is no message of its method is told as the caller's fault, for every method of a server.

gRPC itself would say UNKNOWN, with the exception's own text, and log a traceback for each.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from server import contract
from server.contract import Undecodable

Context = grpc.aio.ServicerContext[Any, Any]


class Decoding(grpc.aio.ServerInterceptor):
    """Ends calls whose bytes cannot be decoded with Undecodable's status."""

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        handler: Any = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler  # type: ignore[no-any-return]
        coding = decoded_by(handler.request_deserializer), handler.response_serializer
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(_checked(handler.unary_unary), *coding)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(_checked(handler.unary_stream), *coding)
        return grpc.stream_stream_rpc_method_handler(_each_checked(handler.stream_stream), *coding)


def decoded_by(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """As `decode`, but an error is returned: only the call itself can end with a status of our choice."""

    def decoded(message: bytes) -> Any:
        try:
            return decode(message)
        except DecodeError:
            return Undecodable()

    return decoded


def _checked(behaviour: Callable[[Any, Context], Awaitable[Any]]) -> Any:
    async def checked(request: Any, context: Context) -> Any:
        await abort_if_undecodable(request, context)
        return await behaviour(request, context)

    return checked


def _each_checked(behaviour: Callable[[AsyncIterator[Any], Context], AsyncIterator[Any]]) -> Any:
    async def decodable(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async for request in requests:
            await abort_if_undecodable(request, context)
            yield request

    async def checked(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async for response in behaviour(decodable(requests, context), context):
            yield response

    return checked


async def abort_if_undecodable(request: Any, context: Context) -> None:
    if isinstance(request, Undecodable):
        await contract.abort(context, request)
