"""Statuses for undecodable messages and missing methods.

gRPC itself would answer UNKNOWN with the text of the Python exception, and log a traceback for each.
"""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from server.api.errors import Undecodable, Unimplemented, abort

Context = grpc.aio.ServicerContext[Any, Any]


class DecodeErrorInterceptor(grpc.aio.ServerInterceptor):
    """Ends calls that cannot be decoded with the status of Undecodable, and those of no method with Unimplemented's.

    A method is missing if no service has its name, or if its servicer inherits it from generated code.
    """

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        path = handler_call_details.method
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return grpc.stream_stream_rpc_method_handler(partial(_reject, Unimplemented(path)))
        if handler.request_deserializer is None:
            return handler  # type: ignore[no-any-return]
        kind = "_".join(
            "stream" if each else "unary" for each in (handler.request_streaming, handler.response_streaming)
        )
        behavior = getattr(handler, kind)
        check = _check_each if handler.request_streaming else _check
        if inspect.isasyncgenfunction(behavior):
            behavior = _as_coroutine(behavior)
        make: Any = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(  # type: ignore[no-any-return]
            check(behavior, path), decode_or_error(handler.request_deserializer), handler.response_serializer
        )


def decode_or_error(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Return a deserializer that returns DecodeError as Undecodable: only the call itself can choose its status."""

    def decoded(message: bytes) -> Any:
        try:
            return decode(message)
        except DecodeError:
            return Undecodable()

    return decoded


def _check(behavior: Callable[[Any, Context], Awaitable[Any]], path: str) -> Any:
    async def checked(request: Any, context: Context) -> Any:
        await abort_if_undecodable(request, context)
        try:
            return await behavior(request, context)
        except NotImplementedError:  # raised by generated code alone: see grpc_calls.answering
            return await abort(context, Unimplemented(path))

    return checked


def _check_each(behavior: Callable[[AsyncIterator[Any], Context], Awaitable[Any]], path: str) -> Any:
    async def decodable(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async for request in requests:
            await abort_if_undecodable(request, context)
            yield request

    async def checked(requests: AsyncIterator[Any], context: Context) -> Any:
        try:
            return await behavior(decodable(requests, context), context)
        except NotImplementedError:
            return await abort(context, Unimplemented(path))

    return checked


def _as_coroutine(behavior: Callable[[Any, Context], AsyncIterator[Any]]) -> Any:
    """Return a coroutine function that writes the messages of an async generator function."""

    async def written(request: Any, context: Context) -> None:
        async for response in behavior(request, context):
            await context.write(response)

    return written


async def _reject(error: Exception, _: Any, context: Context) -> None:
    await abort(context, error)


async def abort_if_undecodable(request: Any, context: Context) -> None:
    """End the call if `decode_or_error` returned an error for its request."""
    if isinstance(request, Undecodable):
        await abort(context, request)
