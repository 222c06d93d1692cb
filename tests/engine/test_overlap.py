"""What the engine promises when prompts are encoded and images decoded beside the steps of other jobs."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path as Folder

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepped_model import REQUEST, Clock, Events, SteppedModel, running

from server import model as ensemble
from server.domain import ImageRequest, OutOfMemory
from server.engine.engine import Engine
from server.engine.events import (
    Cancelled,
    DeadlineExceeded,
    DeviceFull,
    DeviceLost,
    Draining,
    Failed,
    Finished,
    ImageReady,
    ModelFailed,
    Progress,
    ResourceExhausted,
)
from server.engine.interface import Submission
from server.engine.job import Job
from server.engine.scheduling import QueueLimits
from server.ensemble import checkpoint


@dataclass
class OverlappingModel(SteppedModel):
    """Steps wait for `allow`, the other calls for `allow_on_side`."""

    overlaps: bool = True
    side_allowed: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    crowded: bool = False  # memory has room for one call at a time
    error: Exception = field(default_factory=lambda: RuntimeError("a bug at /secret/path"))  # of what fails
    made: list[str] = field(default_factory=list)  # calls that came back without an error

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight: dict[bool, list[bool]] = {}  # by whether it is a step

    def allow_on_side(self, count: int = 1) -> None:
        self.side_allowed.release(count)

    def _call(self, name: str, seed: int) -> None:
        mine = [False]  # whether another call was in flight at any time
        with self._lock:
            assert (name == "step") not in self._in_flight, "only a step and another call may be beside one another"
            for other in self._in_flight.values():
                mine[0] = other[0] = True
            self._in_flight[name == "step"] = mine
        try:
            self.calls.put((name, seed))
            assert (self.allowed if name == "step" else self.side_allowed).acquire(timeout=60)
            if name == self.fails_on:
                raise self.error
            if self.crowded and mine[0]:
                raise OutOfMemory("no room for two")
            self.made.append(name)
        finally:
            with self._lock:
                del self._in_flight[name == "step"]


@pytest.fixture
def model() -> OverlappingModel:
    return OverlappingModel()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(model: OverlappingModel, clock: Clock) -> Iterator[Engine]:
    with ExitStack() as at_the_end:
        engine = at_the_end.enter_context(running(Engine(QueueLimits(jobs=9), clock=clock), model))
        at_the_end.callback(model.allow_on_side, 1000)
        at_the_end.callback(engine.stop)
        yield engine


def request(seed: int, images: int = 1) -> ImageRequest:
    return replace(REQUEST, seeds=tuple(range(seed, seed + images)))


def two_in_flight(
    engine: Engine, model: OverlappingModel, images: int = 1
) -> tuple[tuple[Job, Events], tuple[Job, Events]]:
    """Two jobs: the first decode of the one, with seed 10, and the first step of the other, seed 20, are in flight."""
    first, second = Events(), Events()
    decoding = engine.submit(Submission("decoding", request(10, images)), first)
    stepping = engine.submit(Submission("stepping", request(20)), second)
    model.allow_on_side(2)
    model.allow(3)  # those of the first, which has come first
    seen = [model.calls.get(timeout=60) for _ in range(7)]
    assert sorted(seen) == [("decode", 10), ("encode", 10), ("encode", 20), *[("step", 10)] * 3, ("step", 20)]
    return (decoding, first), (stepping, second)


def test_steps_of_others_go_on_while_an_image_is_decoded(engine: Engine, model: OverlappingModel):
    (_, decoding), (_, stepping) = two_in_flight(engine, model)
    model.allow(3)
    assert [model.calls.get(timeout=60) for _ in range(2)] == [("step", 20)] * 2
    model.allow_on_side(1)
    told = decoding.to_the_end()
    assert [type(each) for each in told[-2:]] == [ImageReady, Finished]
    model.allow_on_side(1)
    assert isinstance(stepping.to_the_end()[-1], Finished)
    assert decoding.is_over()
    assert stepping.is_over()


def test_a_job_has_the_same_events_with_and_without_overlap(clock: Clock):
    told = []
    for overlaps in (False, True):
        model, events = OverlappingModel(overlaps=overlaps), Events()
        model.allow(1000)
        model.allow_on_side(1000)
        with running(Engine(QueueLimits(jobs=9), clock=clock), model) as engine:
            engine.submit(Submission("job", request(10, images=2)), events)
            told.append([repr(each) for each in events.to_the_end()])
    assert told[0] == told[1]


def test_the_next_prompt_is_encoded_ahead_of_its_turn_and_no_more_than_a_step_has_room_for(
    engine: Engine, model: OverlappingModel
):
    now, later, last = Events(), Events(), Events()
    engine.submit(Submission("now", request(100)), now)
    model.allow_on_side(1000)
    assert [model.calls.get(timeout=60) for _ in range(2)] == [("encode", 100), ("step", 100)]
    engine.submit(Submission("later", request(10)), later)
    engine.submit(Submission("last", request(20)), last)
    model.allow(1)
    assert {model.calls.get(timeout=60) for _ in range(2)} == {("encode", 10), ("step", 100)}
    while not isinstance(later.next(), Progress):
        pass
    model.allow(1000)
    for events in (now, later, last):
        assert isinstance(events.to_the_end()[-1], Finished)
    rest = [model.calls.get_nowait() for _ in range(model.calls.qsize())]
    assert rest.index(("encode", 20)) > rest.index(("decode", 100))  # one more step of the first job came before


def test_whoever_is_encoded_ahead_is_told_when_its_turn_will_end(engine: Engine, model: OverlappingModel, clock: Clock):
    measured, now, later = Events(), Events(), Events()
    engine.submit(Submission("measured", REQUEST), measured)
    for _ in range(5):
        name, _ = model.calls.get(timeout=60)
        clock.now += 1
        (model.allow if name == "step" else model.allow_on_side)()
    measured.to_the_end()
    engine.submit(Submission("now", request(10)), now)
    model.allow_on_side(1)
    assert [model.calls.get(timeout=60) for _ in range(2)] == [("encode", 10), ("step", 10)]
    engine.submit(Submission("later", request(20)), later)
    model.allow(1)
    assert {model.calls.get(timeout=60) for _ in range(2)} == {("encode", 20), ("step", 10)}
    model.allow_on_side(1)
    while not isinstance(event := later.next(), Progress):
        pass
    assert event.eta >= 3 + 4  # seconds: two steps and a decoding of the other's, three steps and a decoding of its own


@pytest.mark.parametrize(("short_jobs", "steps_go_on"), [(3, True), (4, False)])
def test_while_too_much_waits_for_the_side_thread_no_step_adds_to_it(
    engine: Engine, model: OverlappingModel, clock: Clock, short_jobs: int, steps_go_on: bool
):
    measured, long, *short = [Events() for _ in range(2 + short_jobs)]
    engine.submit(Submission("measured", REQUEST), measured)
    for _ in range(5):
        name, _ = model.calls.get(timeout=60)
        clock.now += 1
        (model.allow if name == "step" else model.allow_on_side)()
    measured.to_the_end()
    engine.submit(Submission("long", request(100, images=5)), long)
    model.allow_on_side(1)
    assert [model.calls.get(timeout=60) for _ in range(2)] == [("encode", 100), ("step", 100)]
    for number, events in enumerate(short):
        engine.submit(Submission("short", request(10 * number), priority=9), events)
    model.allow(1)  # and from now on the prompts of the short jobs go first: one is in flight, and two may wait
    if steps_go_on:
        assert {model.calls.get(timeout=60) for _ in range(2)} == {("encode", 0), ("step", 100)}
    else:
        assert model.calls.get(timeout=60) == ("encode", 0)
        for _ in range(2):  # between the two, the device thread has looked for a step to make
            ended = Events()
            engine.cancel(engine.submit(Submission("fence", REQUEST), ended))
            ended.to_the_end()
        assert model.calls.empty()
    model.allow(1000)
    model.allow_on_side(1000)
    for events in (long, *short):
        assert isinstance(events.to_the_end()[-1], Finished)


def test_a_job_cancelled_while_its_call_waits_for_the_side_thread_ends_at_once(
    engine: Engine, model: OverlappingModel, clock: Clock
):
    hanging, cancelled, late = Events(), Events(), Events()
    engine.submit(Submission("hanging", request(10)), hanging)
    assert model.calls.get(timeout=60) == ("encode", 10)
    engine.cancel(engine.submit(Submission("cancelled", request(20)), cancelled))
    terminal = cancelled.to_the_end()[-1]
    assert isinstance(terminal, Failed)
    assert isinstance(terminal.error, Cancelled)
    engine.submit(Submission("late", request(30), timeout=5), late)
    clock.now = 6
    engine.cancel(engine.submit(Submission("wakes the device thread", request(40)), Events()))
    terminal = late.to_the_end()[-1]
    assert isinstance(terminal, Failed)
    assert isinstance(terminal.error, DeadlineExceeded)
    model.allow_on_side(1000)
    model.allow(1000)
    assert isinstance(hanging.to_the_end()[-1], Finished)
    assert {model.calls.get_nowait()[1] for _ in range(4)} == {10}
    assert model.calls.empty()


def test_a_job_cancelled_while_it_is_decoded_ends_after_that_call(
    engine: Engine, model: OverlappingModel, clock: Clock
):
    (job, decoding), (_, stepping) = two_in_flight(engine, model, images=2)
    engine.cancel(job)
    clock.now += 2
    model.allow_on_side(1)
    told = decoding.to_the_end()
    assert isinstance(told[-1], Failed)
    assert isinstance(told[-1].error, Cancelled)
    assert decoding.is_over()
    assert engine.statistics().wasted == pytest.approx(2)
    model.allow(1000)
    model.allow_on_side(1)
    assert isinstance(stepping.to_the_end()[-1], Finished)


@pytest.mark.parametrize("call", ["encode", "decode"])
@pytest.mark.parametrize(("error", "told"), [(RuntimeError("a bug"), ModelFailed), (OutOfMemory("80 GiB"), DeviceFull)])
def test_what_fails_on_the_side_fails_alone(
    engine: Engine, model: OverlappingModel, clock: Clock, call: str, error: Exception, told: type[Exception]
):
    model.allow(1000)
    model.allow_on_side(1000)
    model.fails_on, model.error = call, error
    broken, after = Events(), Events()
    engine.submit(Submission("broken", request(10)), broken)
    terminal = broken.to_the_end()[-1]
    assert isinstance(terminal, Failed)
    assert isinstance(terminal.error, told)
    model.fails_on = None
    clock.now += 60  # until when what did not fit is refused
    engine.submit(Submission("after", request(20)), after)
    assert isinstance(after.to_the_end()[-1], Finished)


@pytest.mark.parametrize("first_to_end", ["step", "decode"])
def test_where_memory_has_no_room_for_two_calls_they_are_made_again_one_after_the_other(
    engine: Engine, model: OverlappingModel, first_to_end: str
):
    model.crowded = True
    (_, decoding), (_, stepping) = two_in_flight(engine, model)
    if first_to_end == "step":
        model.allow(1)
        model.allow_on_side(1)
    else:
        model.allow_on_side(1)
        model.allow(1)
    model.allow(1000)
    model.allow_on_side(1000)
    for events in (decoding, stepping):
        assert isinstance(events.to_the_end()[-1], Finished)
    assert sorted(model.made) == ["decode"] * 2 + ["encode"] * 2 + ["step"] * 6


def test_calls_overlap_again_after_a_while(engine: Engine, model: OverlappingModel, clock: Clock):
    model.crowded = True
    (_, decoding), (_, stepping) = two_in_flight(engine, model)
    model.allow(6)
    model.allow_on_side(4)
    for events in (decoding, stepping):
        assert isinstance(events.to_the_end()[-1], Finished)
    model.crowded = False
    clock.now += 60
    while not model.calls.empty():
        model.calls.get()
    while model.allowed.acquire(blocking=False) or model.side_allowed.acquire(blocking=False):
        pass
    two_in_flight(engine, model)


def test_a_call_that_hangs_on_the_side_is_seen_and_can_be_abandoned(model: OverlappingModel, clock: Clock):
    engine = Engine(QueueLimits(jobs=9), clock=clock)
    engine.start(lambda: model).result(timeout=60)
    (_, decoding), (_, stepping) = two_in_flight(engine, model)
    clock.now += 100
    model.allow(1)
    assert model.calls.get(timeout=60) == ("step", 20)
    assert engine.busy == 100
    engine.abandon()
    for events in (decoding, stepping):
        terminal = events.to_the_end()[-1]
        assert isinstance(terminal, Failed)
        assert isinstance(terminal.error, DeviceLost)
    model.allow(1000)
    model.allow_on_side(1000)
    assert engine.join(60)
    assert decoding.is_over()
    assert stepping.is_over()


def test_stopping_ends_every_job_after_the_calls_in_flight(engine: Engine, model: OverlappingModel):
    (_, decoding), (_, stepping) = two_in_flight(engine, model, images=2)
    engine.stop()
    model.allow(1000)
    model.allow_on_side(1000)
    for events in (decoding, stepping):
        told = events.to_the_end()
        assert isinstance(told[-1], Failed)
        assert isinstance(told[-1].error, Draining)
    assert engine.join(60)
    assert model.calls.empty()


@settings(max_examples=60, deadline=None)
@given(
    jobs=st.lists(
        st.tuples(st.integers(1, 3), st.sampled_from(["", "broken", "cancelled", "late"])), min_size=1, max_size=12
    ),
    max_batch=st.sampled_from([1, 2, 4]),
    crowded=st.booleans(),
)
def test_every_job_ends_once_whatever_overlaps(jobs: list[tuple[int, str]], max_batch: int, crowded: bool):
    model = OverlappingModel(max_batch=max_batch, broken_seed=13, crowded=crowded)
    with running(Engine(QueueLimits(jobs=99)), model) as engine:
        model.allow(10_000)
        model.allow_on_side(10_000)
        submitted = []
        for number, (images, fate) in enumerate(jobs):
            events, seed = Events(), 13 if fate == "broken" else 100 + 10 * number
            with suppress((ResourceExhausted, DeadlineExceeded) if fate == "late" else ()):
                timeout = 0.001 if fate == "late" else 1e6
                job = engine.submit(Submission("job", request(seed, images), timeout=timeout), events)
                submitted.append((events, seed, images, fate))
                if fate == "cancelled":
                    engine.cancel(job)
        ends = [events.to_the_end() for events, *_ in submitted]
    for (events, seed, images, fate), told in zip(submitted, ends, strict=True):
        assert events.is_over()
        ready = [(each.index, each.seed) for each in told if isinstance(each, ImageReady)]
        assert ready == [(index, seed + index) for index in range(len(ready))]
        if isinstance(told[-1], Finished):
            assert fate != "broken"
            assert len(ready) == images
        else:
            assert fate


def test_the_bytes_of_the_ensemble_are_the_same_with_and_without_overlap(folders: tuple[Folder, Folder]):
    def images(overlaps: bool) -> list[bytes]:
        loaded = ensemble.load(checkpoint.inspect(*folders), device="cpu", precision="fp32", max_batch=2)
        loaded.overlaps = overlaps
        engine, jobs = Engine(QueueLimits(jobs=9)), [Events() for _ in range(4)]
        engine.start(lambda: loaded).result(timeout=60)
        for number, events in enumerate(jobs):
            asked = ImageRequest("a cat", "a dog", (number, number + 50), 6, 5.0, 0.6, "euler", 32, 32)
            engine.submit(Submission("job", asked), events)
        told = [event for events in jobs for event in events.to_the_end()]
        engine.stop()
        assert engine.join(60)
        return [each.pixels.tobytes() for each in told if isinstance(each, ImageReady)]

    beside = images(True)
    assert len(beside) == 8
    assert beside == images(False)
