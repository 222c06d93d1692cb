"""What the engine promises, driven by a model whose every call waits for the word of the test: no torch, no gRPC."""

import math
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from server.domain import Environment, ImageRequest, ModelCard, Notice, Stage, Warning
from server.engine import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    Engine,
    Event,
    Failed,
    Finished,
    ModelFailed,
    Progress,
    Queued,
    QueueFull,
)

REQUEST = ImageRequest("a cat", "", (5,), 3, 4.0, 0.7, "euler", 8, 8)
ENVIRONMENT = Environment({}, "none", "none", "none", 0)
CARD = ModelCard("stepped", "", True, "none", "none", ("euler",), 8, 8, 3, 4.0, 0.7, "euler", ENVIRONMENT)


@dataclass
class Path:
    """A trajectory of two base calls and one refiner call."""

    seed: int
    stages: tuple[Stage, ...] = (Stage.BASE, Stage.BASE, Stage.REFINER)
    warnings: tuple[Warning, ...] = ()


@dataclass
class Prompt:
    warnings: tuple[Warning, ...] = (Warning(Notice.PROMPT_TRUNCATED, "data.prompt", "cut"),)


@dataclass
class SteppedModel:
    """Each call announces itself in `calls`, then waits for `allow`."""

    card: ModelCard = CARD
    calls: "queue.Queue[tuple[str, int]]" = field(default_factory=queue.Queue)
    allowed: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    fails_on: str | None = None

    def allow(self, count: int = 1) -> None:
        self.allowed.release(count)

    def _call(self, name: str, seed: int) -> None:
        self.calls.put((name, seed))
        assert self.allowed.acquire(timeout=60)
        if name == self.fails_on:
            raise RuntimeError("a bug at /secret/path")

    def encode(self, request: ImageRequest) -> Prompt:
        self._call("encode", request.seeds[0])
        return Prompt()

    def plan(self, request: ImageRequest, conditioning: Prompt, seed: int) -> Path:
        return Path(seed)

    def step(self, trajectories: list[Path]) -> None:
        (trajectory,) = trajectories
        self._call("step", trajectory.seed)

    def decode(self, trajectory: Path) -> np.ndarray:
        self._call("decode", trajectory.seed)
        return np.zeros((8, 8, 3), np.uint8)


class Events:
    """The events of one job, in the order in which they came."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Event] = queue.Queue()

    def __call__(self, event: Event) -> None:
        self._queue.put(event)

    def next(self) -> Event:
        return self._queue.get(timeout=60)

    def to_the_end(self) -> list[Event]:
        events = [self.next()]
        while not isinstance(events[-1], Finished | Failed):
            events.append(self.next())
        return events

    def is_over(self) -> bool:
        return self._queue.empty()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def model() -> SteppedModel:
    return SteppedModel()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(model: SteppedModel, clock: Clock) -> Iterator[Engine]:
    engine = Engine(max_queue=3, clock=clock)
    engine.start(lambda: model).result(timeout=60)
    yield engine
    engine.stop()
    model.allow(100)
    assert engine.join(60)


def test_a_job_reports_every_real_model_call_and_ends_with_one_terminal_event(engine: Engine, model: SteppedModel):
    model.allow(100)
    events = Events()
    engine.submit("job", replace(REQUEST, seeds=(5, 6)), events)
    queued, *steps, finished = events.to_the_end()
    assert isinstance(queued, Queued)
    assert queued.position == 0
    told = [(e.index, e.stage, e.step, e.steps) if isinstance(e, Progress) else (e.index, e.seed) for e in steps]
    one_image = [(Stage.BASE, 1, 2), (Stage.BASE, 2, 2), (Stage.REFINER, 1, 1), (Stage.DECODE, 1, 1)]
    assert told == [
        (0, Stage.ENCODE, 1, 1),
        *((0, *call) for call in one_image),
        (0, 5),
        *((1, *call) for call in one_image),
        (1, 6),
    ]
    assert isinstance(finished, Finished)
    assert [each.field for each in finished.warnings] == ["data.prompt"]
    assert events.is_over()


def test_jobs_run_in_the_order_in_which_they_came(engine: Engine, model: SteppedModel):
    first, second = Events(), Events()
    engine.submit("job", REQUEST, first)
    engine.submit("job", replace(REQUEST, seeds=(9,)), second)
    assert second.next() == Queued(position=1, eta=0.0)
    model.allow(100)
    first.to_the_end()
    second.to_the_end()
    seeds = [model.calls.get_nowait()[1] for _ in range(10)]
    assert seeds == [5] * 5 + [9] * 5


def test_a_cancelled_job_costs_the_device_no_more_than_the_call_in_flight(engine: Engine, model: SteppedModel):
    events = Events()
    job = engine.submit("job", REQUEST, events)
    model.allow(2)
    for expected in ("encode", "step", "step"):
        assert model.calls.get(timeout=60)[0] == expected
    engine.cancel(job)
    model.allow(100)
    terminal = events.to_the_end()[-1]
    assert isinstance(terminal, Failed)
    assert isinstance(terminal.error, Cancelled)
    assert model.calls.empty()


def test_a_waiting_job_can_be_cancelled_without_reaching_the_device(engine: Engine, model: SteppedModel):
    running, waiting = Events(), Events()
    engine.submit("job", REQUEST, running)
    engine.cancel(engine.submit("job", replace(REQUEST, seeds=(9,)), waiting))
    model.allow(1)
    assert isinstance(waiting.to_the_end()[-1], Failed)
    model.allow(100)
    assert isinstance(running.to_the_end()[-1], Finished)
    assert {model.calls.get_nowait()[1] for _ in range(5)} == {5}


def test_cancelling_twice_or_after_the_end_changes_nothing(engine: Engine, model: SteppedModel):
    model.allow(100)
    events = Events()
    job = engine.submit("job", REQUEST, events)
    assert isinstance(events.to_the_end()[-1], Finished)
    engine.cancel(job)
    engine.cancel(job)
    again = Events()
    engine.submit("job", REQUEST, again)
    assert isinstance(again.to_the_end()[-1], Finished)
    assert events.is_over()


def test_a_passed_deadline_ends_running_and_waiting_jobs_after_the_call_in_flight(
    engine: Engine, model: SteppedModel, clock: Clock
):
    running, waiting, patient = Events(), Events(), Events()
    engine.submit("job", REQUEST, running, timeout=10)
    engine.submit("job", REQUEST, waiting, timeout=5)
    engine.submit("job", replace(REQUEST, seeds=(9,)), patient, timeout=math.inf)
    assert model.calls.get(timeout=60)[0] == "encode"
    clock.now = 10.0
    model.allow(100)
    for late in (running, waiting):
        terminal = late.to_the_end()[-1]
        assert isinstance(terminal, Failed)
        assert isinstance(terminal.error, DeadlineExceeded)
    assert isinstance(patient.to_the_end()[-1], Finished)
    assert {model.calls.get_nowait()[1] for _ in range(5)} == {9}


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(engine: Engine, model: SteppedModel, clock: Clock):
    measured = Events()
    engine.submit("job", REQUEST, measured)
    for _ in range(5):  # every call takes one second
        model.calls.get(timeout=60)
        clock.now += 1
        model.allow()
    measured.to_the_end()

    jobs = [Events() for _ in range(3)]
    for events in jobs:
        engine.submit("job", REQUEST, events)
    assert [events.next() for events in jobs] == [Queued(0, 5.0), Queued(1, 10.0), Queued(2, 15.0)]
    with pytest.raises(QueueFull, match="3 requests are waiting already") as refused:
        engine.submit("job", REQUEST, Events())
    assert refused.value.retry_after == pytest.approx(5.0)
    model.allow(100)
    for events in jobs:
        assert isinstance(events.to_the_end()[-1], Finished)
    engine.submit("job", REQUEST, jobs[0])


@pytest.mark.parametrize("call", ["encode", "step", "decode"])
def test_a_job_that_makes_the_model_fail_fails_alone_and_its_cause_stays_in_the_log(
    engine: Engine, model: SteppedModel, call: str, caplog: pytest.LogCaptureFixture
):
    model.allow(100)
    model.fails_on = call
    events = Events()
    engine.submit("job", REQUEST, events)
    terminal = events.to_the_end()[-1]
    assert isinstance(terminal, Failed)
    assert isinstance(terminal.error, ModelFailed)
    assert "secret" not in str(terminal.error)
    assert "/secret/path" in caplog.text
    model.fails_on = None
    after = Events()
    engine.submit("job", REQUEST, after)
    assert isinstance(after.to_the_end()[-1], Finished)


def test_draining_refuses_new_jobs_and_finishes_the_old(engine: Engine, model: SteppedModel):
    events = Events()
    engine.submit("job", REQUEST, events)
    engine.drain()
    with pytest.raises(Draining):
        engine.submit("job", REQUEST, Events())
    model.allow(100)
    assert isinstance(events.to_the_end()[-1], Finished)


def test_stopping_ends_every_job_after_the_call_in_flight(engine: Engine, model: SteppedModel):
    running, waiting = Events(), Events()
    engine.submit("job", REQUEST, running)
    engine.submit("job", REQUEST, waiting)
    model.calls.get(timeout=60)
    engine.stop()
    model.allow(100)
    for events in (running, waiting):
        terminal = events.to_the_end()[-1]
        assert isinstance(terminal, Failed)
        assert isinstance(terminal.error, Draining)
    assert engine.join(60)
    assert model.calls.empty()


def test_what_loading_raises_reaches_whoever_waits_for_the_model():
    def load() -> SteppedModel:
        raise FileNotFoundError("no weights")

    engine = Engine(max_queue=1)
    with pytest.raises(FileNotFoundError, match="no weights"):
        engine.start(load).result(timeout=60)
    assert engine.join(60)


def test_the_eta_counts_guidance_and_pixels_when_only_another_size_was_measured(
    engine: Engine, model: SteppedModel, clock: Clock
):
    measured = Events()
    engine.submit("job", replace(REQUEST, guidance_scale=1.0), measured)
    for _ in range(5):
        model.calls.get(timeout=60)
        clock.now += 1
        model.allow()
    measured.to_the_end()
    events = Events()
    engine.submit("job", replace(REQUEST, width=16), events)
    assert events.next() == Queued(0, eta=pytest.approx(5 * 2 * 2))
    model.allow(100)
    events.to_the_end()
