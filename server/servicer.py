"""gRPC on one side, the engine on the other, contract.py in between: this file only adapts.

Each call submits one job, turns its events into messages, and cancels it when the caller is gone, for whatever reason.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field

import grpc

from server import contract
from server.contract import Limits, Task
from server.domain import ModelCard, Warning
from server.engine import Engine, Event, Failed, Finished, ImageReady, Progress, Queued
from server.settings import Settings
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[pb.GenerateRequest, pb.StreamGenerateResponse | pb.GenerateResponse]


@dataclass
class _Answer:
    """What has been sent of one answer so far."""

    images: list[pb.ImageMetadata] = field(default_factory=list)
    warnings: list[Warning] = field(default_factory=list)


class TextToImageServicer(pb_grpc.TextToImageServiceServicer):
    """Answers UNAVAILABLE until `open` is called with the card of the loaded model."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._served: tuple[ModelCard, Limits] | None = None
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def open(self, card: ModelCard) -> None:
        """Admit calls from now on."""
        self._served = card, contract.limits_of(card, self._settings)

    async def wait_until_idle(self) -> None:
        """Wait until no generation is under way."""
        await self._idle.wait()

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        response = pb.GenerateResponse()
        async with self._call("Generate", request, context):
            card, task = self._parse(request)
            answer = _Answer()
            room = contract.room_for_images(task)
            async with contextlib.aclosing(self._events(task, context)) as events:
                async for event in events:
                    if isinstance(event, ImageReady):
                        waiting = len(task.image.seeds) - event.index
                        choice = await self._choice(task, event, answer, room // waiting)
                        room -= choice.ByteSize()
                        response.data.choices.append(choice)
                    elif isinstance(event, Finished):
                        response.metadata.CopyFrom(_metadata(task, card, answer, event))
        return response

    async def StreamGenerate(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        async with self._call("StreamGenerate", request, context):
            card, task = self._parse(request)
            answer = _Answer()
            async with contextlib.aclosing(self._events(task, context)) as events:
                async for event in events:
                    await self._send(await self._message(task, card, event, answer), context)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        async with self._statuses("GetModel", context):
            return contract.model_message(*self._model())

    def _model(self) -> tuple[ModelCard, Limits]:
        if self._served is None:
            raise contract.Loading("the model is still loading; try again in a moment")
        return self._served

    def _parse(self, request: pb.GenerateRequest) -> tuple[ModelCard, Task]:
        card, limits = self._model()
        return card, contract.parse(request, card, limits)

    async def _events(self, task: Task, context: Context) -> AsyncGenerator[Event, None]:
        """The job's events to the end; the job is cancelled when nobody takes them any more."""
        loop = asyncio.get_running_loop()
        # Unbounded, since the device must never wait for a client; a job has a bounded number of events.
        queue: asyncio.Queue[Event] = asyncio.Queue()
        timeout = context.time_remaining()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        job = self._engine.submit(task.request_id, task.image, deliver, math.inf if timeout is None else timeout)
        try:
            while True:
                event = await queue.get()
                if isinstance(event, Failed):
                    raise event.error
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self._engine.cancel(job)

    async def _message(self, task: Task, card: ModelCard, event: Event, answer: _Answer) -> pb.StreamGenerateResponse:
        match event:
            case Queued():
                return contract.queued_message(event)
            case Progress():
                return contract.progress_message(event)
            case ImageReady(index=index):
                choice = await self._choice(task, event, answer, contract.room_for_images(task))
                ready = pb.ChoiceReady(choice_index=index, choice=choice, metadata=answer.images[-1])
                return pb.StreamGenerateResponse(choice=ready)
            case Finished():
                return pb.StreamGenerateResponse(done=pb.Done(metadata=_metadata(task, card, answer, event)))
            case Failed():
                raise event.error

    async def _choice(self, task: Task, event: ImageReady, answer: _Answer, max_bytes: int) -> pb.Choice:
        """Code one image, on another thread than the event loop's and the device's."""
        image = await asyncio.to_thread(contract.coded, task, event, max_bytes)
        answer.images.append(contract.image_metadata_message(task, event, image))
        if image.smaller:
            answer.warnings.append(contract.recoded_warning(task, image, event.index))
        return contract.choice_message(task, image)

    async def _send(self, message: pb.StreamGenerateResponse, context: Context) -> None:
        """Write one message; end the call when its reader has let the stream stand for too long."""
        try:
            async with asyncio.timeout(self._settings.stall_seconds):
                await context.write(message)
        except TimeoutError:
            raise contract.Stalled(
                f"the stream was left unread for more than {self._settings.stall_seconds:g} s"
            ) from None

    @contextlib.asynccontextmanager
    async def _call(self, method: str, request: pb.GenerateRequest, context: Context) -> AsyncIterator[None]:
        """Count the call as under way, and give its errors their statuses."""
        self._calls += 1
        self._idle.clear()
        try:
            async with self._statuses(f"{method} {request.request_id or '-'}", context):
                yield
        finally:
            self._calls -= 1
            if self._calls == 0:
                self._idle.set()

    @contextlib.asynccontextmanager
    async def _statuses(self, call: str, context: Context) -> AsyncIterator[None]:
        """Turn errors into statuses by the table in contract.py, and log how the call ended, without its prompts."""
        began = time.monotonic()
        code = grpc.StatusCode.OK
        try:
            yield
        except tuple(contract.STATUS) as error:
            code = contract.STATUS[type(error)]
            status = contract.status_of(error)
            details = (("grpc-status-details-bin", status.SerializeToString()),)
            await context.abort(code, status.message, trailing_metadata=details)
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception:
            code = grpc.StatusCode.INTERNAL
            log.exception("%s failed", call)
            await context.abort(code, "internal error; the server's log has the cause")
        finally:
            log.info("%s %s %.3f s", call, code.name, time.monotonic() - began)


def _metadata(task: Task, card: ModelCard, answer: _Answer, finished: Finished) -> pb.Metadata:
    return contract.metadata_message(task, card, answer.images, answer.warnings, finished)
