"""Recordings: what listeners get and what is kept, over a scripted engine and clock, with real image coding."""

import asyncio
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest
from model_info import LIMITS, MODEL_INFO
from PIL import Image
from serving import request

from server.api import errors, requests, responses
from server.api.recordings import Recording, Recordings
from server.domain import Caller, Stage
from server.engine.events import (
    Cancelled,
    DeviceTimeAttributed,
    Draining,
    Event,
    Failed,
    Finished,
    ImageReady,
    ModelFailed,
    Observation,
    Preview,
    PreviewDropped,
    Progress,
    Queued,
)
from server.engine.interface import Submission
from server.engine.task import ImageTask
from text_to_image_client.v1 import text_to_image_pb2 as pb

DETACH = {"onDisconnect": "ON_DISCONNECT_DETACH"}
ME = Caller("me")
DONE = Finished((), 0.5, 1.5, MODEL_INFO.environment)


def image(index: int, side: int = 64) -> ImageReady:
    noise = np.random.default_rng(index).integers(0, 256, (side, side, 3), np.uint8)
    return ImageReady(index, index, noise, 1, 1)


def preview(index: int, step: int) -> Preview:
    return Preview(index, step, 30, np.full((16, 16, 3), step, np.uint8))


def progress(step: int) -> Progress:
    return Progress(0, Stage.BASE, step, 30, 1.0)


@dataclass(eq=False)
class Submitted:
    """A job of ScriptedEngine; `deliver` is its callback."""

    deliver: Callable[[Event], None]
    submission: Submission
    cancelled: bool = False
    cancel_message: str = ""
    task: ImageTask = field(default_factory=lambda: ImageTask("", [], used=1.25))


@dataclass
class ScriptedEngine:
    jobs: list[Submitted] = field(default_factory=list)

    def submit(self, submission: Submission, deliver: Callable[[Event], None]) -> Submitted:
        self.jobs.append(Submitted(deliver, submission))
        return self.jobs[-1]

    def cancel(self, job: Submitted, message: str) -> None:
        job.cancelled = True
        job.cancel_message = message


@dataclass
class Clock:
    """Timers that fire when the test advances the time."""

    now: float = 0
    timers: dict["Timer", tuple[float, Callable[[Recording], None], Recording]] = field(default_factory=dict)

    def call_later(self, delay: float, callback: Callable[[Recording], None], recording: Recording) -> "Timer":
        timer = Timer(self)
        self.timers[timer] = self.now + delay, callback, recording
        return timer

    def advance(self, seconds: float) -> None:
        self.now += seconds
        for timer, (when, callback, recording) in list(self.timers.items()):
            if when <= self.now:
                del self.timers[timer]
                callback(recording)


@dataclass(eq=False)
class Timer:
    clock: Clock

    def cancel(self) -> None:
        self.clock.timers.pop(self, None)


@dataclass
class Scenario:
    """Recordings over the scripted engine and clock."""

    engine: ScriptedEngine = field(default_factory=ScriptedEngine)
    clock: Clock = field(default_factory=Clock)
    retention_bytes: int = 10_000_000
    observed: list[Observation] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.recordings = Recordings(
            self.engine, 600, self.retention_bytes, self.clock.call_later, self.observed.append
        )

    def begin(self, name: str = "mine", *, prompt: str = "a cat", whole: bool = False, **fields: object) -> Recording:
        message = request(prompt, requestId=name, **fields)
        parsed = requests.parse(message, name, MODEL_INFO, LIMITS, ME)
        return self.recordings.begin(requests.in_one_message(parsed) if whole else parsed)

    @property
    def settled(self) -> list[DeviceTimeAttributed]:
        return [each for each in self.observed if isinstance(each, DeviceTimeAttributed)]

    async def end(self, name: str, *events: Event, **fields: object) -> Recording:
        """Run a detached job to its end."""
        recording = self.begin(name, **DETACH, **fields)
        await deliver(recording, self.engine, *events)
        return recording


async def deliver(recording: Recording, engine: ScriptedEngine, *events: Event) -> None:
    """Deliver the events of the newest job, the last of which ends it, and wait until they are recorded."""
    for event in events:
        engine.jobs[-1].deliver(event)
    await recording.ended
    await asyncio.sleep(0)  # let the tasks that wait for the end see it


async def listen(recording: Recording, after: int = 0) -> list[pb.StreamGenerateResponse]:
    with recording.listening(after) as messages:
        return [message async for message in messages]


def kinds(messages: Iterable[pb.StreamGenerateResponse]) -> list[str | None]:
    return [message.WhichOneof("event") for message in messages]


@pytest.fixture
def scenario() -> Scenario:
    return Scenario()


class TestListening:
    async def test_listeners_get_all_events_once_in_order_live_or_later_from_any_number(self, scenario):
        recording = scenario.begin(**DETACH)
        early = asyncio.create_task(listen(recording))
        await deliver(recording, scenario.engine, Queued(0, 1.0), progress(1), progress(2), image(0), DONE)
        heard = await early
        assert kinds(heard) == ["queued", "progress", "progress", "choice", "done"]
        assert [message.number for message in heard] == [1, 2, 3, 4, 5]
        for after in range(6):
            assert await listen(recording, after) == heard[after:]

    async def test_a_number_beyond_the_newest_event_is_invalid(self, scenario):
        recording = scenario.begin(**DETACH)
        with pytest.raises(errors.InvalidRequest, match="after: must be at most 0, the newest event, is 1"):
            await listen(recording, 1)

    async def test_the_jobs_error_ends_all_listeners_including_late_ones(self, scenario):
        recording = scenario.begin(**DETACH)
        early = asyncio.create_task(listen(recording))
        await deliver(recording, scenario.engine, Queued(0, 1.0), Failed(ModelFailed("broken")))
        for listening in (early, listen(recording), listen(recording, 1)):
            with pytest.raises(ModelFailed, match="broken"):
                await listening

    async def test_an_image_that_cannot_be_coded_ends_the_job_with_an_internal_error(self, scenario, caplog):
        recording = scenario.begin(**DETACH)
        (job,) = scenario.engine.jobs
        job.deliver(ImageReady(0, 0, np.zeros((8, 8, 7), np.complex64), 1, 1))
        with pytest.raises(errors.InternalError, match="internal error; the server's log has the cause"):
            await listen(recording)
        assert job.cancelled
        assert "Traceback" in caplog.text

    async def test_the_metadata_has_the_images_in_order_of_their_index(self, scenario):
        recording = scenario.begin(parameter={"n": 2, "seed": 0})
        scenario.engine.jobs[0].deliver(image(1))
        scenario.engine.jobs[0].deliver(image(0))
        scenario.engine.jobs[0].deliver(DONE)
        *_, done = await listen(recording)
        assert [each.seed for each in done.done.metadata.images] == [0, 1]


class TestSupersededEvents:
    async def test_a_replay_has_only_the_newest_queued_event(self, scenario):
        events = (Queued(2, 3.0), Queued(1, 2.0), Queued(0, 1.0), progress(1), image(0), DONE)
        messages = await listen(await scenario.end("mine", *events))
        assert kinds(messages) == ["queued", "progress", "choice", "done"]
        assert messages[0].queued.position == 0
        assert [message.number for message in messages] == [3, 4, 5, 6]

    async def test_only_the_newest_preview_of_an_image_is_kept_until_the_image_is_ready(self, scenario):
        recording = scenario.begin(parameter={"n": 2, "seed": 0}, output={"previewInterval": 1}, **DETACH)
        (job,) = scenario.engine.jobs
        for event in (preview(0, 1), preview(1, 1), preview(0, 2), image(1)):
            job.deliver(event)
        with recording.listening() as messages:
            while not (await anext(messages)).HasField("choice"):
                pass
        with recording.listening() as messages:
            first, second = await anext(messages), await anext(messages)
        assert kinds([first, second]) == ["preview", "choice"]
        assert (first.preview.choice_index, first.preview.step) == (0, 2)
        await deliver(recording, scenario.engine, image(0), preview(0, 3), DONE)
        assert kinds(await listen(recording)) == ["choice", "choice", "done"]

    async def test_live_listeners_get_every_preview(self, scenario):
        recording = scenario.begin(output={"previewInterval": 1})
        (job,) = scenario.engine.jobs
        with recording.listening() as messages:
            for step in range(1, 4):
                job.deliver(preview(0, step))
                message = await anext(messages)
                assert (message.number, message.preview.step, message.preview.steps) == (step, step, 30)

    @pytest.mark.parametrize("raw", [True, False])
    async def test_a_preview_is_a_small_jpeg_in_the_form_of_the_images(self, scenario, raw: bool):
        recording = scenario.begin(output={"previewInterval": 1, "raw": raw, "format": "FORMAT_PNG"})
        scenario.engine.jobs[0].deliver(preview(0, 1))
        with recording.listening() as messages:
            shown = (await anext(messages)).preview
        if raw:
            assert Image.open(io.BytesIO(shown.raw)).size == (16, 16)
        else:
            assert shown.image.startswith("data:image/jpeg;base64,")
        assert bool(shown.raw) is raw
        assert bool(shown.image) is not raw

    async def test_the_submission_has_the_caller_the_priority_and_the_preview_interval(self, scenario):
        recording = scenario.begin(output={"previewInterval": 5}, priority=-1)
        assert scenario.engine.jobs[0].submission == Submission(
            "mine", recording.parsed.image, ME, math.inf, priority=-1, preview_interval=5
        )


class TestOwnership:
    async def test_a_job_ends_with_its_caller(self, scenario):
        recording = scenario.begin()
        with recording.listening():
            assert not scenario.engine.jobs[0].cancelled
        assert scenario.engine.jobs[0].cancelled

    async def test_a_detached_job_outlives_its_caller(self, scenario):
        recording = scenario.begin(**DETACH)
        with recording.listening():
            pass
        assert not scenario.engine.jobs[0].cancelled

    async def test_messages_of_the_only_listener_are_released(self, scenario):
        recording = scenario.begin()
        (job,) = scenario.engine.jobs
        with recording.listening() as messages:
            before = recording.size
            job.deliver(image(0))
            await anext(messages)
            job.deliver(DONE)
            await recording.ended
            assert recording.size < before + 3000, "the metadata of `done`, and no image"

    async def test_the_same_request_joins_and_another_is_rejected(self, scenario):
        first = scenario.begin(**DETACH)
        assert scenario.begin(**DETACH) is first
        with pytest.raises(
            errors.JobAlreadyExists, match="another job has the name mine; cancel it, or use another requestId"
        ):
            scenario.begin(prompt="a dog", **DETACH)
        assert len(scenario.engine.jobs) == 1
        await deliver(first, scenario.engine, image(0), DONE)
        assert scenario.begin(**DETACH) is first, "it joins after the end, too"

    async def test_a_job_that_is_not_detached_cannot_be_joined_or_attached_to(self, scenario):
        first = scenario.begin()
        assert scenario.begin() is not first
        with pytest.raises(errors.UnknownJob):
            scenario.recordings.find("mine", ME)
        detached = scenario.begin(**DETACH)
        assert scenario.begin(prompt="a dog") is not detached
        assert scenario.recordings.find("mine", ME) is detached

    async def test_a_failed_job_leaves_its_name_to_the_next_request(self, scenario):
        failed = await scenario.end("mine", Failed(ModelFailed("broken")))
        assert scenario.recordings.find("mine", ME) is failed
        again = scenario.begin(prompt="a dog", **DETACH)
        assert scenario.recordings.find("mine", ME) is again
        scenario.clock.advance(601)
        assert scenario.recordings.find("mine", ME) is again, "the failed one's time is not its own"

    async def test_a_failed_job_keeps_its_name_when_the_next_request_is_not_admitted(self, scenario, monkeypatch):
        def refuse(*arguments: object) -> None:
            raise Draining("the server is shutting down")

        failed = await scenario.end("mine", Failed(ModelFailed("broken")))
        monkeypatch.setattr(scenario.engine, "submit", refuse)
        with pytest.raises(Draining):
            scenario.begin(**DETACH)
        assert scenario.recordings.find("mine", ME) is failed

    async def test_the_error_of_an_invalid_name_does_not_repeat_it(self, scenario):
        for look in (scenario.recordings.find, scenario.recordings.cancel):
            with pytest.raises(errors.UnknownJob, match="no detached job has such a name: they have 1 to 128 char"):
                look(None, ME)

    async def test_cancel_ends_the_job_and_frees_its_name_at_once(self, scenario):
        first = scenario.begin(**DETACH)
        following = asyncio.create_task(listen(first))
        scenario.recordings.cancel("mine", ME)
        assert scenario.engine.jobs[0].cancelled
        assert scenario.engine.jobs[0].cancel_message == "the job mine was cancelled by another call"
        with pytest.raises(errors.UnknownJob, match="no detached job is named mine here"):
            scenario.recordings.cancel("mine", ME)
        second = scenario.begin(prompt="a dog", **DETACH)
        scenario.engine.jobs[0].deliver(Failed(Cancelled("cancelled")))
        with pytest.raises(Cancelled):
            await following
        await asyncio.sleep(0)
        assert scenario.recordings.find("mine", ME) is second

    async def test_cancel_forgets_an_ended_job(self, scenario):
        await scenario.end("mine", image(0), DONE)
        scenario.recordings.cancel("mine", ME)
        with pytest.raises(errors.UnknownJob):
            scenario.recordings.find("mine", ME)
        assert not scenario.clock.timers

    @pytest.mark.parametrize("name", [None, "", "nobody"])
    async def test_unknown_names_are_errors(self, scenario, name: str | None):
        with pytest.raises(errors.UnknownJob):
            scenario.recordings.find(name, ME)

    async def test_waiting_for_all_jobs_includes_those_without_listeners(self, scenario):
        recording = scenario.begin(**DETACH)
        waiting = asyncio.create_task(scenario.recordings.wait_until_ended())
        await asyncio.sleep(0)
        assert not waiting.done()
        await deliver(recording, scenario.engine, image(0), DONE)
        await waiting


class TestRetention:
    async def test_a_detached_job_is_kept_for_the_retention_after_its_end(self, scenario):
        running = scenario.begin("running", **DETACH)
        scenario.clock.advance(10_000)
        assert scenario.recordings.find("running", ME) is running
        await deliver(running, scenario.engine, image(0), DONE)
        scenario.clock.advance(599)
        assert scenario.recordings.find("running", ME) is running
        scenario.clock.advance(1)
        with pytest.raises(errors.UnknownJob):
            scenario.recordings.find("running", ME)

    async def test_beyond_the_byte_limit_the_oldest_ended_jobs_are_dropped(self):
        scenario = Scenario()
        size = (await scenario.end("a size", image(0), DONE)).size
        scenario = Scenario(retention_bytes=2 * size + size // 2)
        late = scenario.begin("begun first, ended last", **DETACH)
        late_job = scenario.engine.jobs[-1]
        for name in ("a", "b", "c"):
            await scenario.end(name, image(0), DONE)
        with pytest.raises(errors.UnknownJob):
            scenario.recordings.find("a", ME)
        assert scenario.recordings.find("b", ME)
        late_job.deliver(image(0))
        late_job.deliver(DONE)
        await late.ended
        await asyncio.sleep(0)
        with pytest.raises(errors.UnknownJob):
            scenario.recordings.find("b", ME)
        assert scenario.recordings.find("c", ME)
        assert scenario.recordings.find("begun first, ended last", ME) is late
        assert len(scenario.clock.timers) == 2, "no timer holds on to what is forgotten"

    async def test_a_job_larger_than_the_byte_limit_reaches_its_listeners_and_is_not_kept(self):
        scenario = Scenario(retention_bytes=1000)
        recording = scenario.begin(**DETACH)
        listening = asyncio.create_task(listen(recording))
        await deliver(recording, scenario.engine, image(0), DONE)
        assert kinds(await listening) == ["choice", "done"]
        with pytest.raises(errors.UnknownJob):
            scenario.recordings.find("mine", ME)

    async def test_a_listener_continues_in_a_recording_that_is_dropped(self, scenario):
        recording = await scenario.end("mine", image(0), DONE)
        with recording.listening() as messages:
            first = await anext(messages)
            scenario.clock.advance(600)
            assert kinds([first, *[message async for message in messages]]) == ["choice", "done"]


class TestHeartbeat:
    async def test_after_a_silence_the_newest_state_is_repeated_as_the_same_event(self, scenario):
        recording = scenario.begin(**DETACH)
        scenario.engine.jobs[0].deliver(Queued(2, 100.0))
        with recording.listening(heartbeat_seconds=0.01) as messages:
            queued, again = await anext(messages), await anext(messages)
            assert kinds([queued, again]) == ["queued", "queued"]
            assert (again.number, again.queued.position) == (queued.number, 2)
            assert again.queued.eta.ToTimedelta() < queued.queued.eta.ToTimedelta(), "what has passed is taken off"
            scenario.engine.jobs[0].deliver(progress(1))
            while (step := await anext(messages)).number == queued.number:
                pass
            again = await anext(messages)
            assert kinds([step, again]) == ["progress", "progress"]
            assert (again.number, again.progress.step) == (step.number, 1)

    async def test_a_repeated_event_has_the_newest_number_so_that_attach_gets_nothing_twice(self, scenario):
        recording = scenario.begin(output={"previewInterval": 1}, **DETACH)
        for event in (Queued(0, 1.0), progress(1), preview(0, 1)):
            scenario.engine.jobs[0].deliver(event)
        with recording.listening(heartbeat_seconds=0.01) as messages:
            events = [await anext(messages) for _ in range(4)]
        assert kinds(events) == ["queued", "progress", "preview", "progress"]
        assert [each.number for each in events] == [1, 2, 3, 3]
        with recording.listening(after=3, heartbeat_seconds=0.01) as messages:
            again = await anext(messages)
            assert (again.number, again.progress.step) == (3, 1)
            scenario.engine.jobs[0].deliver(image(0))
            scenario.engine.jobs[0].deliver(DONE)
            rest = [message async for message in messages if message.number != 3]
        assert [each.number for each in rest] == [4, 5]

    async def test_an_eta_that_has_passed_is_zero(self):
        event = pb.StreamGenerateResponse(queued=pb.Queued(position=1))
        event.queued.eta.FromSeconds(5)
        assert responses.heartbeat_message(event, 100.0, 103.0, 1).queued.eta.ToSeconds() == 2
        assert responses.heartbeat_message(event, 100.0, 200.0, 1).queued.eta.ToSeconds() == 0


class TestImageSpace:
    async def test_images_of_one_message_get_the_same_space_in_any_order(self):
        sizes = []
        for order in ((0, 1), (1, 0)):
            scenario = Scenario()
            recording = scenario.begin(
                parameter={"n": 2, "seed": 0},
                output={"format": "FORMAT_PNG", "raw": True, "maxMessageBytes": 40_000},
                whole=True,
            )
            for index in order:
                scenario.engine.jobs[0].deliver(image(index, side=128))
            scenario.engine.jobs[0].deliver(DONE)
            *_, done = await listen(recording)
            sizes.append([each.sha256 for each in done.done.metadata.images])
            assert {each.code for each in done.done.metadata.warnings} == {pb.Warning.CODE_IMAGE_RECODED}
        assert sizes[0] == sizes[1]


class TestDeviceTime:
    """Each job of the scripted engine has used 1.25 s of its device."""

    @pytest.mark.parametrize("detach", [{}, DETACH])
    async def test_images_that_a_caller_got_count_as_delivered(self, scenario, detach: dict[str, object]):
        recording = scenario.begin(**detach)
        listening = asyncio.create_task(listen(recording))
        await deliver(recording, scenario.engine, image(0), DONE)
        await listening
        assert scenario.settled == [DeviceTimeAttributed(1.25, delivered=True)]

    @pytest.mark.parametrize("detach", [{}, DETACH])
    async def test_a_failed_job_counts_as_wasted(self, scenario, detach: dict[str, object]):
        recording = scenario.begin(**detach)
        listening = asyncio.create_task(listen(recording))
        await deliver(recording, scenario.engine, Failed(ModelFailed("broken")))
        with pytest.raises(ModelFailed):
            await listening
        assert scenario.settled == [DeviceTimeAttributed(1.25, delivered=False)]

    async def test_a_job_that_finishes_after_its_listener_left_counts_as_wasted(self, scenario):
        recording = scenario.begin()
        with recording.listening() as messages:
            scenario.engine.jobs[0].deliver(Queued(0, 1.0))
            await anext(messages)
        assert scenario.settled == []
        await deliver(recording, scenario.engine, image(0), DONE)
        assert scenario.settled == [DeviceTimeAttributed(1.25, delivered=False)]

    async def test_a_job_whose_listener_leaves_before_the_last_message_counts_as_wasted(self, scenario):
        recording = scenario.begin()
        with recording.listening() as messages:
            await deliver(recording, scenario.engine, image(0), DONE)
            await anext(messages)
            assert scenario.settled == []
        assert scenario.settled == [DeviceTimeAttributed(1.25, delivered=False)]

    async def test_a_detached_job_is_undecided_until_it_is_dropped(self, scenario):
        found, _ = await scenario.end("found", image(0), DONE), await scenario.end("forgotten", image(0), DONE)
        assert scenario.settled == []
        await listen(found)
        assert scenario.settled == [DeviceTimeAttributed(1.25, delivered=True)]
        scenario.clock.advance(600)
        assert scenario.settled == [
            DeviceTimeAttributed(1.25, delivered=True),
            DeviceTimeAttributed(1.25, delivered=False),
        ]

    async def test_a_preview_after_its_image_is_reported_as_dropped(self, scenario):
        await scenario.end("mine", image(0), preview(0, 1), DONE)
        assert scenario.observed.count(PreviewDropped()) == 1
