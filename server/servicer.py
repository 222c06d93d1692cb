"""gRPC on one side, the engine on the other, contract.py in between: this file only adapts.

Each call submits one job, turns its events into messages, and cancels it when the caller is gone, for whatever reason.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator
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

_News = Queued | Progress | ImageReady | Finished  # what happens to a job, as long as it does not fail

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
        self._under_way: set[Context] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def open(self, card: ModelCard) -> None:
        """Admit calls from now on."""
        self._served = card, contract.limits_of(card, self._settings)

    async def wait_until_idle(self) -> None:
        """Wait until no call is under way: each answered to the last byte, or left unread by its client."""
        await self._idle.wait()

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        response = pb.GenerateResponse()
        request_id = contract.request_id_of(request)
        async with self._statuses(f"Generate {request_id}", context):
            card, task = self._parse(request, request_id)
            answer = _Answer()
            room = contract.room_for_images(task)
            async with self._events(task, context) as events:
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
        request_id = contract.request_id_of(request)
        async with self._statuses(f"StreamGenerate {request_id}", context):
            card, task = self._parse(request, request_id)
            answer = _Answer()
            async with self._events(task, context) as events:
                async for event in events:
                    message = await self._message(task, card, event, answer)
                    if unread := await self._write(message, context):
                        break
            if unread is not None:
                log.warning("%s: its stream is left unread; the job is given up", task.request_id)
                self._leave(context)
                await unread  # a status can only follow what is already being written
                raise contract.Stalled("the stream was left unread for too long")

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        async with self._statuses("GetModel", context):
            return contract.model_message(*self._model())

    def _model(self) -> tuple[ModelCard, Limits]:
        if self._served is None:
            raise contract.Loading("the model is still loading; try again in a moment")
        return self._served

    def _parse(self, request: pb.GenerateRequest, request_id: str | None) -> tuple[ModelCard, Task]:
        card, limits = self._model()
        return card, contract.parse(request, request_id, card, limits)

    @contextlib.asynccontextmanager
    async def _events(self, task: Task, context: Context) -> AsyncIterator[AsyncIterator[_News]]:
        """The events of the task's job. On the way out, for whatever reason, the job is cancelled if it still runs."""
        loop = asyncio.get_running_loop()
        # Unbounded, since the device must never wait for a client; a job has a bounded number of events.
        queue: asyncio.Queue[Event] = asyncio.Queue()
        timeout = context.time_remaining()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        job = self._engine.submit(task.request_id, task.image, deliver, math.inf if timeout is None else timeout)
        try:
            yield _until_terminal(queue)
        finally:
            self._engine.cancel(job)

    async def _message(self, task: Task, card: ModelCard, event: _News, answer: _Answer) -> pb.StreamGenerateResponse:
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

    async def _choice(self, task: Task, event: ImageReady, answer: _Answer, max_bytes: int) -> pb.Choice:
        """Code one image, on another thread than the event loop's and the device's."""
        image = await asyncio.to_thread(contract.coded, task, event, max_bytes)
        answer.images.append(contract.image_metadata_message(task, event, image))
        if image.smaller:
            answer.warnings.append(contract.recoded_warning(task, image, event.index))
        return contract.choice_message(task, image)

    async def _write(self, message: pb.StreamGenerateResponse, context: Context) -> "asyncio.Task[None] | None":
        """Write one message; the task that still writes it, if the client does not read on in time."""
        writing = asyncio.create_task(context.write(message))
        try:
            done, _ = await asyncio.wait((writing,), timeout=self._settings.stall_seconds)
        except asyncio.CancelledError:
            writing.cancel()
            raise
        if not done:
            return writing
        writing.result()
        return None

    @contextlib.asynccontextmanager
    async def _statuses(self, call: str, context: Context) -> AsyncIterator[None]:
        """Count a call as under way, turn its errors into statuses by the table in contract.py, and log how it ended.

        Prompts are not logged.
        """
        began = time.monotonic()
        code = grpc.StatusCode.OK
        self._under_way.add(context)
        self._idle.clear()
        context.add_done_callback(self._leave)  # type: ignore[arg-type]  # the stubs hide what a function is
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

    def _leave(self, context: Context) -> None:
        self._under_way.discard(context)
        if not self._under_way:
            self._idle.set()


async def _until_terminal(queue: "asyncio.Queue[Event]") -> AsyncIterator[_News]:
    """Events as they come, Finished the last; raises the error of Failed."""
    while True:
        event = await queue.get()
        if isinstance(event, Failed):
            raise event.error
        yield event
        if isinstance(event, Finished):
            return


def _metadata(task: Task, card: ModelCard, answer: _Answer, finished: Finished) -> pb.Metadata:
    return contract.metadata_message(task, card, answer.images, answer.warnings, finished)
