"""The scheduling core: which task's call runs next, and when each task will end. No threads, no torch, no clock.

Short jobs first, with bounded waiting. The rank of a job is its time of admission plus a handicap that grows with its
remaining work, `patience * ln(1 + remaining / grain)`. The job with the lowest rank runs. A job therefore runs before
one that needs ten times as long and was admitted up to 2.3 patiences earlier, but not before one admitted even earlier.
Without a handicap the order is first come, first served; with an unbounded one it is shortest remaining processing time
(Schrage, 1968). The logarithm slows the longest jobs least (Yu and Scully, "Strongly Tail-Optimal Scheduling in the
Light-Tailed M/G/1", 2024). Patience is a multiple of the latency under first come, first served, and so follows the
load and the speed of the device.

The bound. The handicap of a job never exceeds its value at admission. No job that is admitted later than that many
seconds after it runs before it, except to meet a deadline. The job ends no later than if it had arrived that much later
and all jobs were served first come, first served.

Fairness between callers. When a job leaves and its caller has 16 or more jobs left, all of these rank against other
callers as if they had been admitted then: the start tags of start-time fair queueing (Goyal, Vin and Cheng, 1996), for
callers with long queues only. A thousand jobs of one caller do not delay the single job of another. For a caller with
a long queue the bound holds between its own jobs; against other callers it holds for its next job, from the time that
its last one left.

Deadlines. A job with a deadline runs by its rank like all others, until one call of another job would make some
deadline late. Then the earliest deadline runs first, which meets all deadlines if any order does (Liu and Layland,
1973). If not all can be met, the longest of the jobs concerned is no longer run early for its deadline, until the
others can be met (Moore, 1968); it still ends when its deadline passes. The safety margin follows the recent deviation
of calls from their expected times.
"""

import enum
import heapq
import itertools
import math
from collections.abc import Generator, Hashable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from server.domain import Stage
from server.engine.arrivals import Arrivals, handicap
from server.engine.call_times import CallKind, CallTimes
from server.engine.deadlines import DeadlineSet
from server.engine.task import ImageTask

_PATIENCE = 1.25  # times the average latency of jobs under first come, first served
_LONG_QUEUE = 16  # jobs of one caller; with so many left, the others rank as admitted when the last one left
_GRAIN = 1 / 50  # of the average job; differences in length below it count little
_AVERAGED_JOBS = 3000
_NOTABLE_CHANGE = 0.1  # a relative change of patience above this ranks all tasks again
_PRIORITY_FACTOR = 4.0  # a job of the next higher priority counts as shorter by this factor
_MAX_LOOKED_AT = 32  # tasks, by rank, that are considered for one batch


class Order(enum.StrEnum):
    """The scheduling policy.

    FIRST_COME runs every job to its end, in the order of arrival, whatever its size, deadline or caller.
    """

    SHORTEST = "shortest"
    FIRST_COME = "first-come"


@dataclass(frozen=True)
class QueueLimits:
    """Limits on the admitted jobs: their number, in total and per caller, pixels of all images, bytes of memory."""

    jobs: int
    jobs_per_caller: float = math.inf
    pixels: float = math.inf
    bytes: float = math.inf


class Reason(enum.StrEnum):
    """Why a task is rejected: the limit that it exceeds, or the deadlines that would be missed."""

    JOBS = "jobs"
    JOBS_PER_CALLER = "jobs per caller"
    PIXELS = "pixels"
    BYTES = "bytes"
    DEADLINE = "its own deadline"
    OTHERS = "deadlines of others"


@dataclass(frozen=True)
class Rejection:
    """Why and until when a task should not be admitted.

    `finish` is the earliest end of the task, in seconds from now. After `retry_after` seconds there should be room for
    it; infinity means that it is too large in itself. `late` are the admitted tasks that it would make late.
    """

    reason: Reason
    finish: float
    retry_after: float
    late: tuple[ImageTask, ...] = ()


class Forecast(NamedTuple):
    """The predicted end of a task: `position` tasks go first, and its last call ends in `eta` seconds."""

    task: ImageTask
    position: int
    eta: float


class Schedule:
    """The admitted tasks and their order.

    A task is added once and removed once, whatever its end. In between, `choose` returns the tasks whose call is next,
    and `record_call` takes the call that was made. Each costs O(log n) for n tasks, amortised; tasks with deadlines add
    O(n) in numpy, 3 ns each.
    """

    def __init__(self, limits: QueueLimits, times: CallTimes, order: Order = Order.SHORTEST) -> None:
        self.limits = limits
        self.pixels = 0
        self.bytes = 0
        self._times = times
        self._times_version = times.version
        self._first_come = order is Order.FIRST_COME
        self._tasks: dict[ImageTask, _CallerQueue] = {}
        self._callers: dict[str, _CallerQueue] = {}
        self._by_rank: _RankedQueue[_CallerQueue] = _RankedQueue()
        self._deadlines = DeadlineSet()
        self._arrivals = Arrivals()
        self._numbers = itertools.count()
        self._work = 0.0
        self._counted_jobs = 0
        self._mean_size = _RunningMean()
        self._mean_latency = _RunningMean()
        self._patience = 0.0
        self._grain = 1.0

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, task: ImageTask) -> bool:
        return task in self._tasks

    @property
    def work(self) -> float:
        """Device seconds that all admitted tasks still need."""
        return self._work

    # Admission.

    def jobs_per_caller(self, task: ImageTask) -> float:
        """Return how many jobs the task's caller may have admitted at once."""
        return self.limits.jobs_per_caller if task.jobs_per_caller is None else task.jobs_per_caller

    def rejection(self, task: ImageTask, now: float) -> Rejection | None:
        """Return why the task should not be added now, if there is a reason. Changes nothing."""
        self._adopt_call_times()
        size = self._expected_seconds(task)
        late: tuple[ImageTask, ...] = ()
        if self._first_come:
            finish = self._work + size
        else:
            ahead, late = self._deadlines.impact(task.deadline, size, now)
            finish = ahead + size
        caller = self._callers.get(task.caller)
        for reason, taken, limit in (
            (Reason.JOBS_PER_CALLER, (caller.jobs if caller else 0) + 1, self.jobs_per_caller(task)),
            (Reason.JOBS, len(self) + 1, self.limits.jobs),
            (Reason.PIXELS, self.pixels + task.pixels, self.limits.pixels),
            (Reason.BYTES, self.bytes + task.bytes, self.limits.bytes),
        ):
            if taken > limit:
                return Rejection(reason, finish, self._seconds_until_free(reason, task.caller, taken - limit, now))
        over = now + self._deadlines.safety_factor * finish - task.deadline
        if over > 0:
            alone = now + self._deadlines.safety_factor * size > task.deadline
            return Rejection(Reason.DEADLINE, finish, math.inf if alone else over)
        return Rejection(Reason.OTHERS, finish, size, late) if late else None

    def add(self, task: ImageTask, now: float) -> None:
        """Admit a task, even one that `rejection` advises against."""
        self._adopt_call_times()
        caller = self._callers.setdefault(task.caller, _CallerQueue(turn=now))
        caller.jobs += 1
        self._tasks[task] = caller
        task.admitted = now
        task.number = next(self._numbers)
        self._update_remaining(task)
        self._counted_jobs += caller.jobs <= _LONG_QUEUE
        self._adapt_patience(task)
        self._update_rank(task)
        task.max_handicap = task.handicap
        self.pixels += task.pixels
        self.bytes += task.bytes
        if task.deadline < math.inf and not self._first_come:
            self._deadlines.add(task)
        self._arrivals.add(now, task.remaining, _length(task))

    def remove(self, task: ImageTask, now: float) -> None:
        """Remove a task that has ended, whatever its end. Raises KeyError if it is not in the schedule."""
        caller = self._tasks.pop(task)
        caller.queue.discard(task)
        self._deadlines.discard(task)
        self._work = self._work - task.remaining if self._tasks else 0.0
        self.pixels -= task.pixels
        self.bytes -= task.bytes
        self._counted_jobs -= caller.jobs <= _LONG_QUEUE
        caller.jobs -= 1
        if task.used > 0 and self._takes_turns(caller.jobs):
            caller.turn = now
        if caller.jobs == 0:
            del self._callers[task.caller]
        self._update_caller_rank(caller)

    # The next call.

    def choose(self, now: float, max_batch: int = 1, join: bool = True) -> list[ImageTask]:
        """Return the tasks whose next call is to be made now, in one call together; an empty list if there are none.

        The first task has the lowest rank. Up to `max_batch` - 1 others of its kind follow by rank, as far as the
        longer call makes no deadline late. A call that more tasks share goes first: a task that has finished its part
        of one expert waits for others to reach the next expert. A task is postponed for at most `max_batch` - 1 calls
        for each of its own, as many as its own would have empty places, and never past a deadline. With `join`, a task
        that reaches the batch's kind after one call of another kind (the encoding of its prompt) gets that call first,
        even if it was admitted last: the call is needed anyway, and an empty place in all calls until then costs more.
        """
        first = self._next_task(now)
        if first is None or max_batch == 1 or not first.kind.shared:
            return [first] if first else []
        same_kind: dict[CallKind, list[ImageTask]] = {first.kind: [first]}
        considered: list[ImageTask] = []
        with closing(self._in_order()) as tasks:
            for task in tasks:
                considered.append(task)
                if task is not first:
                    same_kind.setdefault(task.kind, []).append(task)
                if len(same_kind[first.kind]) == max_batch:
                    break

        batch = self._within_deadlines(same_kind[first.kind][:max_batch], now)
        if not self._first_come and first.postponements < (max_batch - 1) * first.calls[0][1]:
            fullest = max((each[:max_batch] for kind, each in same_kind.items() if kind.shared), key=len)
            if len(fullest) > len(batch) and not self._deadlines.most_urgent(
                now, self._times.expect(fullest[0].kind, len(fullest))
            ):
                first.postponements += 1
                batch = fullest
        if join and len(batch) < max_batch and not self._first_come:
            for task in considered:
                if task.follows_with(batch[0].kind):
                    longer = self._times.expect(task.kind) + self._times.expect(batch[0].kind, len(batch) + 1)
                    return batch if self._deadlines.most_urgent(now, longer) else [task]
        return batch

    def choose_ahead(self, stage: Stage) -> list[ImageTask]:
        """Return the first task by rank whose next call is of this stage, or an empty list if it ranks too low."""
        with closing(self._in_order()) as tasks:
            return next(([task] for task in tasks if task.kind.stage is stage), [])

    def holds_until(self, now: float) -> float:
        """Return until when calls of the chosen task may begin before the choice changes, if no task comes or goes."""
        first = self._next_task(now)
        if first is None:
            return math.inf
        step = self._times.expect(first.kind)
        return now if self._deadlines.most_urgent(now, step) else self._deadlines.latest_start - step

    def record_call(self, tasks: Sequence[ImageTask], seconds: float, calls: int = 1) -> None:
        """Record the next call of these tasks, made in one call together that took `seconds` of the device.

        `calls` counts them if more than one of the same kind was made in a row; `seconds` is their sum. Tasks that have
        been removed since are ignored.
        """
        self._times.record(tasks[0].kind, seconds / calls, len(tasks))
        for task in tasks:
            kind, count = task.calls[0]
            task.calls[:1] = [(kind, count - calls)] if count > calls else []
            task.postponements *= count > calls
            task.used += seconds / len(tasks)
            self._refresh(task)

    def replan(self, task: ImageTask, calls: list[tuple[CallKind, int]]) -> None:
        """Replace the calls that the task still needs."""
        task.calls = calls
        self._refresh(task)

    def hold(self, task: ImageTask, ahead: bool = False) -> None:
        """Do not choose the task until `resume`, because its next call is made elsewhere.

        `ahead` means that its turn has not come yet.
        """
        task.held, task.held_ahead = True, ahead
        self._refresh(task)

    def resume(self, task: ImageTask) -> None:
        """Let the task be chosen again."""
        task.held = task.held_ahead = False
        self._refresh(task)

    # Forecasts.

    def forecasts(self, now: float) -> Iterator[Forecast]:
        """Yield a forecast of all tasks, in the predicted order of their ends.

        The order is simulated to its end, which costs O(n log n) for n tasks. Each end is then delayed by the work that
        will arrive and go first, if arrivals continue at the recent rate.
        """
        for position, (task, wait) in enumerate(self._simulated_order(now)):
            yield Forecast(task, position, self._eta(task, wait, now))

    def forecast(self, task: ImageTask, now: float) -> Forecast:
        """Return the forecast of one task. Cheap for one that runs. Raises KeyError if it is not in the schedule."""
        if task not in self._tasks:
            raise KeyError(task)
        if (task.held and not task.held_ahead) or task is self._next_task(now):
            return Forecast(task, 0, self._eta(task, 0.0, now))
        return next(forecast for forecast in self.forecasts(now) if forecast.task is task)

    def _eta(self, task: ImageTask, wait: float, now: float) -> float:
        """Return the seconds until the end of a task that would wait `wait` seconds without further arrivals."""
        if not task.calls:  # no arrival can go first any more
            return 0.0
        arrivals = self._arrivals.rates(now, self._patience, self._grain)
        rank = task.admitted + task.handicap
        start = arrivals.finish_with_arrivals(now, wait, rank)
        # While it runs, its handicap falls to nothing, by one patience on average.
        end = arrivals.finish_with_arrivals(start, task.remaining, rank - self._patience)
        if task in self._deadlines:
            end = min(end, max(now + wait + task.remaining, task.deadline))
        return end - now

    def _simulated_order(self, now: float) -> Iterator[tuple[ImageTask, float]]:
        """Yield each task in order, with the seconds that it would wait without further arrivals."""
        own: dict[_CallerQueue, list[tuple[float, int, ImageTask]]] = {}
        for task, caller in self._tasks.items():
            own.setdefault(caller, []).append((task.admitted + task.handicap, task.number, task))
        turns: list[tuple[float, int, ImageTask, float, _CallerQueue]] = []

        def next_turn(caller: _CallerQueue, turn: float) -> None:
            if own[caller]:
                _, number, task = own[caller].pop()
                heapq.heappush(turns, (_rank_between_callers(task, turn), number, task, turn, caller))

        for caller, tasks in own.items():
            tasks.sort(reverse=True)
            next_turn(caller, caller.turn)
        deadlines = self._deadlines.copy()
        done: set[ImageTask] = set()
        end = now
        while turns:
            _, _, task, turn, caller = heapq.heappop(turns)
            if task not in done:
                while (urgent := deadlines.most_urgent(end, task.remaining)) not in (None, task):
                    assert urgent is not None
                    deadlines.discard(urgent)
                    done.add(urgent)
                    yield urgent, end - now
                    end += urgent.remaining
                deadlines.discard(task)
                yield task, end - now
                end += task.remaining
            next_turn(caller, end if self._takes_turns(len(own[caller])) else turn)

    # Internals.

    def _next_task(self, now: float) -> ImageTask | None:
        """Return the task whose call is next: the most urgent one, or else the one with the lowest rank."""
        self._adopt_call_times()
        if (caller := self._by_rank.first()) is None:
            return None
        task = caller.queue.first()
        assert task is not None
        return self._deadlines.most_urgent(now, self._times.expect(task.kind)) or task

    def _in_order(self) -> Generator[ImageTask]:
        """Yield the first runnable tasks by rank. Each leaves its queue for the next one, until this is closed."""
        taken: list[ImageTask] = []
        try:
            while len(taken) < _MAX_LOOKED_AT and (caller := self._by_rank.first()):
                task = caller.queue.first()
                assert task is not None
                taken.append(task)
                yield task
                caller.queue.discard(task)
                self._update_caller_rank(caller)
        finally:
            for task in taken:
                self._update_rank(task)

    def _within_deadlines(self, batch: list[ImageTask], now: float) -> list[ImageTask]:
        """Return as many of these as can share a call without making a deadline late, at least the first."""
        while len(batch) > 1 and self._deadlines.most_urgent(now, self._times.expect(batch[0].kind, len(batch))):
            batch = batch[:-1]
        return batch

    def _refresh(self, task: ImageTask) -> None:
        """Update all that follows from a task's calls and from whether it is held."""
        if task in self._tasks:
            self._update_remaining(task)
            self._deadlines.update(task)
            self._update_rank(task)

    def _update_remaining(self, task: ImageTask) -> None:
        before = task.remaining
        task.remaining = self._expected_seconds(task)
        self._work = max(0.0, self._work + task.remaining - before)

    def _expected_seconds(self, task: ImageTask) -> float:
        return sum(count * self._times.expect(kind) for kind, count in task.calls)

    def _update_rank(self, task: ImageTask) -> None:
        """Put the task in its place among its caller's, and the caller in its place among the callers."""
        caller = self._tasks[task]
        if not task.runnable:
            caller.queue.discard(task)
        else:
            task.uncapped_handicap = handicap(_length(task), self._patience, self._grain)
            task.handicap = min(task.uncapped_handicap, task.max_handicap)
            caller.queue.put(task, task.admitted + task.handicap, task.number)
        self._update_caller_rank(caller)

    def _update_caller_rank(self, caller: "_CallerQueue") -> None:
        if (task := caller.queue.first()) is None:
            self._by_rank.discard(caller)
        else:
            self._by_rank.put(caller, _rank_between_callers(task, caller.turn), task.number)

    def _takes_turns(self, jobs: int) -> bool:
        """Return whether a caller with so many jobs left has to wait for its turn after one has left."""
        return jobs >= _LONG_QUEUE and not self._first_come

    def _adopt_call_times(self) -> None:
        """Update all tasks if the expected times of calls have changed notably: rare, and O(n)."""
        if self._times_version != self._times.version:
            self._times_version = self._times.version
            for task in self._tasks:
                self._refresh(task)
        self._deadlines.set_safety_factor(self._times.deviation)

    def _adapt_patience(self, task: ImageTask) -> None:
        """Let patience follow the load with each arrival; rank all tasks again if it changes notably: rare, and O(n).

        Only the first jobs of a caller's long queue count as load, so that one caller does not change the patience
        of all.
        """
        if self._first_come:
            return
        latency = self._mean_latency.add(self._work * self._counted_jobs / len(self._tasks))
        size = self._mean_size.add(task.remaining)
        if abs(_PATIENCE * latency - self._patience) > _NOTABLE_CHANGE * self._patience:
            self._patience = _PATIENCE * latency
            self._grain = max(_GRAIN * size, 1e-9)
            for each in self._tasks:
                self._update_rank(each)

    def _seconds_until_free(self, reason: Reason, caller: str, excess: float, now: float) -> float:
        """Return the seconds until so many jobs, pixels or bytes are free; infinity if they never are."""
        for task, _, eta in self.forecasts(now):
            excess -= {
                Reason.JOBS: 1,
                Reason.JOBS_PER_CALLER: task.caller == caller,
                Reason.PIXELS: task.pixels,
                Reason.BYTES: task.bytes,
            }[reason]
            if excess <= 0:
                return eta
        return math.inf


def _length(task: ImageTask) -> float:
    """Return the task's remaining seconds, scaled by its priority."""
    return task.remaining * _PRIORITY_FACTOR**-task.priority


def _rank_between_callers(task: ImageTask, turn: float) -> float:
    """Return the rank against tasks of other callers. The cap on the handicap holds from admission, not from a turn."""
    return turn + task.uncapped_handicap if turn > task.admitted else task.admitted + task.handicap


@dataclass(eq=False)
class _CallerQueue:
    """The tasks of one caller. They rank as admitted at `turn` or later; `queue` has the runnable ones of `jobs`."""

    turn: float
    jobs: int = 0
    queue: "_RankedQueue[ImageTask]" = field(default_factory=lambda: _RankedQueue())


_Item = TypeVar("_Item", bound=Hashable)


class _RankedQueue(Generic[_Item]):
    """Items by rank, lowest first.

    A changed item leaves its old entry in the heap until that reaches the top or most entries are old.
    """

    __slots__ = ("_changes", "_heap", "_live")

    def __init__(self) -> None:
        self._changes = 0
        self._heap: list[tuple[float, int, int, _Item]] = []
        self._live: dict[_Item, tuple[float, int, int, _Item]] = {}

    def put(self, item: _Item, rank: float, number: int) -> None:
        """Add an item, or change its rank. Items of equal rank go by number."""
        before = self._live.get(item)
        self._changes += 1
        entry = self._live[item] = (rank, number, self._changes, item)
        heap = self._heap
        if before is not None and heap[0] is before and entry[:2] <= before[:2]:
            heap[0] = entry  # the common case: the running task is first, and its rank has decreased
            return
        heapq.heappush(heap, entry)
        if len(heap) > 2 * len(self._live) + 8:
            self._heap = list(self._live.values())
            heapq.heapify(self._heap)

    def discard(self, item: _Item) -> None:
        """Remove an item, if it is in the queue."""
        self._live.pop(item, None)

    def first(self) -> _Item | None:
        """Return the item with the lowest rank."""
        heap, live = self._heap, self._live
        while heap and live.get(heap[0][3]) is not heap[0]:
            heapq.heappop(heap)
        return heap[0][3] if heap else None


class _RunningMean:
    """The mean of recent values; older values count less."""

    def __init__(self) -> None:
        self._count = 0
        self._value = 0.0

    def add(self, value: float) -> float:
        """Add a value and return the mean."""
        self._count = min(self._count + 1, _AVERAGED_JOBS)
        self._value += (value - self._value) / self._count
        return self._value
