"""The gRPC service of our own contract: five methods over a Frontend."""

import asyncio
import logging
from collections.abc import AsyncIterator
from functools import partial

from server.api import auth, requests, responses
from server.api.errors import SlowReader
from server.api.frontend import Frontend
from server.api.grpc_calls import Context, answering, send_admitted, timeout_of
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)

_WRITE_CHECKS = 10  # checks of a write within the time after which a slow reader is cut off


class TextToImageServicer(pb_grpc.TextToImageServiceServicer):
    """Serves text_to_image.v1. A stream that is left unread for `slow_reader_seconds` ends with SlowReader."""

    def __init__(self, frontend: Frontend, slow_reader_seconds: float) -> None:
        self._frontend = frontend
        self._slow_reader_seconds = slow_reader_seconds

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        request_id = requests.request_id_of(request)
        async with answering(self._frontend, "Generate", request_id, context):
            parsed = self._frontend.parse(request, request_id, auth.caller_of(context), timeout_of(context))
            whole = requests.in_one_message(parsed)
            (answer,) = await self._frontend.answer([whole], partial(send_admitted, context))
            return answer

    async def StreamGenerate(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        request_id = requests.request_id_of(request)
        async with answering(self._frontend, "StreamGenerate", request_id, context):
            parsed = self._frontend.parse(request, request_id, auth.caller_of(context), timeout_of(context))
            with self._frontend.stream(parsed) as messages:
                unread = await self._send(messages, context)
            await self._cut_off(unread, request_id, context)

    async def Attach(self, request: pb.AttachRequest, context: Context) -> None:  # type: ignore[override]
        name = requests.job_name_of(request)
        async with answering(self._frontend, "Attach", name, context):
            with self._frontend.attach(name, request.after, auth.caller_of(context)) as messages:
                unread = await self._send(messages, context)
            await self._cut_off(unread, name, context)

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        name = requests.job_name_of(request)
        async with answering(self._frontend, "Cancel", name, context):
            self._frontend.cancel(name, auth.caller_of(context))
        return pb.CancelResponse()

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        async with answering(self._frontend, "GetModel", None, context):
            return responses.model_message(*self._frontend.model(auth.caller_of(context)))

    async def _send(
        self, messages: AsyncIterator[pb.StreamGenerateResponse], context: Context
    ) -> "asyncio.Task[None] | None":
        """Write all messages. Return the unfinished write if the client does not read in time."""
        async for message in messages:
            if unread := await self._write(message, context):
                return unread
        return None

    async def _write(self, message: pb.StreamGenerateResponse, context: Context) -> "asyncio.Task[None] | None":
        """Write one message. Return the unfinished write if the client does not read in time."""
        writing = asyncio.create_task(context.write(message))
        try:
            for _ in range(_WRITE_CHECKS):  # a pause of this process, however long, costs the client only one of them
                done, _ = await asyncio.wait((writing,), timeout=self._slow_reader_seconds / _WRITE_CHECKS)
                if done:
                    break
        except asyncio.CancelledError:
            writing.cancel()
            raise
        if not done:
            return writing
        writing.result()
        return None

    async def _cut_off(self, unread: "asyncio.Task[None] | None", job: str | None, context: Context) -> None:
        """Raise SlowReader once the unfinished write has ended, since a status can only follow it."""
        if unread is None:
            return
        log.warning("%s: its stream is left unread and given up", job)
        self._frontend.call_ended(context)
        await unread
        raise SlowReader("the stream was left unread for too long")
