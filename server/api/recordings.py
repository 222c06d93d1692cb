"""Records the messages of a job once, for every stream that follows it while it runs and for a while afterwards.

Every call begins a recording, or joins that of a detached job, and listens to it. Everything runs in the event loop, so
that nothing happens between finding a job and listening to it. Only the content filter and image coding run on other
threads.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from dataclasses import replace
from typing import Protocol

from server.api import content_filter, responses
from server.api.content_filter import Screening
from server.api.errors import STATUS, InternalError, InvalidRequest, JobAlreadyExists, UnknownJob, Violation
from server.api.images import CodedImage
from server.api.requests import ParsedRequest
from server.domain import Caller, Warning
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
from text_to_image_client.v1 import text_to_image_pb2 as pb

log = logging.getLogger(__name__)

_BYTES_PER_MESSAGE = 512  # of memory, in addition to its content


class Timer(Protocol):
    """The part of asyncio.TimerHandle that is used here."""

    def cancel(self) -> None: ...


class Recording:
    """One job and its messages, numbered from 1.

    The constructor submits the job and raises what Engine.submit raises. The task `ended` is done when the job has
    ended and never fails: listeners get the job's error.
    """

    def __init__(
        self,
        engine: Engine,
        parsed: ParsedRequest,
        observe: Observe = no_observer,
        screening: Screening | None = None,
    ) -> None:
        self.parsed = parsed
        self.error: Exception | None = None
        self._messages: list[pb.StreamGenerateResponse | None] = []
        self._newest: dict[Hashable, int] = {}
        self._state: tuple[pb.StreamGenerateResponse, float] | None = None  # newest queued or progress, and its time
        self._changed = asyncio.Event()
        self._complete = False
        self._observe = observe
        self._screening = screening
        self._listeners = 0
        self._findable = parsed.detached
        self._attributed = False
        self._images: dict[int, pb.ImageMetadata] = {}
        self._warnings: list[Warning] = []
        loop = asyncio.get_running_loop()
        # Unbounded: the device must never wait for a thread that codes images, and a job has few events with pixels.
        events: asyncio.Queue[Event] = asyncio.Queue()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        self._engine = engine
        self._job = engine.submit(parsed.submission, deliver)
        self.ended = asyncio.create_task(self._record(events))

    @property
    def key(self) -> tuple[str, str]:
        """The owner and the name by which a detached job is found."""
        return self.parsed.caller.owner, self.parsed.request_id

    @property
    def size(self) -> int:
        """The memory of the recording in bytes, roughly."""
        kept = (message for message in (*self._messages, self.parsed.message) if message is not None)
        return sum(message.ByteSize() + _BYTES_PER_MESSAGE for message in kept)

    def cancel(self) -> None:
        """End the job, if it still runs, after the network call in flight."""
        by_name = f"the job {self.parsed.request_id} was cancelled by another call"
        self._engine.cancel(self._job, by_name if self.parsed.detached else "the call was cancelled")

    def forget(self) -> None:
        """Note that nobody can find this recording any more."""
        self._findable = False
        self._attribute_device_time()

    def _attribute_device_time(self, delivered: bool = False) -> None:
        """Report once, as soon as it is known, whether a caller got all images of the job."""
        known = delivered or self.error is not None or not (self._listeners or self._findable)
        if self._complete and known and not self._attributed:
            self._attributed = True
            self._observe(DeviceTimeAttributed(self._job.task.used, delivered))

    @contextlib.contextmanager
    def listening(
        self, after: int = 0, heartbeat_seconds: float = 0
    ) -> Iterator[AsyncIterator[pb.StreamGenerateResponse]]:
        """Iterate over the messages after number `after`, to the job's end.

        A job that is not detached is cancelled when its only listener leaves. After every `heartbeat_seconds` without a
        message, the newest `queued` or `progress` is repeated; 0 means never. The iterator raises the job's error.
        Raises InvalidRequest if `after` is beyond the newest message.
        """
        if after > len(self._messages):
            newest = len(self._messages)
            raise InvalidRequest([Violation("after", f"must be at most {newest}, the newest event, is {after}")])
        self._listeners += 1
        try:
            yield self._listen(after, heartbeat_seconds)
        finally:
            self._listeners -= 1
            if not self.parsed.detached:
                self.cancel()
            self._attribute_device_time()

    async def _listen(self, number: int, heartbeat_seconds: float) -> AsyncIterator[pb.StreamGenerateResponse]:
        while True:
            changed = self._changed
            while number < len(self._messages):
                message = self._messages[number]
                if not self.parsed.detached:
                    self._messages[number] = None  # it has no other listener
                number += 1
                if message is not None:
                    yield message
            if self._complete:
                break
            try:
                async with asyncio.timeout(heartbeat_seconds or None):
                    await changed.wait()
            except TimeoutError:
                if self._state is not None:
                    yield responses.heartbeat_message(*self._state, time.monotonic(), number)
        if self.error is not None:
            raise self.error.with_traceback(None)  # the traceback would grow with each listener
        self._attribute_device_time(delivered=True)

    async def _record(self, events: "asyncio.Queue[Event]") -> None:
        try:
            while not isinstance(event := await events.get(), Failed):
                if isinstance(event, Preview) and event.index in self._images:
                    self._observe(PreviewDropped())
                    continue  # it is late and must not replace the finished image
                self._append(await self._message(event))
                if isinstance(event, Finished):
                    break
            else:
                self.error = event.error
        except tuple(STATUS) as error:
            self.error = error.with_traceback(None)  # the traceback refers to pixels
        except Exception:
            log.exception("%s: an event could not be sent", self.parsed.request_id)
            self.error = InternalError()
        finally:
            self.cancel()  # the job may still run if one of its images could not be coded
            self._complete = True
            self._attribute_device_time()
            self._wake()

    def _append(self, message: pb.StreamGenerateResponse) -> None:
        message.number = len(self._messages) + 1
        if (kind := _superseded_kind(message)) is not None:
            if kind in self._newest:
                self._messages[self._newest[kind] - 1] = None
            self._newest[kind] = message.number
        if message.HasField("queued") or message.HasField("progress"):
            self._state = message, time.monotonic()
        self._messages.append(message)
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _message(self, event: Queued | Progress | Preview | ImageReady | Finished) -> pb.StreamGenerateResponse:
        parsed = self.parsed
        match event:
            case Queued():
                return responses.queued_message(event)
            case Progress():
                return responses.progress_message(event)
            case Preview():
                return await asyncio.to_thread(responses.preview_message, parsed, event)
            case ImageReady():
                return await self._choice_message(event)
            case Finished():
                images = [self._images[index] for index in sorted(self._images)]
                metadata = responses.metadata_message(parsed, images, self._warnings, event)
                return pb.StreamGenerateResponse(done=pb.Done(metadata=metadata))

    async def _choice_message(self, event: ImageReady) -> pb.StreamGenerateResponse:
        parsed, index = self.parsed, event.index
        began = time.monotonic()
        image, filtered = await asyncio.to_thread(self._filter_and_code, event)
        pixels = parsed.image.width * parsed.image.height
        self._observe(ImageEncoded(pixels, len(image.data), began, time.monotonic(), filtered))
        self._images[index] = responses.image_metadata_message(parsed, event, image)
        if image.smaller:
            self._warnings.append(responses.recoded_warning(parsed, image, index))
        choice = responses.choice_message(parsed, image, filtered)
        ready = pb.ChoiceReady(choice_index=index, choice=choice, metadata=self._images[index])
        return pb.StreamGenerateResponse(choice=ready)

    def _filter_and_code(self, event: ImageReady) -> tuple[CodedImage, bool]:
        """Code the image, or a grey one in its place; whether the content filter replaced it."""
        filtered = self._screening is not None and self._screening.rejects(event.pixels)
        shown = replace(event, pixels=content_filter.blank(event.pixels)) if filtered else event
        return responses.code_image(self.parsed, shown), filtered


def _superseded_kind(message: pb.StreamGenerateResponse) -> Hashable:
    """Return the kind of messages of which only the newest counts: `queued`, or the looks of one image; else None."""
    match message.WhichOneof("event"):
        case "queued":
            return "queued"
        case "preview":
            return message.preview.choice_index
        case "choice":
            return message.choice.choice_index
    return None


class Recordings:
    """Holds the recordings of all running jobs and of the detached jobs that have ended.

    An ended job is kept for at most `retention_seconds`. When ended jobs take more than `retention_bytes`, the oldest
    are dropped. Tests inject the event loop's `call_later` in order not to wait.
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
        self._kept: dict[Recording, tuple[int, Timer]] = {}  # ended jobs, oldest first, with size and timer
        self._kept_bytes = 0

    def begin(self, parsed: ParsedRequest) -> Recording:
        """Begin the job of a request, or join the detached job of its name, unless that one has failed.

        Raises JobAlreadyExists if another request began the job of this name, and what Engine.submit raises.
        """
        known = self._detached.get((parsed.caller.owner, parsed.request_id)) if parsed.detached else None
        if known is not None and known.error is None:
            if known.parsed.message != parsed.message:
                raise JobAlreadyExists(
                    f"another job has the name {parsed.request_id}; cancel it, or use another requestId"
                )
            return known
        recording = Recording(self._engine, parsed, self._observe, self._screening)
        self._running.add(recording)
        recording.ended.add_done_callback(lambda _: self._retain(recording))
        if known is not None:
            self._forget(known)
        if parsed.detached:
            self._detached[recording.key] = recording
        return recording

    def find(self, name: str | None, caller: Caller) -> Recording:
        """Return the caller's detached job of this name. Raises UnknownJob, also for jobs of other owners."""
        if name is None:
            raise UnknownJob("no detached job has such a name: they have 1 to 128 characters of A-Z a-z 0-9 . _ : / -")
        if (caller.owner, name) not in self._detached:
            raise UnknownJob(f"no detached job is named {name} here, or it is no longer kept")
        return self._detached[caller.owner, name]

    def cancel(self, name: str | None, caller: Caller) -> None:
        """End and forget the caller's detached job of this name. Raises UnknownJob."""
        recording = self.find(name, caller)
        recording.cancel()
        self._forget(recording)

    async def wait_until_ended(self) -> None:
        """Wait until no job runs."""
        while self._running:
            await asyncio.wait([recording.ended for recording in self._running])

    @property
    def detached(self) -> tuple[int, int, int]:
        """Count the detached jobs that run, those that have ended and are kept, and the bytes of the latter."""
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
