"""The way of every request, whatever protocol it comes by: parse, limits, queue, answer.

A protocol translates its calls into messages of our own contract and back. It gets errors as exceptions, which
api/errors.py maps to statuses. Nothing here knows how a protocol reads or writes.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from server.api import requests, responses
from server.api.content_filter import Screening
from server.api.errors import InvalidRequest, Loading, Violation
from server.api.recordings import Recordings
from server.api.requests import ParsedRequest, RequestLimits
from server.domain import Caller, ModelInfo
from server.engine.engine import Engine
from server.engine.events import Observe, no_observer
from server.settings import Settings
from text_to_image_client.v1 import text_to_image_pb2 as pb


class Frontend:
    """Serves requests once `open` is called with the loaded model; until then they raise Loading."""

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
        self._calls: set[Hashable] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def open(self, info: ModelInfo) -> None:
        """Admit requests from now on, or change the description of the served model."""
        self._served = info, requests.limits_of(info, self._settings)

    @property
    def ready(self) -> bool:
        """Whether requests are admitted, as far as the queue has room."""
        return self._served is not None and self._engine.admits

    @property
    def detached(self) -> tuple[int, int, int]:
        """Count the detached jobs that run, those that have ended and are kept, and the bytes of the latter."""
        return self._recordings.detached

    def model(self, caller: Caller) -> tuple[ModelInfo, RequestLimits]:
        """Return the served model and the caller's limits. Raises Loading."""
        if self._served is None:
            raise Loading("the model is still loading; try again in a moment")
        info, limits = self._served
        return info, limits if caller.max_priority is None else replace(limits, max_priority=caller.max_priority)

    def parse(
        self, message: pb.GenerateRequest, request_id: str | None, caller: Caller, timeout: float = math.inf
    ) -> ParsedRequest:
        """Check a request, whose job must end within `timeout` seconds. Raises Loading and InvalidRequest."""
        info, limits = self.model(caller)
        return requests.parse(message, request_id, info, limits, caller, timeout)

    def parse_batch(
        self,
        messages: Sequence[pb.GenerateRequest],
        request_id: str | None,
        caller: Caller,
        *,
        name_of: Callable[[str, str], str],
        count_field: str,
        violations: Sequence[Violation],
        timeout: float = math.inf,
    ) -> list[ParsedRequest]:
        """Check the requests of one call that is answered by one message.

        Raises Loading, and InvalidRequest with all violations: first the given ones, which the protocol found itself,
        then one for all requests that share it. `name_of` names a field of some requests (see violations_of_batch);
        `count_field` is the field that makes too many images.
        """
        _, limits = self.model(caller)
        found: dict[Violation, list[int]] = {}
        batch: list[ParsedRequest] = []
        for index, message in enumerate(messages):
            try:
                parsed = self.parse(message, request_id, caller, timeout)
            except InvalidRequest as error:
                for each in error.violations:
                    found.setdefault(each, []).append(index)
                continue
            batch.append(requests.in_one_message(parsed))
        wrong = [*violations, *requests.violations_of_batch(found, name_of)]
        images = sum(len(parsed.image.seeds) for parsed in batch)
        if images > limits.max_images:
            too_many = f"must make at most {limits.max_images} images of all prompts, makes {images}"
            wrong.append(Violation(count_field, too_many))
        if wrong:
            raise InvalidRequest(wrong)
        return batch

    async def answer(
        self, batch: Sequence[ParsedRequest], on_admitted: Callable[[], Awaitable[None]]
    ) -> list[pb.GenerateResponse]:
        """Return the whole answers to the requests of one call, in their order, or raise the first error.

        Awaits `on_admitted` when all jobs are admitted. Ends all of them if one is not admitted or fails. Raises what
        Recordings.begin raises, and the errors of the jobs.
        """
        with contextlib.ExitStack() as listening:
            answers = []
            for parsed in batch:
                recording = self._recordings.begin(parsed)
                answers.append((recording.parsed, listening.enter_context(recording.listening())))
            await on_admitted()
            return await asyncio.gather(*(_whole_answer(parsed, messages) for parsed, messages in answers))

    def stream(self, parsed: ParsedRequest) -> AbstractContextManager[AsyncIterator[pb.StreamGenerateResponse]]:
        """Begin a job, or join it, to iterate over its messages. Raises what Recordings.begin raises."""
        return self._recordings.begin(parsed).listening(heartbeat_seconds=self._settings.heartbeat_seconds)

    def attach(
        self, name: str | None, after: int, caller: Caller
    ) -> AbstractContextManager[AsyncIterator[pb.StreamGenerateResponse]]:
        """Find a detached job, to iterate over its messages after number `after`. Raises UnknownJob.

        Entering the result raises InvalidRequest if `after` is beyond the newest message.
        """
        return self._recordings.find(name, caller).listening(after, self._settings.heartbeat_seconds)

    def cancel(self, name: str | None, caller: Caller) -> None:
        """End and forget a detached job. Raises UnknownJob."""
        self._recordings.cancel(name, caller)

    def call_began(self, call: Hashable) -> None:
        """Note a call of any protocol, for wait_until_idle."""
        self._calls.add(call)
        self._idle.clear()

    def call_ended(self, call: Hashable) -> None:
        """Note that a call is answered to the last byte, or that its client has stopped reading."""
        self._calls.discard(call)
        if not self._calls:
            self._idle.set()

    async def wait_until_idle(self) -> None:
        """Wait until all jobs, detached ones included, and all calls have ended."""
        await self._recordings.wait_until_ended()
        await self._idle.wait()


async def _whole_answer(
    parsed: ParsedRequest, messages: AsyncIterator[pb.StreamGenerateResponse]
) -> pb.GenerateResponse:
    """Collect a job's messages to its end. Raises the job's error."""
    choices: dict[int, pb.Choice] = {}
    async for message in messages:
        if message.HasField("choice"):
            choices[message.choice.choice_index] = message.choice.choice
    return responses.generate_response(parsed, choices, message.done.metadata)
