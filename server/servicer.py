"""gRPC on one side, the jobs' recordings on the other, contract.py in between: this file only adapts.

A call begins or joins a recording and hands its messages on. What a call leaves behind when its caller is gone, for
whatever reason, is the recording's own to say.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import grpc

from server.api import auth, contract
from server.api.content_filter import Screening
from server.api.contract import InvalidRequest, ParsedRequest, RequestLimits, Violation
from server.api.recordings import Recording, Recordings
from server.domain import Caller, ModelInfo
from server.engine.engine import Engine
from server.engine.events import Observe, no_observer
from server.observability.call_context import job_of_call
from server.settings import Settings
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

_LOOKS = 10  # at a stream that is left unread, in the time after which it is given up


class TextToImageServicer(pb_grpc.TextToImageServiceServicer):
    """Answers UNAVAILABLE until `open` is called with the info of the loaded model."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        observe: Observe = no_observer,
        screening: Screening | None = None,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._recordings = Recordings(
            engine, settings.retention_seconds, settings.retention_bytes, observe=observe, screening=screening
        )
        self._served: tuple[ModelInfo, RequestLimits] | None = None
        self._under_way: set[Context] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def open(self, info: ModelInfo) -> None:
        """Admit calls from now on; again, to tell another info."""
        self._served = info, contract.limits_of(info, self._settings)

    @property
    def detached(self) -> tuple[int, int, int]:
        """Detached jobs that run, those that are kept after their ends, and the bytes of these."""
        return self._recordings.detached

    async def wait_until_idle(self) -> None:
        """Wait until no job runs, detached ones included, and no call is under way.

        A call is over when it is answered to the last byte, or left unread by its client.
        """
        await self._recordings.wait_until_ended()
        await self._idle.wait()

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        request_id = contract.request_id_of(request)
        async with self.statuses("Generate", request_id, context):
            caller = auth.caller_of(context)
            info, task = self.parse(request, request_id, caller)
            recording = self.begin(request, contract.in_one_message(task), info, caller, context)
            with recording.listening() as messages:
                await _commit(context)
                return await _whole_answer(recording.task, messages)

    async def StreamGenerate(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        request_id = contract.request_id_of(request)
        async with self.statuses("StreamGenerate", request_id, context):
            caller = auth.caller_of(context)
            info, task = self.parse(request, request_id, caller)
            await self._tell(self.begin(request, task, info, caller, context), 0, context)

    async def Attach(self, request: pb.AttachRequest, context: Context) -> None:  # type: ignore[override]
        name = contract.name_of(request)
        async with self.statuses("Attach", name, context):
            await self._tell(self._recordings.find(name, auth.caller_of(context)), request.after, context)

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        name = contract.name_of(request)
        async with self.statuses("Cancel", name, context):
            self._recordings.cancel(name, auth.caller_of(context))
        return pb.CancelResponse()

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        async with self.statuses("GetModel", None, context):
            return contract.model_message(*self.model(auth.caller_of(context)))

    # What other faces of the service are made of, too.

    @property
    def ready(self) -> bool:
        """Whether calls are admitted, as far as there is room."""
        return self._served is not None and self._engine.admits

    def model(self, caller: Caller) -> tuple[ModelInfo, RequestLimits]:
        """What is served, and what the caller may ask of it. Raises Loading."""
        if self._served is None:
            raise contract.Loading("the model is still loading; try again in a moment")
        info, limits = self._served
        return info, limits if caller.max_priority is None else replace(limits, max_priority=caller.max_priority)

    def parse(
        self, request: pb.GenerateRequest, request_id: str | None, caller: Caller
    ) -> tuple[ModelInfo, ParsedRequest]:
        """Raises Loading and InvalidRequest."""
        info, limits = self.model(caller)
        return info, contract.parse(request, request_id, info, limits)

    def begin(
        self,
        request: pb.GenerateRequest,
        task: ParsedRequest,
        info: ModelInfo,
        caller: Caller,
        context: Context,
        timeout: float = math.inf,
    ) -> Recording:
        """Begin the task's job, or join it. Its deadline is the call's, or `timeout` seconds from now if sooner.

        Raises what Recordings.begin raises.
        """
        if (remaining := context.time_remaining()) is not None:
            timeout = min(timeout, remaining)
        return self._recordings.begin(request, task, info, timeout, caller)

    def parse_all(
        self,
        requests: Sequence[pb.GenerateRequest],
        request_id: str | None,
        caller: Caller,
        name_of: Callable[[str, str], str],
        number: str,
        unreadable: Sequence[Violation],
    ) -> list[ParsedRequest]:
        """The tasks of a call that asks for several at once and is answered by one message.

        Raises Loading, and InvalidRequest with all that is wrong with any: one violation for all requests that have it,
        by the name that `name_of` has for its field in these (see contract.places). `number` is the field for what
        makes too many images. `unreadable` is what was wrong before there were requests, which it has first.
        """
        _, limits = self.model(caller)
        found: dict[Violation, list[int]] = {}
        tasks: list[ParsedRequest] = []
        for index, request in enumerate(requests):
            try:
                _, task = self.parse(request, request_id, caller)
            except InvalidRequest as error:
                for each in error.violations:
                    found.setdefault(each, []).append(index)
                continue
            tasks.append(contract.in_one_message(task))
        wrong = [*unreadable, *contract.violations_of_all(found, name_of)]
        images = sum(len(task.image.seeds) for task in tasks)
        if images > limits.max_images:
            wrong.append(
                Violation(number, f"must make at most {limits.max_images} images of all prompts, makes {images}")
            )
        if wrong:
            raise InvalidRequest(wrong)
        return tasks

    async def answer_all(
        self,
        asked: Sequence[tuple[pb.GenerateRequest, ParsedRequest]],
        info: ModelInfo,
        caller: Caller,
        context: Context,
        timeout: float = math.inf,
    ) -> list[pb.GenerateResponse]:
        """The answers to all requests of a call, in their order, or an error and none of them.

        `timeout` as in `begin`. Raises what Recordings.begin raises, and what any of the jobs ended with.
        """
        with contextlib.ExitStack() as listening:  # which ends all jobs when another is not admitted, or fails
            answers = []
            for request, task in asked:
                recording = self.begin(request, task, info, caller, context, timeout)
                answers.append((task, listening.enter_context(recording.listening())))
            await _commit(context)
            return await asyncio.gather(*(_whole_answer(task, messages) for task, messages in answers))

    async def _tell(self, recording: Recording, after: int, context: Context) -> None:
        """Hand a recording's messages on, as long as the client reads them."""
        with recording.listening(after, self._settings.heartbeat_seconds) as messages:
            async for message in messages:
                if unread := await self._write(message, context):
                    break
            else:
                return
        log.warning("%s: its stream is left unread and given up", recording.task.request_id)
        self._leave(context)
        await unread  # a status can only follow what is already being written
        raise contract.SlowReader("the stream was left unread for too long")

    async def _write(self, message: pb.StreamGenerateResponse, context: Context) -> "asyncio.Task[None] | None":
        """Write one message; the task that still writes it, if the client does not read on in time."""
        writing = asyncio.create_task(context.write(message))
        try:
            for _ in range(_LOOKS):  # a pause of this process, of whatever length, costs the client one of them
                done, _ = await asyncio.wait((writing,), timeout=self._settings.slow_reader_seconds / _LOOKS)
                if done:
                    break
        except asyncio.CancelledError:
            writing.cancel()
            raise
        if not done:
            return writing
        writing.result()
        return None

    @contextlib.asynccontextmanager
    async def statuses(self, method: str, job: str | None, context: Context) -> AsyncIterator[None]:
        """Count a call as under way, turn its errors into statuses by the table in contract.py, and log how it ended.

        Prompts are not logged.
        """
        began = time.monotonic()
        call = f"{method} {job}" if job else method
        job_of_call.set(job)
        code = grpc.StatusCode.OK
        self._under_way.add(context)
        self._idle.clear()
        context.add_done_callback(self._leave)  # type: ignore[arg-type]  # the stubs hide what a function is
        try:
            yield
        except tuple(contract.STATUS) as error:
            code = contract.STATUS[type(error)]
            await contract.abort(context, error)
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.InternalError:  # of gRPC's, when it has just found the caller gone
            code = grpc.StatusCode.CANCELLED
            raise asyncio.CancelledError from None
        except Exception:
            code = grpc.StatusCode.INTERNAL
            log.exception("%s failed", call)
            await contract.abort(context, contract.InternalError())
        finally:
            log.info("%s %s %.3f s", call, code.name, time.monotonic() - began)

    def _leave(self, context: Context) -> None:
        self._under_way.discard(context)
        if not self._under_way:
            self._idle.set()


async def _commit(context: Context) -> None:
    """Send the headers of a unary answer once its jobs are admitted.

    gRPC's libraries and proxies retry only what has no headers yet. Without them a request that costs a server its
    device, or that a proxy gives up, begins again on the next server, and on the one after that. A stream needs no such
    thing: its first event brings its headers, and comes at once.
    """
    await context.send_initial_metadata(contract.ADMITTED)


async def _whole_answer(task: ParsedRequest, messages: AsyncIterator[pb.StreamGenerateResponse]) -> pb.GenerateResponse:
    """Collect a job's messages to its end. Raises what that ended with."""
    choices: dict[int, pb.Choice] = {}
    async for message in messages:
        if message.HasField("choice"):
            choices[message.choice.choice_index] = message.choice.choice
    return contract.whole_answer(task, choices, message.done.metadata)
