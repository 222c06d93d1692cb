"""Answers in plain words what gRPC's own libraries answer in Python's: undecodable messages and missing methods.

gRPC itself would say UNKNOWN, with the exception's own text, and log a traceback for each.
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
    """Ends calls whose bytes cannot be decoded with Undecodable's status, and those of no method with Unimplemented's.

    A method is missing where no service has its name, and where a servicer has left it as generated code has it.
    """

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        path = handler_call_details.method
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return grpc.stream_stream_rpc_method_handler(partial(_refuse, Unimplemented(path)))
        if handler.request_deserializer is None:
            return handler  # type: ignore[no-any-return]
        kind = "_".join(
            "stream" if each else "unary" for each in (handler.request_streaming, handler.response_streaming)
        )
        behaviour = getattr(handler, kind)
        checked = _each_checked if handler.request_streaming else _checked
        if inspect.isasyncgenfunction(behaviour):
            behaviour = _written(behaviour)
        make: Any = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(  # type: ignore[no-any-return]
            checked(behaviour, path), decoded_by(handler.request_deserializer), handler.response_serializer
        )


def decoded_by(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """As `decode`, but an error is returned: only the call itself can end with a status of our choice."""

    def decoded(message: bytes) -> Any:
        try:
            return decode(message)
        except DecodeError:
            return Undecodable()

    return decoded


def _checked(behaviour: Callable[[Any, Context], Awaitable[Any]], path: str) -> Any:
    async def checked(request: Any, context: Context) -> Any:
        await abort_if_undecodable(request, context)
        try:
            return await behaviour(request, context)
        except NotImplementedError:  # our own servicers end no call by it: see grpc_calls.answering
            return await abort(context, Unimplemented(path))

    return checked


def _each_checked(behaviour: Callable[[AsyncIterator[Any], Context], Awaitable[Any]], path: str) -> Any:
    async def decodable(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async for request in requests:
            await abort_if_undecodable(request, context)
            yield request

    async def checked(requests: AsyncIterator[Any], context: Context) -> Any:
        try:
            return await behaviour(decodable(requests, context), context)
        except NotImplementedError:
            return await abort(context, Unimplemented(path))

    return checked


def _written(behaviour: Callable[[Any, Context], AsyncIterator[Any]]) -> Any:
    """Make a coroutine of an async generator: it writes what the generator yields."""

    async def written(request: Any, context: Context) -> None:
        async for response in behaviour(request, context):
            await context.write(response)

    return written


async def _refuse(error: Exception, _: Any, context: Context) -> None:
    await abort(context, error)


async def abort_if_undecodable(request: Any, context: Context) -> None:
    if isinstance(request, Undecodable):
        await abort(context, request)
