"""Test the engine with a model whose calls each wait for the test: no torch, no gRPC."""

import contextvars
import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from stepped_model import REQUEST, Clock, Events, SteppedConditioning, SteppedModel, SteppedTrajectory, running

from server.domain import ImageRequest, Notice, Stage
from server.engine.engine import Engine
from server.engine.events import (
    Cancelled,
    DeadlineExceeded,
    DeviceFull,
    DeviceLost,
    DeviceUnavailable,
    Draining,
    Event,
    Failed,
    Finished,
    JobEnded,
    JobStarted,
    ModelCall,
    ModelFailed,
    Observation,
    Preview,
    PreviewDropped,
    Progress,
    Queued,
    ResourceExhausted,
    StageSpan,
)
from server.engine.interface import LaunchedStep, Submission
from server.engine.scheduling import Order, QueueLimits


@pytest.fixture
def model() -> SteppedModel:
    return SteppedModel()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(model: SteppedModel, clock: Clock) -> Iterator[Engine]:
    with running(Engine(QueueLimits(jobs=3), clock=clock), model) as engine:
        yield engine


def measure(engine: Engine, model: SteppedModel, clock: Clock, request: ImageRequest = REQUEST) -> None:
    """Run one job whose calls take a second each."""
    events = Events()
    engine.submit(Submission("measured", request), events)
    for _ in range(5):
        model.calls.get(timeout=60)
        clock.now += 1
        model.allow()
    assert isinstance(events.to_the_end()[-1], Finished)


def test_job_reports_every_model_call_and_one_terminal_event(engine: Engine, model: SteppedModel):
    model.allow(100)
    events = Events()
    engine.submit(Submission("job", replace(REQUEST, seeds=(5, 6))), events)
    queued, *steps, finished = events.to_the_end()
    assert isinstance(queued, Queued)
    assert queued.position == 0
    reported = [(e.index, e.stage, e.step, e.steps) if isinstance(e, Progress) else (e.index, e.seed) for e in steps]
    one_image = [(Stage.BASE, 1, 2), (Stage.BASE, 2, 2), (Stage.REFINER, 1, 1), (Stage.DECODE, 1, 1)]
    assert reported == [
        (0, Stage.ENCODE, 1, 1),
        *((0, *call) for call in one_image),
        (0, 5),
        *((1, *call) for call in one_image),
        (1, 6),
    ]
    assert isinstance(finished, Finished)
    assert [each.field for each in finished.warnings] == ["data.prompt"]
    assert events.is_over()


def test_progress_of_a_step_is_reported_while_the_next_step_runs(clock: Clock):
    order: list[str] = []

    class Launching(SteppedModel):
        def launch(self, trajectories: Sequence[SteppedTrajectory]) -> LaunchedStep:
            order.append("launch")
            step = super().launch(trajectories)

            def wait() -> None:
                order.append("wait")
                step.wait()

            return LaunchedStep(wait)

    class Reports(Events):
        def __call__(self, event: Event) -> None:
            order.append(event.stage.value if isinstance(event, Progress) else "")
            super().__call__(event)

    model, events = Launching(), Reports()
    model.allow(100)
    with running(Engine(QueueLimits(jobs=1), clock=clock), model) as engine:
        engine.submit(Submission("job", REQUEST), events)
        events.to_the_end()
    reported = [each for each in order if each]
    base, refiner = Stage.BASE.value, Stage.REFINER.value
    assert reported[1:7] == ["launch", "wait", "launch", base, "wait", "launch"]
    assert reported[7:] == [base, "wait", refiner, Stage.DECODE.value]


def test_equal_jobs_run_in_order_of_arrival(engine: Engine, model: SteppedModel):
    first, second = Events(), Events()
    engine.submit(Submission("job", REQUEST), first)
    engine.submit(Submission("job", replace(REQUEST, seeds=(9,))), second)
    assert second.next() == Queued(position=1, eta=0.0)
    model.allow(100)
    first.to_the_end()
    second.to_the_end()
    seeds = [model.calls.get_nowait()[1] for _ in range(10)]
    assert seeds == [5] * 5 + [9] * 5


def test_cancelled_job_wastes_at_most_the_call_in_flight(engine: Engine, model: SteppedModel):
    events = Events()
    job = engine.submit(Submission("job", REQUEST), events)
    model.allow(2)
    for expected in ("encode", "step", "step"):
        assert model.calls.get(timeout=60)[0] == expected
    engine.cancel(job)
    model.allow(100)
    terminal = events.to_the_end()[-1]
    assert isinstance(terminal, Failed)
    assert isinstance(terminal.error, Cancelled)
    assert model.calls.empty()


def test_cancelled_waiting_job_never_reaches_the_device(engine: Engine, model: SteppedModel):
    running, waiting = Events(), Events()
    engine.submit(Submission("job", REQUEST), running)
    engine.cancel(engine.submit(Submission("job", replace(REQUEST, seeds=(9,))), waiting))
    model.allow(1)
    assert isinstance(waiting.to_the_end()[-1], Failed)
    model.allow(100)
    assert isinstance(running.to_the_end()[-1], Finished)
    assert {model.calls.get_nowait()[1] for _ in range(5)} == {5}


def test_cancel_is_idempotent_and_ignored_after_the_end(engine: Engine, model: SteppedModel):
    model.allow(100)
    events = Events()
    job = engine.submit(Submission("job", REQUEST), events)
    assert isinstance(events.to_the_end()[-1], Finished)
    engine.cancel(job)
    engine.cancel(job)
    again = Events()
    engine.submit(Submission("job", REQUEST), again)
    assert isinstance(again.to_the_end()[-1], Finished)
    assert events.is_over()


def test_expired_deadline_ends_running_and_waiting_jobs_after_the_call_in_flight(
    engine: Engine, model: SteppedModel, clock: Clock
):
    running, waiting, patient = Events(), Events(), Events()
    engine.submit(Submission("job", REQUEST, timeout=10), running)
    engine.submit(Submission("job", REQUEST, timeout=5), waiting)
    engine.submit(Submission("job", replace(REQUEST, seeds=(9,)), timeout=math.inf), patient)
    assert model.calls.get(timeout=60)[0] == "encode"
    clock.now = 10.0
    model.allow(100)
    for late in (running, waiting):
        terminal = late.to_the_end()[-1]
        assert isinstance(terminal, Failed)
        assert isinstance(terminal.error, DeadlineExceeded)
    assert isinstance(patient.to_the_end()[-1], Finished)
    assert {model.calls.get_nowait()[1] for _ in range(5)} == {9}


def test_full_queue_rejects_with_retry_after(engine: Engine, model: SteppedModel, clock: Clock):
    measure(engine, model, clock)
    jobs = [Events() for _ in range(3)]
    for events in jobs:
        engine.submit(Submission("job", REQUEST), events)
    assert [events.next() for events in jobs] == [Queued(0, 5.0), Queued(1, 10.0), Queued(2, 15.0)]
    with pytest.raises(
        ResourceExhausted, match=r"3 requests are waiting already, for 15\.0 s.*; try again in 5\.0 s"
    ) as rejected:
        engine.submit(Submission("job", REQUEST), Events())
    assert rejected.value.retry_after == pytest.approx(5.0)
    model.allow(100)
    for events in jobs:
        assert isinstance(events.to_the_end()[-1], Finished)
    engine.submit(Submission("job", REQUEST), jobs[0])


def test_queue_bounds_pixels_bytes_and_jobs_per_caller(model: SteppedModel, clock: Clock):
    for limits, words in (
        (QueueLimits(9, pixels=100), "100 pixels"),
        (QueueLimits(9, bytes=500), "500 bytes"),
        (QueueLimits(9, 1), "1 requests of this"),
    ):
        with running(Engine(limits, clock=clock), model) as engine:
            events = Events()
            engine.submit(Submission("job", REQUEST), events)
            with pytest.raises(ResourceExhausted, match=words):
                engine.submit(Submission("job", REQUEST), Events())
            model.allow(100)
            events.to_the_end()


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (QueueLimits(9, pixels=10), "pixels, more than --max-queue-pixels 10 allows even in an empty queue; ask for"),
        (QueueLimits(9, bytes=10), "bytes, more than --max-queue-bytes 10 allows even in an empty queue; ask for"),
    ],
)
def test_request_larger_than_the_queue_is_never_admitted(model: SteppedModel, clock: Clock, limits, words):
    with running(Engine(limits, clock=clock), model) as engine:
        with pytest.raises(ResourceExhausted, match=words) as rejected:
            engine.submit(Submission("job", REQUEST), Events())
        assert rejected.value.retry_after == math.inf


def test_unmeetable_deadline_is_rejected_with_the_predicted_time(engine: Engine, model: SteppedModel, clock: Clock):
    measure(engine, model, clock)
    with pytest.raises(DeadlineExceeded, match=r"deadline cannot be met.* 5\.0 s, even on an idle server"):
        engine.submit(Submission("job", REQUEST, timeout=3), Events())
    engine.submit(Submission("job", REQUEST, timeout=6), Events())
    with pytest.raises(ResourceExhausted, match=r"10\.0 s") as rejected:
        engine.submit(Submission("job", REQUEST, timeout=7), Events())
    assert 0 < rejected.value.retry_after < 5
    with pytest.raises(ResourceExhausted, match="1 admitted request would miss a deadline"):
        engine.submit(Submission("job", replace(REQUEST, seeds=(7,)), timeout=5.9), Events())


def test_deadline_preempts_an_earlier_job_as_late_as_possible(engine: Engine, model: SteppedModel, clock: Clock):
    measure(engine, model, clock)
    patient, urgent = Events(), Events()
    engine.submit(Submission("patient", REQUEST), patient)
    assert model.calls.get(timeout=60) == ("encode", 5)
    engine.submit(Submission("urgent", replace(REQUEST, seeds=(9,)), timeout=8), urgent)
    seeds = []
    for _ in range(9):
        clock.now += 1
        model.allow()
        seeds.append(model.calls.get(timeout=60)[1])
    model.allow()
    assert seeds == [5] + [9] * 5 + [5] * 3  # a second call of the patient job would have made the urgent one late
    assert isinstance(urgent.to_the_end()[-1], Finished)
    assert isinstance(patient.to_the_end()[-1], Finished)


def test_short_job_preempts_a_long_one_between_calls(engine: Engine, model: SteppedModel, clock: Clock):
    measure(engine, model, clock)
    long, short = Events(), Events()
    engine.submit(Submission("long", replace(REQUEST, seeds=tuple(range(10, 40)))), long)
    assert model.calls.get(timeout=60) == ("encode", 10)
    engine.submit(Submission("short", REQUEST), short)
    model.allow(1000)
    assert isinstance(short.to_the_end()[-1], Finished)
    assert isinstance(long.to_the_end()[-1], Finished)
    assert [model.calls.get_nowait()[1] for _ in range(5)] == [5] * 5


def test_first_come_runs_every_job_to_its_end(model: SteppedModel, clock: Clock):
    with running(Engine(QueueLimits(jobs=3), Order.FIRST_COME, clock), model) as engine:
        measure(engine, model, clock)
        long, short = Events(), Events()
        engine.submit(Submission("long", replace(REQUEST, seeds=tuple(range(10, 40)))), long)
        engine.submit(Submission("short", REQUEST), short)
        model.allow(1000)
        assert isinstance(long.to_the_end()[-1], Finished)
        short.to_the_end()
    seeds = [model.calls.get_nowait()[1] for _ in range(1 + 4 * 30)]
    assert 5 not in seeds


def test_queued_is_reported_again_when_position_or_eta_changes(engine: Engine, model: SteppedModel, clock: Clock):
    measure(engine, model, clock)
    first, second = Events(), Events()
    job = engine.submit(Submission("first", REQUEST), first)
    engine.submit(Submission("second", replace(REQUEST, seeds=(9,))), second)
    assert second.next() == Queued(1, 10.0)
    model.calls.get(timeout=60)
    engine.cancel(job)
    clock.now += 1
    model.allow(1)
    assert second.next() == Queued(0, 5.0)
    model.allow(100)
    assert isinstance(second.to_the_end()[-1], Finished)


def test_device_time_after_a_cancel_is_counted(engine: Engine, model: SteppedModel, clock: Clock):
    events = Events()
    job = engine.submit(Submission("job", REQUEST), events)
    model.calls.get(timeout=60)
    clock.now += 1
    engine.cancel(job)
    clock.now += 2
    model.allow(100)
    events.to_the_end()
    done = engine.statistics()
    assert (done.after_cancel, done.device) == (2.0, 3.0)
    assert done.outcomes == {"Cancelled": 1}


def test_statistics_have_the_error_of_predicted_ends(engine: Engine, model: SteppedModel, clock: Clock):
    measure(engine, model, clock)
    events = Events()
    engine.submit(Submission("job", REQUEST), events)
    for _ in range(5):
        model.calls.get(timeout=60)
        clock.now += 2  # twice the predicted time
        model.allow()
    events.to_the_end()
    measure(engine, model, clock)
    assert 0 < engine.statistics().eta_error <= 1


def test_jobs_share_network_calls_up_to_max_batch(model: SteppedModel, clock: Clock):
    model.max_batch = 4
    with running(Engine(QueueLimits(jobs=9), clock=clock), model) as engine:
        blocker, *others = [Events() for _ in range(4)]
        engine.submit(Submission("blocker", replace(REQUEST, seeds=(1,))), blocker)
        model.calls.get(timeout=60)
        for number, events in enumerate(others):
            engine.submit(Submission("job", replace(REQUEST, seeds=(10 + number,))), events)
        model.allow(1000)
        for events in (blocker, *others):
            assert isinstance(events.to_the_end()[-1], Finished)
    assert max(map(len, model.batches)) >= 3
    assert sorted(seed for batch in model.batches for seed in batch) == sorted([1, 10, 11, 12] * 3)


def test_images_of_one_request_share_network_calls(model: SteppedModel, clock: Clock):
    model.max_batch = 4
    model.allow(1000)
    with running(Engine(QueueLimits(jobs=9), clock=clock), model) as engine:
        events = Events()
        engine.submit(Submission("job", replace(REQUEST, seeds=(1, 2, 3, 4, 5, 6))), events)
        reported = events.to_the_end()
    assert model.batches == [[1, 2, 3, 4]] * 3 + [[5, 6]] * 3
    assert [event.seed for event in reported if hasattr(event, "seed")] == [1, 2, 3, 4, 5, 6]
    base = [(e.index, e.step, e.steps) for e in reported if isinstance(e, Progress) and e.stage == Stage.BASE]
    assert base == [(i, step, 2) for step in (1, 2) for i in range(4)] + [(i, s, 2) for s in (1, 2) for i in (4, 5)]


def test_images_of_different_batch_keys_share_no_network_call(clock: Clock):
    class TwoWays(SteppedModel):
        def plan(self, request: ImageRequest, conditioning: SteppedConditioning, seed: int) -> SteppedTrajectory:
            return SteppedTrajectory(seed, batch_key="compiled" if seed >= 20 else "not compiled")

    model = TwoWays(max_batch=4)
    with running(Engine(QueueLimits(jobs=9), clock=clock), model) as engine:
        blocker, *others = [Events() for _ in range(5)]
        engine.submit(Submission("blocker", replace(REQUEST, seeds=(1,))), blocker)
        model.calls.get(timeout=60)
        for seed, events in zip((10, 11, 20, 21), others, strict=True):
            engine.submit(Submission("job", replace(REQUEST, seeds=(seed,))), events)
        model.allow(1000)
        for events in (blocker, *others):
            assert isinstance(events.to_the_end()[-1], Finished)
    assert all(len({seed >= 20 for seed in batch}) == 1 for batch in model.batches)
    assert max(map(len, model.batches)) >= 2


def test_failure_in_a_shared_call_fails_one_job(model: SteppedModel, clock: Clock):
    model.max_batch, model.broken_seed = 4, 11
    with running(Engine(QueueLimits(jobs=9), clock=clock), model) as engine:
        blocker, *others = [Events() for _ in range(4)]
        engine.submit(Submission("blocker", replace(REQUEST, seeds=(1,))), blocker)
        model.calls.get(timeout=60)
        for number, events in enumerate(others):
            engine.submit(Submission("job", replace(REQUEST, seeds=(10 + number,))), events)
        model.allow(1000)
        ends = [events.to_the_end()[-1] for events in (blocker, *others)]
    assert [isinstance(end, Finished) for end in ends] == [True, True, False, True]
    assert isinstance(ends[2].error, ModelFailed)  # type: ignore[union-attr]


def test_batch_is_halved_after_out_of_memory_and_stays_smaller(model: SteppedModel, clock: Clock):
    model.max_batch, model.fitting = 8, 2
    model.allow(1000)
    with running(Engine(QueueLimits(jobs=9), clock=clock), model) as engine:
        events, after = Events(), Events()
        engine.submit(Submission("job", replace(REQUEST, seeds=tuple(range(8)))), events)
        finished = events.to_the_end()[-1]
        engine.submit(Submission("job", replace(REQUEST, seeds=(8, 9))), after)
        unaffected = after.to_the_end()[-1]
    assert model.batches == [[0, 1], [2, 3], [4, 5], [6, 7]] * 3 + [[8, 9]] * 3
    assert (
        sum(name == "step" for name, _ in list(model.calls.queue)) == len(model.batches) + 2
    )  # failed attempts with eight and with four
    assert isinstance(finished, Finished)
    assert isinstance(unaffected, Finished)
    assert [each.notice for each in finished.warnings] == [Notice.PROMPT_TRUNCATED, Notice.BATCH_REDUCED]
    assert [each.notice for each in unaffected.warnings] == [Notice.PROMPT_TRUNCATED]
    assert (finished.environment.max_batch, unaffected.environment.max_batch) == (2, 2)


def test_too_large_job_fails_and_equal_sizes_are_rejected_a_while(engine: Engine, model: SteppedModel, clock: Clock):
    model.allow(1000)
    model.fitting = 0
    events = Events()
    engine.submit(Submission("job", REQUEST), events)
    terminal = events.to_the_end()[-1]
    assert isinstance(terminal, Failed)
    assert isinstance(terminal.error, DeviceFull)
    with pytest.raises(ResourceExhausted, match="did not fit in the device's memory") as rejected:
        engine.submit(Submission("job", replace(REQUEST, width=16)), Events())
    assert 0 < rejected.value.retry_after <= 60
    model.fitting = 64
    smaller = Events()
    engine.submit(Submission("job", replace(REQUEST, guidance_scale=1.0)), smaller)
    assert isinstance(smaller.to_the_end()[-1], Finished)
    clock.now += rejected.value.retry_after
    engine.submit(Submission("job", REQUEST), events)
    assert isinstance(events.to_the_end()[-1], Finished)


def test_previews_follow_their_interval_and_never_the_terminal_event(engine: Engine, model: SteppedModel):
    events = Events()
    engine.submit(Submission("job", replace(REQUEST, seeds=(5,)), preview_interval=2), events)
    model.allow(3)  # the prompt and two base calls
    while not isinstance(event := events.next(), Preview):
        assert not isinstance(event, Finished | Failed)
    assert (event.index, event.step, event.pixels.tolist()) == (0, 2, [[[5, 5, 5]]])
    model.allow(100)
    reported = events.to_the_end()
    assert not any(isinstance(each, Preview) for each in reported)  # the third call is not a multiple of the interval
    assert events.is_over()


def test_slow_previews_are_observed_as_dropped(clock: Clock):
    drawing, drawn = threading.Event(), threading.Event()

    class SlowToDraw(SteppedModel):
        def preview(self, trajectory: SteppedTrajectory) -> np.ndarray:
            drawing.set()
            assert drawn.wait(60)
            return super().preview(trajectory)

    model, events, observed = SlowToDraw(), Events(), []
    with running(Engine(QueueLimits(jobs=1), clock=clock, observe=observed.append), model) as engine:
        engine.submit(Submission("job", REQUEST, preview_interval=1), events)
        model.allow(2)  # the prompt and the first step, whose preview is being drawn
        assert drawing.wait(60)
        model.allow(3)  # two steps, of which the later replaces the earlier, and the image
        events.to_the_end()
        drawn.set()
    assert observed.count(PreviewDropped()) == 3
    assert events.is_over()


def test_observer_gets_every_call_and_the_spans_of_the_job(model: SteppedModel, clock: Clock):
    observed: list[Observation] = []
    submitter = contextvars.ContextVar("submitter", default="")

    def observe(observation: Observation) -> None:
        observed.append(observation)
        if isinstance(observation, JobStarted | JobEnded):
            assert submitter.get() == "test", "observations of a job arrive in the context of its submission"

    with running(Engine(QueueLimits(jobs=1), clock=clock, observe=observe), model) as engine:
        submitter.set("test")
        measure(engine, model, clock)
    calls = [each for each in observed if isinstance(each, ModelCall)]
    stages = [Stage.ENCODE, Stage.BASE, Stage.BASE, Stage.REFINER, Stage.DECODE]
    assert calls == [ModelCall(stage, 1, 1.0) for stage in stages]
    assert observed[0] == JobStarted(0.0)
    spans = (
        StageSpan(Stage.ENCODE, 0, 0.0, 1.0, 1, 1.0),
        StageSpan(Stage.BASE, 0, 1.0, 3.0, 2, 2.0),
        StageSpan(Stage.REFINER, 0, 3.0, 4.0, 1, 1.0),
        StageSpan(Stage.DECODE, 0, 4.0, 5.0, 1, 1.0),
    )
    assert observed[-1] == JobEnded("finished", 0.0, 0.0, 5.0, 0.0, spans)


def test_abandon_fails_every_job_of_a_hung_device(model: SteppedModel, clock: Clock):
    engine = Engine(QueueLimits(jobs=3), clock=clock)
    engine.start(lambda: model).result(timeout=60)
    jobs = [Events(), Events()]
    for events in jobs:
        engine.submit(Submission("job", REQUEST), events)
    model.calls.get(timeout=60)
    clock.now += 100
    assert engine.busy == 100
    engine.abandon()
    endings = [events.to_the_end()[-1] for events in jobs]
    assert [type(each.error) for each in endings] == [DeviceLost, DeviceUnavailable]  # the second job only waited
    with pytest.raises(DeviceUnavailable):
        engine.submit(Submission("job", REQUEST), Events())
    model.allow(100)
    assert engine.join(60)
    assert all(events.is_over() for events in jobs)


def test_all_jobs_of_a_hung_shared_call_and_no_others_are_device_lost(model: SteppedModel):
    model.max_batch = 2
    engine = Engine(QueueLimits(jobs=3))
    engine.start(lambda: model).result(timeout=60)
    jobs = [Events() for _ in range(3)]
    for seed, events in enumerate(jobs):
        engine.submit(Submission(f"job {seed}", replace(REQUEST, seeds=(seed,))), events)
    while (call := model.calls.get(timeout=60))[0] != "step":
        model.allow()
    engine.abandon()
    lost = [seed for seed, events in enumerate(jobs) if isinstance(events.to_the_end()[-1].error, DeviceLost)]
    assert len(lost) == 2
    assert call[1] in lost
    model.allow(100)
    assert engine.join(60)


@pytest.mark.parametrize("call", ["encode", "step", "decode"])
def test_model_error_fails_one_job_and_its_cause_stays_in_the_log(
    engine: Engine, model: SteppedModel, call: str, caplog: pytest.LogCaptureFixture
):
    model.allow(100)
    model.fails_on = call
    events = Events()
    engine.submit(Submission("job", REQUEST), events)
    terminal = events.to_the_end()[-1]
    assert isinstance(terminal, Failed)
    assert isinstance(terminal.error, ModelFailed)
    assert "secret" not in str(terminal.error)
    assert "/secret/path" in caplog.text
    model.fails_on = None
    after = Events()
    engine.submit(Submission("job", REQUEST), after)
    assert isinstance(after.to_the_end()[-1], Finished)


def test_drain_rejects_new_jobs_and_finishes_admitted_ones(engine: Engine, model: SteppedModel):
    events = Events()
    engine.submit(Submission("job", REQUEST), events)
    engine.drain()
    with pytest.raises(Draining):
        engine.submit(Submission("job", REQUEST), Events())
    model.allow(100)
    assert isinstance(events.to_the_end()[-1], Finished)


def test_stop_ends_every_job_after_the_call_in_flight(engine: Engine, model: SteppedModel):
    running, waiting = Events(), Events()
    engine.submit(Submission("job", REQUEST), running)
    engine.submit(Submission("job", REQUEST), waiting)
    model.calls.get(timeout=60)
    engine.stop()
    model.allow(100)
    for events in (running, waiting):
        terminal = events.to_the_end()[-1]
        assert isinstance(terminal, Failed)
        assert isinstance(terminal.error, Draining)
    assert engine.join(60)
    assert model.calls.empty()


def test_load_error_is_set_on_the_future():
    def load() -> SteppedModel:
        raise FileNotFoundError("no weights")

    engine = Engine(QueueLimits(jobs=1))
    with pytest.raises(FileNotFoundError, match="no weights"):
        engine.start(load).result(timeout=60)
    assert engine.join(60)


def test_eta_scales_an_unmeasured_size_by_rows_and_pixels(engine: Engine, model: SteppedModel, clock: Clock):
    measure(engine, model, clock, replace(REQUEST, guidance_scale=1.0))
    events = Events()
    engine.submit(Submission("job", replace(REQUEST, width=16)), events)
    # Two rows instead of one in the three U-Net calls, and twice the pixels in all five.
    assert events.next() == Queued(0, eta=pytest.approx(3 * 2 * 2 + 2 * 2))
    model.allow(100)
    events.to_the_end()


def test_eta_uses_the_calls_per_step_of_earlier_plans(engine: Engine, model: SteppedModel, clock: Clock):
    measure(engine, model, clock, replace(REQUEST, steps=1, scheduler="heun"))  # the plan has three calls for one step
    events = Events()
    engine.submit(Submission("job", replace(REQUEST, steps=2, scheduler="heun")), events)
    assert events.next() == Queued(0, eta=pytest.approx(1 + 6 + 1))
    model.allow(100)
    events.to_the_end()


def test_ended_jobs_are_freed_before_their_deadlines(engine: Engine, model: SteppedModel):
    model.allow(1000)
    jobs = []
    for _ in range(40):
        events = Events()
        jobs.append(weakref.ref(engine.submit(Submission("job", REQUEST, timeout=1e6), events)))
        assert isinstance(events.to_the_end()[-1], Finished)
    assert sum(job() is not None for job in jobs) < 15
