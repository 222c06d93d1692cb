"""A job's messages, recorded once and told to every stream that follows it, while it runs and for a while after.

Every call goes this way: it begins a recording, or joins that of a detached job, and listens. All of it happens in the
event loop, where nothing can come between looking a job up and listening to it; only images are judged and coded on
other threads.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from dataclasses import replace
from typing import Protocol

from server.api import content_filter, contract
from server.api.content_filter import Screening
from server.api.contract import InvalidRequest, JobAlreadyExists, ParsedRequest, UnknownJob, Violation
from server.api.images import CodedImage
from server.domain import Caller, ModelInfo, Warning
from server.engine.engine import Engine
from server.engine.events import (
    DeviceTimeAttributed,
    Event,
    Failed,
    Finished,
    ImageEncoded,
    ImageReady,
    Observe,
    Preview,
    PreviewDropped,
    Progress,
    Queued,
    no_observer,
)
from server.engine.interface import Submission
from text_to_image_client.v1 import text_to_image_pb2 as pb

log = logging.getLogger(__name__)

_BYTES_PER_MESSAGE = 512  # what a message takes in memory beside its content


class Timer(Protocol):
    """What asyncio.TimerHandle is."""

    def cancel(self) -> None: ...


class Recording:
    """One job and its messages, numbered from 1.

    It submits the job, and raises what Engine.submit raises. The job's end is that of the task `ended`, which never
    fails: how the job ended is heard by listening.
    """

    def __init__(
        self,
        engine: Engine,
        request: pb.GenerateRequest,
        task: ParsedRequest,
        info: ModelInfo,
        timeout: float,
        caller: Caller,
        observe: Observe = no_observer,
        screening: Screening | None = None,
    ) -> None:
        self.request = request
        self.task = task
        self.key = caller.owner, task.request_id
        """Of a detached job, what it is found by."""
        self.error: Exception | None = None
        self._info = info
        self._messages: list[pb.StreamGenerateResponse | None] = []
        self._newest: dict[Hashable, int] = {}
        self._state: tuple[pb.StreamGenerateResponse, float] | None = None  # newest queued or progress, and since when
        self._grown = asyncio.Event()
        self._complete = False
        self._observe = observe
        self._screening = screening
        self._listeners = 0
        self._findable = task.detached
        self._settled = False
        self._images: dict[int, pb.ImageMetadata] = {}
        self._warnings: list[Warning] = []
        loop = asyncio.get_running_loop()
        # Unbounded, since the device must never wait for a thread that codes; a job has few events with pixels.
        events: asyncio.Queue[Event] = asyncio.Queue()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        self._engine = engine
        self._job = engine.submit(
            Submission(task.request_id, task.image, caller, timeout, task.priority, task.output.preview_interval),
            deliver,
        )
        self.ended = asyncio.create_task(self._record(events))

    @property
    def size(self) -> int:
        """Bytes of memory, about."""
        kept = (message for message in (*self._messages, self.request) if message is not None)
        return sum(message.ByteSize() + _BYTES_PER_MESSAGE for message in kept)

    def cancel(self) -> None:
        """End the job, if it still runs, after the call in flight."""
        self._engine.cancel(self._job)

    def forget(self) -> None:
        """Nobody will begin to listen any more."""
        self._findable = False
        self._settle()

    def _settle(self, delivered: bool = False) -> None:
        """Tell once, as soon as it is known, whether somebody got all of the job's images."""
        known = delivered or self.error is not None or not (self._listeners or self._findable)
        if self._complete and known and not self._settled:
            self._settled = True
            self._observe(DeviceTimeAttributed(self._job.task.used, delivered))

    @contextlib.contextmanager
    def listening(
        self, after: int = 0, heartbeat_seconds: float = 0
    ) -> Iterator[AsyncIterator[pb.StreamGenerateResponse]]:
        """The messages after number `after`, to the job's end. A job that is not detached ends with its only listener.

        After every `heartbeat_seconds` without a message, the newest `queued` or `progress` comes again; with 0 never.
        Reading raises what the job failed with. Raises InvalidRequest for a number that is still to come.
        """
        if after > len(self._messages):
            newest = len(self._messages)
            raise InvalidRequest([Violation("after", f"must be at most {newest}, the newest event, is {after}")])
        self._listeners += 1
        try:
            yield self._listen(after, heartbeat_seconds)
        finally:
            self._listeners -= 1
            if not self.task.detached:
                self.cancel()
            self._settle()

    async def _listen(self, number: int, heartbeat_seconds: float) -> AsyncIterator[pb.StreamGenerateResponse]:
        while True:
            grown = self._grown
            while number < len(self._messages):
                message = self._messages[number]
                if not self.task.detached:
                    self._messages[number] = None  # nobody else will ask for it
                number += 1
                if message is not None:
                    yield message
            if self._complete:
                break
            try:
                async with asyncio.timeout(heartbeat_seconds or None):
                    await grown.wait()
            except TimeoutError:
                if self._state is not None:
                    yield contract.repeated_message(*self._state, time.monotonic(), number)
        if self.error is not None:
            raise self.error.with_traceback(None)  # which would grow with each listener
        self._settle(delivered=True)

    async def _record(self, events: "asyncio.Queue[Event]") -> None:
        try:
            while not isinstance(event := await events.get(), Failed):
                if isinstance(event, Preview) and event.index in self._images:
                    self._observe(PreviewDropped())
                    continue  # it comes late, and must not take the finished image's place
                self._append(await self._message(event))
                if isinstance(event, Finished):
                    break
            else:
                self.error = event.error
        except tuple(contract.STATUS) as error:
            self.error = error.with_traceback(None)  # which holds on to pixels
        except Exception:
            log.exception("%s: an event could not be told", self.task.request_id)
            self.error = contract.InternalError()
        finally:
            self.cancel()  # for when the job runs on, but its images cannot be coded
            self._complete = True
            self._settle()
            self._wake()

    def _append(self, message: pb.StreamGenerateResponse) -> None:
        message.number = len(self._messages) + 1
        if (kind := _only_the_newest_of(message)) is not None:
            if kind in self._newest:
                self._messages[self._newest[kind] - 1] = None
            self._newest[kind] = message.number
        if message.HasField("queued") or message.HasField("progress"):
            self._state = message, time.monotonic()
        self._messages.append(message)
        self._wake()

    def _wake(self) -> None:
        grown, self._grown = self._grown, asyncio.Event()
        grown.set()

    async def _message(self, event: Queued | Progress | Preview | ImageReady | Finished) -> pb.StreamGenerateResponse:
        task = self.task
        match event:
            case Queued():
                return contract.queued_message(event)
            case Progress():
                return contract.progress_message(event)
            case Preview():
                return await asyncio.to_thread(contract.preview_message, task, event)
            case ImageReady(index=index):
                began = time.monotonic()
                image, filtered = await asyncio.to_thread(self._coded, event)
                pixels = task.image.width * task.image.height
                self._observe(ImageEncoded(pixels, len(image.data), began, time.monotonic(), filtered))
                self._images[index] = contract.image_metadata_message(task, event, image)
                if image.smaller:
                    self._warnings.append(contract.recoded_warning(task, image, index))
                choice = contract.choice_message(task, image, filtered)
                ready = pb.ChoiceReady(choice_index=index, choice=choice, metadata=self._images[index])
                return pb.StreamGenerateResponse(choice=ready)
            case Finished():
                images = [self._images[index] for index in sorted(self._images)]
                metadata = contract.metadata_message(task, self._info, images, self._warnings, event)
                return pb.StreamGenerateResponse(done=pb.Done(metadata=metadata))

    def _coded(self, event: ImageReady) -> tuple[CodedImage, bool]:
        """The image as it may be seen, and whether it shows something else."""
        filtered = self._screening is not None and self._screening.objects_to(event.pixels)
        shown = replace(event, pixels=content_filter.blank(event.pixels)) if filtered else event
        return contract.coded(self.task, shown), filtered


def _only_the_newest_of(message: pb.StreamGenerateResponse) -> Hashable:
    """What a message makes the one before it obsolete for: the place in the queue, or what one image looks like."""
    match message.WhichOneof("event"):
        case "queued":
            return "queued"
        case "preview":
            return message.preview.choice_index
        case "choice":
            return message.choice.choice_index
    return None


class Recordings:
    """All jobs that run, and by their owners and names the detached ones.

    Those that have ended are kept `retention_seconds` at most, and no more of them than `retention_bytes` can hold: the
    oldest go first.
    `call_later` is that of the event loop, and injected so that tests need no waiting.
    """

    def __init__(
        self,
        engine: Engine,
        retention_seconds: float,
        retention_bytes: int,
        call_later: Callable[[float, Callable[[Recording], None], Recording], Timer] | None = None,
        observe: Observe = no_observer,
        screening: Screening | None = None,
    ) -> None:
        self._engine = engine
        self._retention_seconds = retention_seconds
        self._retention_bytes = retention_bytes
        self._call_later = call_later
        self._observe = observe
        self._screening = screening
        self._running: set[Recording] = set()
        self._detached: dict[tuple[str, str], Recording] = {}
        self._kept: dict[Recording, tuple[int, Timer]] = {}  # in the order of their ends, with size and time
        self._kept_bytes = 0

    def begin(
        self, request: pb.GenerateRequest, task: ParsedRequest, info: ModelInfo, timeout: float, caller: Caller
    ) -> Recording:
        """Begin the job of `task`, or join the detached one that bears its name, unless that has failed.

        Raises JobAlreadyExists if that one was begun by another request, and what Engine.submit raises.
        """
        known = self._detached.get((caller.owner, task.request_id)) if task.detached else None
        if known is not None and known.error is None:
            if known.request != request:
                raise JobAlreadyExists(
                    f"{task.request_id} is another request; Cancel it, or give this one another requestId"
                )
            return known
        recording = Recording(self._engine, request, task, info, timeout, caller, self._observe, self._screening)
        self._running.add(recording)
        recording.ended.add_done_callback(lambda _: self._retain(recording))
        if known is not None:
            self._forget(known)
        if task.detached:
            self._detached[recording.key] = recording
        return recording

    def find(self, name: str | None, caller: Caller) -> Recording:
        """The caller's detached job of this name. Raises UnknownJob, as for one that is another's."""
        if name is None:
            raise UnknownJob("no detached job has such a name: they have 1 to 128 characters of A-Z a-z 0-9 . _ : / -")
        if (caller.owner, name) not in self._detached:
            raise UnknownJob(f"no detached job is named {name} here, or it is no longer kept")
        return self._detached[caller.owner, name]

    def cancel(self, name: str | None, caller: Caller) -> None:
        """End the caller's detached job of this name, and forget it. Raises UnknownJob."""
        recording = self.find(name, caller)
        recording.cancel()
        self._forget(recording)

    async def wait_until_ended(self) -> None:
        """Wait until no job runs."""
        while self._running:
            await asyncio.wait([recording.ended for recording in self._running])

    @property
    def detached(self) -> tuple[int, int, int]:
        """Detached jobs that run, those that are kept after their ends, and the bytes of these."""
        return len(self._detached) - len(self._kept), len(self._kept), self._kept_bytes

    def _retain(self, recording: Recording) -> None:
        self._running.discard(recording)
        if self._detached.get(recording.key) is not recording:
            return
        call_later = self._call_later or asyncio.get_running_loop().call_later
        size = recording.size
        self._kept[recording] = size, call_later(self._retention_seconds, self._forget, recording)
        self._kept_bytes += size
        while self._kept_bytes > self._retention_bytes:
            self._forget(next(iter(self._kept)))

    def _forget(self, recording: Recording) -> None:
        recording.forget()
        if recording in self._kept:
            size, timer = self._kept.pop(recording)
            self._kept_bytes -= size
            timer.cancel()
        if self._detached.get(recording.key) is recording:
            del self._detached[recording.key]
