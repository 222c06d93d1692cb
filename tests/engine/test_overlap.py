"""Test the engine with prompts encoded and images decoded during the steps of other jobs."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

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
    crowded: bool = False  # memory has no room for two calls at once
    error: Exception = field(default_factory=lambda: RuntimeError("a bug at /secret/path"))  # raised by `fails_on`
    made: list[str] = field(default_factory=list)  # calls that returned without an error

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight: dict[bool, list[bool]] = {}  # by whether the call is a step

    def allow_on_side(self, count: int = 1) -> None:
        self.side_allowed.release(count)

    def _call(self, name: str, seed: int) -> None:
        overlapped = [False]  # whether another call was in flight at any time
        with self._lock:
            assert (name == "step") not in self._in_flight, "only a step and another call may overlap"
            for other in self._in_flight.values():
                overlapped[0] = other[0] = True
            self._in_flight[name == "step"] = overlapped
        try:
            self.calls.put((name, seed))
            assert (self.allowed if name == "step" else self.side_allowed).acquire(timeout=60)
            if name == self.fails_on:
                raise self.error
            if self.crowded and overlapped[0]:
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
    """Submit two jobs and return with a decode of the first (seed 10) and a step of the second (seed 20) in flight."""
    first, second = Events(), Events()
    decoding = engine.submit(Submission("decoding", request(10, images)), first)
    stepping = engine.submit(Submission("stepping", request(20)), second)
    model.allow_on_side(2)
    model.allow(3)  # the steps of the first job
    seen = [model.calls.get(timeout=60) for _ in range(7)]
    assert sorted(seen) == [("decode", 10), ("encode", 10), ("encode", 20), *[("step", 10)] * 3, ("step", 20)]
    return (decoding, first), (stepping, second)


def test_steps_of_other_jobs_run_during_a_decode(engine: Engine, model: OverlappingModel):
    (_, decoding), (_, stepping) = two_in_flight(engine, model)
    model.allow(3)
    assert [model.calls.get(timeout=60) for _ in range(2)] == [("step", 20)] * 2
    model.allow_on_side(1)
    reported = decoding.to_the_end()
    assert [type(each) for each in reported[-2:]] == [ImageReady, Finished]
    model.allow_on_side(1)
    assert isinstance(stepping.to_the_end()[-1], Finished)
    assert decoding.is_over()
    assert stepping.is_over()


def test_events_are_the_same_with_and_without_overlap(clock: Clock):
    reported = []
    for overlaps in (False, True):
        model, events = OverlappingModel(overlaps=overlaps), Events()
        model.allow(1000)
        model.allow_on_side(1000)
        with running(Engine(QueueLimits(jobs=9), clock=clock), model) as engine:
            engine.submit(Submission("job", request(10, images=2)), events)
            reported.append([repr(each) for each in events.to_the_end()])
    assert reported[0] == reported[1]


def test_prompts_are_encoded_ahead_as_many_as_a_step_has_room_for(engine: Engine, model: OverlappingModel):
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
    assert rest.index(("encode", 20)) > rest.index(("decode", 100))  # the queue had room for one prompt only


def test_eta_of_a_job_encoded_ahead_includes_its_wait(engine: Engine, model: OverlappingModel, clock: Clock):
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
    assert event.eta >= 3 + 4  # seconds: two steps and a decode of the other job, three steps and a decode of its own


@pytest.mark.parametrize(("short_jobs", "steps_go_on"), [(3, True), (4, False)])
def test_no_step_runs_while_the_side_queue_is_full(
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
    model.allow(1)  # from now on the prompts of the short jobs run first: one is in flight, and two may wait
    if steps_go_on:
        assert {model.calls.get(timeout=60) for _ in range(2)} == {("encode", 0), ("step", 100)}
    else:
        assert model.calls.get(timeout=60) == ("encode", 0)
        for _ in range(2):  # between the two, the device thread has looked for a step
            ended = Events()
            engine.cancel(engine.submit(Submission("fence", REQUEST), ended))
            ended.to_the_end()
        assert model.calls.empty()
    model.allow(1000)
    model.allow_on_side(1000)
    for events in (long, *short):
        assert isinstance(events.to_the_end()[-1], Finished)


def test_job_cancelled_in_the_side_queue_ends_at_once(engine: Engine, model: OverlappingModel, clock: Clock):
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


def test_job_cancelled_during_its_decode_ends_after_that_call(engine: Engine, model: OverlappingModel, clock: Clock):
    (job, decoding), (_, stepping) = two_in_flight(engine, model, images=2)
    engine.cancel(job)
    clock.now += 2
    model.allow_on_side(1)
    reported = decoding.to_the_end()
    assert isinstance(reported[-1], Failed)
    assert isinstance(reported[-1].error, Cancelled)
    assert decoding.is_over()
    assert engine.statistics().after_cancel == pytest.approx(2)
    model.allow(1000)
    model.allow_on_side(1)
    assert isinstance(stepping.to_the_end()[-1], Finished)


@pytest.mark.parametrize("call", ["encode", "decode"])
@pytest.mark.parametrize(
    ("error", "reported"), [(RuntimeError("a bug"), ModelFailed), (OutOfMemory("80 GiB"), DeviceFull)]
)
def test_failure_on_the_side_thread_fails_one_job(
    engine: Engine, model: OverlappingModel, clock: Clock, call: str, error: Exception, reported: type[Exception]
):
    model.allow(1000)
    model.allow_on_side(1000)
    model.fails_on, model.error = call, error
    broken, after = Events(), Events()
    engine.submit(Submission("broken", request(10)), broken)
    terminal = broken.to_the_end()[-1]
    assert isinstance(terminal, Failed)
    assert isinstance(terminal.error, reported)
    model.fails_on = None
    clock.now += 60  # the size that did not fit is rejected until then
    engine.submit(Submission("after", request(20)), after)
    assert isinstance(after.to_the_end()[-1], Finished)


@pytest.mark.parametrize("first_to_end", ["step", "decode"])
def test_overlapping_calls_are_serialized_after_out_of_memory(
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


def test_overlap_resumes_after_the_backoff(engine: Engine, model: OverlappingModel, clock: Clock):
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


def test_hung_side_call_counts_as_busy_and_can_be_abandoned(model: OverlappingModel, clock: Clock):
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


def test_stop_ends_every_job_after_both_calls_in_flight(engine: Engine, model: OverlappingModel):
    (_, decoding), (_, stepping) = two_in_flight(engine, model, images=2)
    engine.stop()
    model.allow(1000)
    model.allow_on_side(1000)
    for events in (decoding, stepping):
        reported = events.to_the_end()
        assert isinstance(reported[-1], Failed)
        assert isinstance(reported[-1].error, Draining)
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
def test_every_job_ends_exactly_once_under_random_overlap(jobs: list[tuple[int, str]], max_batch: int, crowded: bool):
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
    for (events, seed, images, fate), reported in zip(submitted, ends, strict=True):
        assert events.is_over()
        ready = [(each.index, each.seed) for each in reported if isinstance(each, ImageReady)]
        assert ready == [(index, seed + index) for index in range(len(ready))]
        if isinstance(reported[-1], Finished):
            assert fate != "broken"
            assert len(ready) == images
        else:
            assert fate


def test_image_bytes_are_the_same_with_and_without_overlap(folders: tuple[Path, Path]):
    def images(overlaps: bool) -> list[bytes]:
        loaded = ensemble.load(checkpoint.inspect(*folders), device="cpu", precision="fp32", max_batch=2)
        loaded.overlaps = overlaps
        engine, jobs = Engine(QueueLimits(jobs=9)), [Events() for _ in range(4)]
        engine.start(lambda: loaded).result(timeout=60)
        for number, events in enumerate(jobs):
            asked = ImageRequest("a cat", "a dog", (number, number + 50), 6, 5.0, 0.6, "euler", 32, 32)
            engine.submit(Submission("job", asked), events)
        reported = [event for events in jobs for event in events.to_the_end()]
        engine.stop()
        assert engine.join(60)
        return [each.pixels.tobytes() for each in reported if isinstance(each, ImageReady)]

    overlapping = images(True)
    assert len(overlapping) == 8
    assert overlapping == images(False)
