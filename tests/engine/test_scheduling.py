"""Test the scheduling core on a simulated clock."""

import math
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.domain import Stage
from server.engine.call_times import CallKind, CallTimes
from server.engine.scheduling import Order, QueueLimits, Reason, Schedule
from server.engine.task import ImageTask

STEP = CallKind(Stage.BASE, 1024, 1024)  # takes a second
SMALL = CallKind(Stage.BASE, 512, 512)  # takes a quarter
ROOM = QueueLimits(jobs=10_000)


def schedule_of(order: Order = Order.SHORTEST, limits: QueueLimits = ROOM, average: int | None = 20) -> Schedule:
    """Return an empty schedule that knows the times of calls and has seen many jobs of `average` seconds."""
    times = CallTimes()
    times.record(STEP, 1.0)
    times.record(SMALL, 0.25)
    schedule = Schedule(limits, times, order)
    for _ in range(0 if average is None else 300):
        before = steps(average, "before")
        schedule.add(before, -1.0)
        schedule.remove(before, -1.0)
    return schedule


def steps(
    count: int, caller: str = "somebody", deadline: float = math.inf, priority: int = 0, **size: int
) -> ImageTask:
    return ImageTask(caller, [(STEP, count)], deadline, priority, **size)


def added(schedule: Schedule, *tasks: ImageTask, now: float = 0.0) -> tuple[ImageTask, ...]:
    for task in tasks:
        schedule.add(task, now)
    return tasks


def run(schedule: Schedule, now: float = 0.0, until: float = math.inf) -> list[tuple[ImageTask, float]]:
    """Make calls, a second each, until no task is left; return the tasks and their ends, in order."""
    ends = []
    while now < until and (batch := schedule.choose(now)):
        now += 1.0
        schedule.record_call(batch, 1.0)
        if not batch[0].calls:
            schedule.remove(batch[0], now)
            ends.append((batch[0], now))
    return ends


def order_of(schedule: Schedule, now: float = 0.0) -> list[ImageTask]:
    return [task for task, _ in run(schedule, now)]


# Order.


def test_empty_schedule_chooses_nothing():
    assert schedule_of().choose(0.0) == []


def test_short_jobs_run_first():
    schedule = schedule_of()
    long, short, middle = added(schedule, steps(30), steps(3), steps(10))
    assert order_of(schedule) == [short, middle, long]


def test_jobs_of_one_size_run_in_order_of_arrival():
    schedule = schedule_of()
    tasks = added(schedule, *(steps(5) for _ in range(6)))
    assert order_of(schedule) == list(tasks)


def test_short_job_preempts_a_long_one():
    schedule = schedule_of()
    (long,) = added(schedule, steps(30))
    run(schedule, until=5.0)
    (short,) = added(schedule, steps(2), now=5.0)
    assert schedule.choose(5.0) == [short]
    assert order_of(schedule, 5.0) == [short, long]


def test_nearly_finished_job_is_not_preempted_by_a_shorter_one():
    schedule = schedule_of()
    (long,) = added(schedule, steps(30))
    run(schedule, until=28.0)
    (short,) = added(schedule, steps(3), now=28.0)
    assert order_of(schedule, 28.0) == [long, short]


def test_arrivals_after_the_handicap_do_not_overtake():
    schedule = schedule_of()
    (long,) = added(schedule, steps(30, "long"))
    bound = long.admitted + long.handicap
    (before,) = added(schedule, steps(1, "before"), now=0.5 * bound)
    (after,) = added(schedule, steps(1, "after"), now=1.01 * bound)
    assert order_of(schedule, 1.01 * bound) == [before, long, after]


def test_handicap_grows_with_the_load():
    idle, busy = schedule_of(), schedule_of()
    added(busy, *(steps(20) for _ in range(20)))
    (here,), (there,) = added(idle, steps(10)), added(busy, steps(10))
    assert there.handicap > 1.5 * here.handicap


def test_priority_scales_the_length_of_a_job():
    schedule = schedule_of()
    low, normal, high = added(schedule, steps(10, priority=-1), steps(10), steps(10, priority=1))
    shorter = added(schedule, steps(9))[0]
    assert order_of(schedule) == [high, shorter, normal, low]


def test_first_come_ignores_size_deadline_priority_and_caller():
    schedule = schedule_of(Order.FIRST_COME)
    tasks = added(schedule, steps(30, "a"), steps(2, "b", priority=2), steps(3, "a", deadline=4.0))
    ends = run(schedule, until=10.0)
    tasks += added(schedule, steps(1, "c"), now=10.0)
    assert [task for task, _ in ends + run(schedule, 10.0)] == list(tasks)


def test_replan_changes_the_order():
    schedule = schedule_of()
    first, second = added(schedule, steps(5), steps(12))
    schedule.replan(second, [(STEP, 3)])
    assert order_of(schedule) == [second, first]


def test_replan_does_not_raise_the_handicap():
    schedule = schedule_of()
    (task,) = added(schedule, steps(5))
    before = task.handicap
    schedule.replan(task, [(STEP, 50)])
    assert (task.remaining, task.handicap) == (50, before)


def test_held_job_is_not_chosen_until_it_resumes():
    schedule = schedule_of()
    first, second = added(schedule, steps(5), steps(6))
    schedule.hold(first)
    assert schedule.choose(0.0) == [second]
    schedule.resume(first)
    assert schedule.choose(0.0) == [first]
    schedule.hold(first)
    schedule.hold(second)
    assert schedule.choose(0.0) == []


def test_choose_ahead_takes_the_first_by_rank_and_keeps_the_order():
    schedule = schedule_of()
    prompt = CallKind(Stage.ENCODE, 1024, 1024)
    running, first, second = added(schedule, steps(2), *(ImageTask("b", [(prompt, 1), (STEP, n)]) for n in (5, 9)))
    assert schedule.choose_ahead(Stage.ENCODE) == [first]
    schedule.hold(first, ahead=True)
    assert schedule.choose_ahead(Stage.ENCODE) == [second]
    schedule.hold(second, ahead=True)
    assert schedule.choose_ahead(Stage.ENCODE) == []
    assert schedule.forecast(first, 0.0).position == 1
    schedule.resume(first)
    schedule.resume(second)
    assert schedule.choose(0.0) == [running]
    assert [task for task, _ in run(schedule)] == [running, first, second]


def test_job_without_calls_left_counts_until_it_is_removed():
    schedule = schedule_of()
    (task,) = added(schedule, steps(1, pixels=9))
    schedule.record_call(schedule.choose(0.0), 1.0)
    assert schedule.choose(1.0) == []
    assert (len(schedule), schedule.pixels) == (1, 9)
    schedule.remove(task, 1.0)
    assert (len(schedule), schedule.pixels) == (0, 0)


def test_job_without_calls_left_has_no_eta():
    schedule = schedule_of()
    added(schedule, *(steps(1) for _ in range(5)), now=0.0)
    (task,) = added(schedule, steps(1), now=10.0)
    schedule.record_call([task], 1.0)
    assert schedule.forecast(task, 11.0).eta == 0


def test_job_removed_during_its_call_stays_removed():
    schedule = schedule_of()
    (task,) = added(schedule, steps(5))
    batch = schedule.choose(0.0)
    schedule.remove(task, 0.5)
    schedule.record_call(batch, 1.0)
    assert schedule.choose(1.0) == []
    assert task not in schedule
    with pytest.raises(KeyError):
        schedule.remove(task, 1.0)


def test_remaining_times_follow_the_measured_call_times():
    schedule = schedule_of()
    (task,) = added(schedule, ImageTask("", [(SMALL, 10), (STEP, 1)]))
    assert task.remaining == pytest.approx(3.5)
    for _ in range(9):
        schedule.record_call([task], 0.5)
    schedule.choose(0.0)
    assert task.remaining == pytest.approx(0.5 + 1)
    assert schedule.work == pytest.approx(task.remaining)


# Callers.


def test_thousand_jobs_of_one_caller_do_not_delay_another_caller():
    schedule = schedule_of()
    added(schedule, *(steps(5, "many") for _ in range(1000)))
    run(schedule, until=500.0)
    (single,) = added(schedule, steps(5, "single"), now=500.0)
    ends = run(schedule, 500.0, until=520.0)
    assert single in [task for task, _ in ends]


def test_callers_with_long_queues_take_turns():
    schedule = schedule_of()
    for caller in ("a", "b", "c"):
        added(schedule, *(steps(5, caller) for _ in range(50)))
    ends = run(schedule, until=300.0)
    assert Counter(task.caller for task, _ in ends) == {"a": 20, "b": 20, "c": 20}


def test_jobs_of_a_long_queue_keep_their_own_order():
    schedule = schedule_of()
    long, *_ = added(schedule, steps(60, "many"), *(steps(5, "many") for _ in range(40)))
    short = added(schedule, steps(1, "many"))[0]
    order = order_of(schedule)
    assert order[0] is short
    assert order[-1] is long


# Deadlines.


def test_urgent_deadline_runs_first():
    schedule = schedule_of()
    short, long = added(schedule, steps(6), steps(20, deadline=22.0))
    ends = dict(run(schedule))
    assert ends[long] <= 22.0
    assert ends[short] > 22.0


def test_distant_deadline_does_not_run_first():
    schedule = schedule_of()
    short, long = added(schedule, steps(6), steps(20, deadline=60.0))
    assert order_of(schedule) == [short, long]


@pytest.mark.parametrize(("seconds", "urgent"), [((1.0, 1.0, 1.0), False), ((0.5, 1.0, 1.5), True)])
def test_deadlines_run_earlier_when_call_times_vary_more(seconds: tuple[float, ...], urgent: bool):
    schedule = schedule_of()
    (before,) = added(schedule, steps(30))
    for each in seconds * 10:
        schedule.record_call([before], each)
    schedule.remove(before, 0.0)
    short, long = added(schedule, steps(6), steps(20, deadline=26.0))
    assert schedule.choose(0.0) == [long if urgent else short]
    rejected = schedule.rejection(steps(5, deadline=5.5), 0.0)
    assert (rejected is not None and rejected.reason is Reason.DEADLINE) == urgent


def test_earliest_deadline_runs_first():
    schedule = schedule_of()
    later, sooner = added(schedule, steps(5, deadline=16.0), steps(10, deadline=10.6))
    assert order_of(schedule) == [sooner, later]


def test_meetable_deadline_is_not_missed_for_an_unmeetable_one():
    schedule = schedule_of()
    doomed, hopeful = added(schedule, steps(20, deadline=10.0), steps(10, deadline=11.0))
    ends = dict(run(schedule))
    assert ends[hopeful] <= 11.0
    assert doomed in ends


def test_as_many_deadlines_as_possible_are_met():
    schedule = schedule_of()
    tasks = added(schedule, steps(12, deadline=13.0), steps(4, deadline=14.0), steps(4, deadline=15.0))
    ends = dict(run(schedule))
    assert [ends[task] <= task.deadline for task in tasks] == [False, True, True]


def test_meetable_deadline_is_admitted():
    schedule = schedule_of()
    added(schedule, steps(10, deadline=20.0), steps(100))
    assert schedule.rejection(steps(5, deadline=6.0), 0.0) is None


def test_unmeetable_deadline_is_rejected_until_it_can_be_met():
    schedule = schedule_of()
    added(schedule, steps(10, deadline=10.6))
    rejected = steps(5, deadline=12.0)
    rejection = schedule.rejection(rejected, 0.0)
    assert rejection is not None
    assert (rejection.reason, rejection.finish) == (Reason.DEADLINE, 15.0)
    assert 3 <= rejection.retry_after < 5
    run(schedule, until=math.ceil(rejection.retry_after))
    rejected.deadline += math.ceil(rejection.retry_after)
    assert schedule.rejection(rejected, math.ceil(rejection.retry_after)) is None


def test_job_longer_than_its_deadline_has_infinite_retry_after():
    rejection = schedule_of().rejection(steps(5, deadline=4.0), 0.0)
    assert rejection is not None
    assert (rejection.reason, rejection.retry_after) == (Reason.DEADLINE, math.inf)


def test_job_that_would_make_admitted_jobs_late_is_rejected():
    schedule = schedule_of()
    admitted = added(schedule, steps(10, deadline=12.0), steps(5, deadline=100.0))[0]
    rejection = schedule.rejection(steps(5, deadline=6.0), 0.0)
    assert rejection is not None
    assert (rejection.reason, rejection.late) == (Reason.OTHERS, (admitted,))


def test_batch_makes_no_deadline_late():
    schedule = schedule_of()
    tight, *_ = added(schedule, steps(10, deadline=10.8), steps(10), steps(10))
    assert schedule.choose(0.0, max_batch=3) == [tight]


# Batches, limits, forecasts.


def test_batch_takes_jobs_of_one_kind_by_rank():
    schedule = schedule_of()
    first, third, second = added(schedule, steps(3), steps(8), steps(5))
    added(schedule, ImageTask("", [(SMALL, 4), (STEP, 3)]))
    assert schedule.choose(0.0, max_batch=2) == [first, second]
    assert schedule.choose(0.0, max_batch=8) == [first, second, third]


def test_job_joins_a_batch_when_its_next_call_is_of_that_kind():
    schedule = schedule_of()
    mixed, plain = added(schedule, ImageTask("", [(SMALL, 1), (STEP, 3)]), steps(9))
    assert schedule.choose(0.0, max_batch=2) == [mixed]
    schedule.record_call([mixed], 0.25)
    assert schedule.choose(0.25, max_batch=2) == [mixed, plain]


def postponements(schedule, max_batch, **size):
    """Return how many calls of three later jobs run before the two calls, of another kind, of an earlier job."""
    (first,) = added(schedule, ImageTask("", [(SMALL, 2)], **size))
    added(schedule, steps(50), steps(50), steps(50))
    now = 0.0
    while first not in (batch := schedule.choose(now, max_batch)):
        assert len(batch) == min(max_batch, 3)
        schedule.record_call(batch, 1.0 * len(batch))
        now += 1.0
    return round(now)


def test_fuller_batches_run_first_for_as_many_calls_as_places_stay_empty():
    assert postponements(schedule_of(), 4) == 3 * 2
    assert postponements(schedule_of(), 2) == 1 * 2
    assert postponements(schedule_of(), 1) == 0
    assert postponements(schedule_of(Order.FIRST_COME), 4) == 0


def test_no_job_is_postponed_past_a_deadline():
    assert 1 <= postponements(schedule_of(), 4, deadline=5.0) <= 4


def test_last_arrival_joins_the_batch_unless_its_next_call_runs_elsewhere():
    schedule = schedule_of()
    (plain,) = added(schedule, steps(9))
    schedule.record_call(schedule.choose(0.0, max_batch=2), 1.0)
    late = ImageTask("", [(SMALL, 1), (STEP, 9)])
    schedule.add(late, 1.0)
    assert schedule.choose(1.0) == [plain]
    assert schedule.choose(1.0, max_batch=2, join=False) == [plain]
    assert schedule.choose(1.0, max_batch=2) == [late]


def test_batched_call_counts_for_each_job_and_its_time_is_shared():
    schedule = schedule_of()
    tasks = added(schedule, steps(3), steps(5))
    schedule.record_call(schedule.choose(0.0, max_batch=2), 1.5)
    assert [task.calls for task in tasks] == [[(STEP, 2)], [(STEP, 4)]]
    assert [task.used for task in tasks] == [0.75, 0.75]


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (QueueLimits(jobs=2), Reason.JOBS),
        (QueueLimits(jobs=9, jobs_per_caller=2), Reason.JOBS_PER_CALLER),
        (QueueLimits(jobs=9, pixels=29), Reason.PIXELS),
        (QueueLimits(jobs=9, bytes=299), Reason.BYTES),
    ],
)
def test_job_over_a_limit_is_rejected_until_another_leaves(limits: QueueLimits, reason: Reason):
    schedule = schedule_of(limits=limits)
    added(schedule, steps(4, pixels=10, bytes=100), steps(6, pixels=10, bytes=100))
    rejection = schedule.rejection(steps(1, pixels=10, bytes=100), 0.0)
    assert rejection is not None
    assert rejection.reason == reason
    assert rejection.retry_after == pytest.approx(4, abs=1)
    run(schedule, until=4.0)
    assert schedule.rejection(steps(1, pixels=10, bytes=100), 4.0) is None


def test_caller_at_its_limit_leaves_room_for_others():
    schedule = schedule_of(limits=QueueLimits(jobs=9, jobs_per_caller=1))
    added(schedule, steps(4, "many"))
    assert schedule.rejection(steps(4, "many"), 0.0) is not None
    assert schedule.rejection(steps(4, "other"), 0.0) is None


def test_job_larger_than_a_limit_has_infinite_retry_after():
    schedule = schedule_of(limits=QueueLimits(jobs=9, pixels=10))
    rejection = schedule.rejection(steps(1, pixels=11), 0.0)
    assert rejection is not None
    assert rejection.retry_after == math.inf


@pytest.mark.parametrize("order", list(Order))
def test_forecasts_are_exact_without_arrivals(order: Order):
    schedule = schedule_of(order, average=None)
    added(schedule, *(steps(7 * k % 11 + 1, f"caller {k % 3}") for k in range(31)))
    forecasts = {task: (position, eta) for task, position, eta in schedule.forecasts(0.0)}
    ends = run(schedule)
    assert [forecasts[task][0] for task, _ in ends] == list(range(31))
    for task, end in ends:
        assert forecasts[task][1] == pytest.approx(end, rel=0.01)


def test_forecast_meets_a_meetable_deadline():
    schedule = schedule_of()
    *_, tight = added(schedule, *(steps(5) for _ in range(20)), steps(30, deadline=40.0))
    assert schedule.forecast(tight, 0.0).eta <= 40
    assert schedule.forecast(tight, 0.0).position > 0


def test_single_forecast_equals_that_of_all():
    schedule = schedule_of()
    tasks = added(schedule, steps(9), steps(3), steps(5))
    every = {forecast.task: forecast for forecast in schedule.forecasts(0.0)}
    assert {task: schedule.forecast(task, 0.0) for task in tasks} == every
    with pytest.raises(KeyError):
        schedule.forecast(steps(1), 0.0)


def test_forecasts_include_future_arrivals():
    schedule = schedule_of()
    now = 0.0
    for _ in range(200):  # short jobs need half of the device's time
        added(schedule, steps(1), now=now)
        run(schedule, now)
        now += 2.0
    (long,) = added(schedule, steps(20), now=now)
    assert 25 < schedule.forecast(long, now).eta < 45


def test_forecasts_use_the_handicaps_of_the_current_load():
    schedule = schedule_of(average=None)
    now = 0.0
    for _ in range(200):  # one at a time, so that patience stays low
        added(schedule, steps(20), now=now)
        now = run(schedule, now)[-1][1]
    added(schedule, *(steps(20) for _ in range(100)), now=now)
    (short,) = added(schedule, steps(5), now=now)
    assert schedule.forecast(short, now).eta == pytest.approx(run_until(schedule, short, now) - now, rel=0.2)


def run_until(schedule: Schedule, task: ImageTask, now: float) -> float:
    """Return when the task ends if arrivals continue at the same rate: 20 steps every 20 seconds."""
    while task in schedule:
        added(schedule, steps(20), now=now)
        for ended, when in run(schedule, now, now + 20.0):
            if ended is task:
                return when
        now += 20.0
    raise AssertionError


def test_forecasts_change_nothing():
    schedule = schedule_of()
    doomed, _ = added(schedule, steps(20, deadline=10.0), steps(10, deadline=11.0))
    before = schedule.holds_until(0.0), schedule.choose(0.0), schedule.work
    list(schedule.forecasts(5.0))
    assert before == (schedule.holds_until(0.0), schedule.choose(0.0), schedule.work)
    assert doomed in schedule


def test_choice_holds_until_the_stated_time():
    schedule = schedule_of()
    short, long = added(schedule, steps(6), steps(20, deadline=25.0))
    until = schedule.holds_until(0.0)
    assert 0 < until < 6
    now = 0.0
    while now <= until:
        assert schedule.choose(now) == [short]
        schedule.record_call([short], 1.0)
        now += 1.0
    assert schedule.choose(now) == [long]


# Random sequences of everything.


@settings(deadline=None, max_examples=200)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 20), st.integers(1, 30), st.sampled_from([math.inf, 1.06, 1.5, 3.0, 6.0])),
        max_size=40,
    )
)
def test_every_admitted_deadline_is_met(arrivals: list[tuple[int, int, float]]):
    schedule = schedule_of()
    now = 0.0
    ends: list[tuple[ImageTask, float]] = []
    for gap, count, slack in arrivals:
        ends += run(schedule, now, until=now + gap)
        now += gap
        task = steps(count, deadline=now + slack * count)
        if schedule.rejection(task, now) is None:
            schedule.add(task, now)
    for task, end in ends + run(schedule, now):
        assert end <= task.deadline


class RandomSchedule(RuleBasedStateMachine):
    """Arrivals, calls, failures, cancels and a clock that runs, stops or jumps, in any order.

    The machine keeps its own account of the planned and the made calls.
    """

    order = Order.SHORTEST

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.schedule = schedule_of(self.order, QueueLimits(jobs=30, pixels=2500))
        self.planned: dict[ImageTask, int] = {}
        self.made: Counter[ImageTask] = Counter()
        self.bounds: dict[ImageTask, float] = {}
        self.ended: Counter[ImageTask] = Counter()
        self.waiting: list[ImageTask] = []

    @rule(
        caller=st.sampled_from("abc"),
        calls=st.lists(st.tuples(st.sampled_from([STEP, SMALL]), st.integers(1, 12)), min_size=1, max_size=4),
        slack=st.sampled_from([math.inf, math.inf, 1.0, 1.2, 3.0]),
        priority=st.integers(-2, 2),
        pixels=st.integers(1, 200),
    )
    def arrive(self, caller, calls, slack, priority, pixels):
        seconds = sum(count * (1.0 if kind is STEP else 0.25) for kind, count in calls)
        task = ImageTask(caller, list(calls), self.now + slack * seconds, priority, pixels)
        if self.schedule.rejection(task, self.now) is None:
            self.schedule.add(task, self.now)
            self.waiting.append(task)
            self.planned[task] = sum(count for _, count in calls)
            self.bounds[task] = task.admitted + task.handicap

    @rule(
        most=st.integers(1, 4),
        ends=st.sampled_from(["succeeds", "succeeds", "succeeds", "failed"]),
        stuck=st.booleans(),
    )
    def call(self, most, ends, stuck):
        batch = self.schedule.choose(self.now, most)
        assert bool(batch) == bool(self.waiting)
        if batch:
            self.check_order(batch, most)
            if ends == "failed":
                self.end(batch[0])
            else:
                self.make(batch, stuck)

    def make(self, batch, stuck=False):
        seconds = 1.0 if batch[0].kind is STEP else 0.25
        self.now += 0.0 if stuck else seconds
        self.made.update(batch)
        self.schedule.record_call(batch, seconds * len(batch))
        for task in batch:
            if not task.calls:
                assert self.made[task] == self.planned[task]
                self.end(task)

    def end(self, task):
        self.schedule.remove(task, self.now)
        self.waiting.remove(task)
        self.ended[task] += 1

    def check_order(self, batch, most=1):
        assert len(set(batch)) == len(batch) <= most
        assert set(batch) <= set(self.waiting)
        assert len({task.kind for task in batch}) == 1
        # In a shared call, the last arrival may fill an empty place.
        if most == 1 and len(self.waiting) <= 16 and batch[0].deadline == math.inf:
            for waiting in self.waiting:
                assert batch[0].admitted <= self.bounds[waiting], "overtaken by an arrival after the bound"

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data):
        self.end(data.draw(st.sampled_from(self.waiting)))

    @rule(seconds=st.sampled_from([0.0, 0.01, 5.0, 1e4]))
    def clock(self, seconds):
        self.now += seconds

    @rule()
    def forecast(self):
        forecasts = list(self.schedule.forecasts(self.now))
        assert {each.task for each in forecasts} == set(self.waiting)
        assert [each.position for each in forecasts] == list(range(len(self.waiting)))
        assert all(each.task.remaining <= each.eta + 1e-6 and each.eta < math.inf for each in forecasts)

    @invariant()
    def counts_agree(self):
        assert len(self.schedule) == len(self.waiting) <= 30
        assert self.schedule.pixels == sum(task.pixels for task in self.waiting) <= 2500
        assert self.schedule.work == pytest.approx(sum(task.remaining for task in self.waiting), abs=1e-6)

    def teardown(self):
        while batch := self.schedule.choose(self.now):
            self.check_order(batch)
            self.make(batch)
        assert self.ended == dict.fromkeys(self.planned, 1)
        assert all(self.made[task] <= self.planned[task] for task in self.planned)


class RandomFirstCome(RandomSchedule):
    order = Order.FIRST_COME

    def check_order(self, batch, most=1):
        super().check_order(batch, most)
        assert batch[0] is self.waiting[0]


RandomSchedule.TestCase.settings = RandomFirstCome.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestRandomSchedule = RandomSchedule.TestCase
TestRandomFirstCome = RandomFirstCome.TestCase
