"""A model whose calls each wait for the test, with a request, an event queue and a clock: no torch, no gRPC."""

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from server.domain import Environment, ImageRequest, ModelInfo, Notice, OutOfMemory, Stage, StepFailed, Warning
from server.engine.engine import Engine
from server.engine.events import Event, Failed, Finished
from server.engine.interface import LaunchedStep

REQUEST = ImageRequest("a cat", "", (5,), 3, 4.0, 0.7, "euler", 8, 8)
ENVIRONMENT = Environment({}, "none", "none", "none", 0, 1, "off")
MODEL_INFO = ModelInfo("stepped", "", True, "none", "none", ("euler",), 8, 8, 3, 4.0, 0.7, "euler", ENVIRONMENT)


@dataclass
class SteppedTrajectory:
    """A trajectory of two base calls and one refiner call."""

    seed: int
    stages: tuple[Stage, ...] = (Stage.BASE, Stage.BASE, Stage.REFINER)
    warnings: tuple[Warning, ...] = ()
    batch_key: str = ""


@dataclass
class SteppedConditioning:
    warnings: tuple[Warning, ...] = (Warning(Notice.PROMPT_TRUNCATED, "data.prompt", "cut"),)
    environment: Environment = ENVIRONMENT


@dataclass
class SteppedModel:
    """Each call puts its name and seed into `calls`, then waits for `allow`."""

    info: ModelInfo = MODEL_INFO
    max_batch: int = 1
    overlaps: bool = False
    calls: "queue.Queue[tuple[str, int]]" = field(default_factory=queue.Queue)
    allowed: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    fails_on: str | None = None
    fitting: int = 64  # trajectories per step that fit in memory
    broken_seed: int | None = None
    batches: list[list[int]] = field(default_factory=list)  # seeds of every successful step

    def allow(self, count: int = 1) -> None:
        self.allowed.release(count)

    def _call(self, name: str, seed: int) -> None:
        self.calls.put((name, seed))
        assert self.allowed.acquire(timeout=60)
        if name == self.fails_on:
            raise RuntimeError("a bug at /secret/path")

    def set_info(self, info: ModelInfo) -> None:
        self.info = info

    def encode(self, request: ImageRequest) -> SteppedConditioning:
        self._call("encode", request.seeds[0])
        return SteppedConditioning()

    def plan(self, request: ImageRequest, conditioning: SteppedConditioning, seed: int) -> SteppedTrajectory:
        return SteppedTrajectory(seed)

    def launch(self, trajectories: Sequence[SteppedTrajectory]) -> LaunchedStep:
        assert 1 <= len(trajectories) <= self.max_batch
        return LaunchedStep(partial(self._step, trajectories))

    def _step(self, trajectories: Sequence[SteppedTrajectory]) -> None:
        self._call("step", trajectories[0].seed)
        if len(trajectories) > self.fitting:
            raise OutOfMemory("no room")
        seeds = [trajectory.seed for trajectory in trajectories]
        if self.broken_seed in seeds:
            raise StepFailed({seeds.index(self.broken_seed): RuntimeError("a bug at /secret/path")})
        self.batches.append(seeds)

    def limit_batch(self, images: int) -> None:
        self.max_batch = images

    def preview(self, trajectory: SteppedTrajectory) -> np.ndarray:
        return np.full((1, 1, 3), trajectory.seed, np.uint8)

    def decode(self, trajectory: SteppedTrajectory) -> np.ndarray:
        self._call("decode", trajectory.seed)
        return np.zeros((8, 8, 3), np.uint8)


class Events:
    """The events of one job, in order."""

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


@contextlib.contextmanager
def running(engine: Engine, model: SteppedModel) -> Iterator[Engine]:
    engine.start(lambda: model).result(timeout=60)
    yield engine
    engine.stop()
    model.allow(1000)
    assert engine.join(60)
