"""Who runs next: the scheduling core. Jobs in, "whose call comes next" out; no threads, no torch, no clock of its own.

Short jobs first, yet nobody waits for ever. A job's rank is its time of arrival plus a handicap that grows with the
work it has left, `patience * ln(1 + remaining / grain)`; the least rank runs. So it goes before a job that needs ten
times as long and came up to 2.3 patiences earlier, but not before one that came earlier than that. No handicap would be
first come, first served, a boundless one shortest remaining time first (Schrage, 1968). The logarithm is what hurts
the longest jobs least (Yu and Scully, "Strongly Tail-Optimal Scheduling in the Light-Tailed M/G/1", 2024). Patience is
a multiple of what jobs would take first come, first served, and so follows the load and the speed of the device.

The bound. A job's handicap is never more than at its admission, and nothing that comes more than that many seconds
later goes before it, except by right of a deadline. So it ends no later than if it had come so much later and all were
served first come, first served.

Callers take turns. When a job leaves and its caller still has 16 or more, all that are left rank between callers as if
they came only now: the start tags of start-time fair queueing (Goyal, Vin and Cheng, 1996), for those alone who fill
the queue. A thousand jobs of one caller do not hold up the one of another. For the caller who sent them, the bound then
holds among its own jobs, and against others for the next of them, from the time at which the last one left.

Deadlines come first, but no sooner than they must. A job with a deadline runs by its rank as all others do, until one
call of another would make some deadline late; then the earliest deadline first, which meets them all if any order does
(Liu and Layland, 1973). If they cannot all be met, the longest job of those concerned loses its claim, until the others
can (Moore, 1968); it stays, as a job without a deadline. How much longer than expected work is taken to need follows
how far calls lately were from what was expected of them.
"""

import enum
import heapq
import itertools
import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Generator, Hashable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from server.domain import Stage
from server.engine.call_times import CallTimes, Kind

_PATIENCE = 1.25  # times the average time that a job would take first come, first served
_MANY = 16  # jobs of one caller: with so many left, the next counts as come when the one before has left
_GRAIN = 1 / 50  # of an average job: below it, being shorter counts for little
_MEMORY = 3000  # jobs, over which averages are taken
_NOTABLE = 0.1  # a change by more than this share makes all be ranked anew
_PRIORITY = 4.0  # a step of priority counts as being so many times shorter
# The time that a deadline's work is taken to need, for one that is expected: so much and, for each unit by which calls
# lately deviated from what was expected, so much more. Simulated, that meets nearly all that can be met.
_SAFETY_FACTOR, _SAFETY_PER_DEVIATION = 1.02, 1.3
_NOTABLE_FACTOR = 0.01  # a change of safety_factor that is worth to reckon anew
_LOOK = 32  # jobs, in order, that are looked at for one that can share a call
_FEW = 20  # arrivals: fewer say nothing of those to come
_RECENT = 300  # arrivals from which those to come are foretold


class Order(enum.StrEnum):
    """FIRST_COME runs every job to its end, in the order of arrival, whatever its size, deadline or caller."""

    SHORTEST = "shortest"
    FIRST_COME = "first-come"


@dataclass(frozen=True)
class QueueLimits:
    """What may be admitted at once: jobs, of all callers and of each, pixels of all their images, bytes of memory."""

    jobs: int
    jobs_of_caller: float = math.inf
    pixels: float = math.inf
    bytes: float = math.inf


@dataclass(eq=False)
class ImageTask:
    """What the order needs to know of a job. All times are seconds, on the clock of whoever calls the schedule.

    `calls` are those still to be made, in order, as runs of one kind: [(encode, 1), (base, 32), (refiner, 8), ...].
    `priority` is 0 for most jobs, negative for those that can wait. `jobs_of_caller` stands, if given, in place of that
    of the limits. The schedule fills in the rest: `remaining` is device time expected, `used` device time spent, and
    `handicap` the time by which the rank is behind the arrival.
    """

    caller: str
    calls: list[tuple[Kind, int]]
    deadline: float = math.inf
    priority: int = 0
    pixels: int = 0
    bytes: int = 0
    jobs_of_caller: float | None = None
    admitted: float = 0.0
    remaining: float = 0.0
    used: float = 0.0
    handicap: float = 0.0
    _number: int = field(default=0, repr=False)
    _ceiling: float = field(default=math.inf, repr=False)
    _free_handicap: float = field(default=0.0, repr=False)
    _held: bool = field(default=False, repr=False)
    _ahead: bool = field(default=False, repr=False)
    _put_off: int = field(default=0, repr=False)  # calls made in its stead since its calls are of this kind

    @property
    def kind(self) -> Kind:
        """The kind of the next call."""
        return self.calls[0][0]

    def follows_with(self, kind: Kind) -> bool:
        """Whether the call after the next is of this kind, and the next is not."""
        return len(self.calls) > 1 and self.calls[0][1] == 1 and self.calls[1][0] == kind != self.kind


class Reason(enum.StrEnum):
    """Why a task is refused: which limit it exceeds, or whose deadline would be missed."""

    JOBS = "jobs"
    JOBS_OF_CALLER = "jobs of one caller"
    PIXELS = "pixels"
    BYTES = "bytes"
    DEADLINE = "its own deadline"
    OTHERS = "deadlines of others"


@dataclass(frozen=True)
class Refusal:
    """A task that should not be admitted now.

    `finish` is the soonest that it could end, in seconds from now. After `retry_after` seconds there should be room for
    it; infinite if never, because it is too large in itself. `late` are the admitted tasks that would miss their
    deadlines for it.
    """

    reason: Reason
    finish: float
    retry_after: float
    late: tuple[ImageTask, ...] = ()


class Forecast(NamedTuple):
    """`position` tasks go before this one, whose last call ends in `eta` seconds."""

    task: ImageTask
    position: int
    eta: float


class Schedule:
    """The admitted tasks and their order.

    A task is added once and removed once, whatever its end. In between, `choose` returns the tasks whose call is next,
    and `record_call` takes the call that was made. Each costs O(log n) for n tasks, amortised; tasks with deadlines add
    O(n) of numpy, 3 ns each.
    """

    def __init__(self, limits: QueueLimits, times: CallTimes, order: Order = Order.SHORTEST) -> None:
        self.limits = limits
        self.pixels = 0
        self.bytes = 0
        self._times = times
        self._version = times.version
        self._first_come = order is Order.FIRST_COME
        self._tasks: dict[ImageTask, _Caller] = {}
        self._callers: dict[str, _Caller] = {}
        self._turns: _Queue[_Caller] = _Queue()
        self._deadlines = DeadlineSet()
        self._arrivals = _Arrivals()
        self._numbers = itertools.count()
        self._work = 0.0
        self._counted = 0
        self._mean_size = _Mean()
        self._mean_latency = _Mean()
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

    # In and out.

    def jobs_of_caller(self, task: ImageTask) -> float:
        """How many jobs the task's caller may have admitted at once."""
        return self.limits.jobs_of_caller if task.jobs_of_caller is None else task.jobs_of_caller

    def refusal(self, task: ImageTask, now: float) -> Refusal | None:
        """Why the task should not be added now, if there is a reason. Changes nothing."""
        self._follow_times()
        size = self._seconds(task)
        late: tuple[ImageTask, ...] = ()
        if self._first_come:
            finish = self._work + size
        else:
            ahead, late = self._deadlines.impact(task.deadline, size, now)
            finish = ahead + size
        caller = self._callers.get(task.caller)
        for reason, taken, limit in (
            (Reason.JOBS_OF_CALLER, (caller.tasks if caller else 0) + 1, self.jobs_of_caller(task)),
            (Reason.JOBS, len(self) + 1, self.limits.jobs),
            (Reason.PIXELS, self.pixels + task.pixels, self.limits.pixels),
            (Reason.BYTES, self.bytes + task.bytes, self.limits.bytes),
        ):
            if taken > limit:
                return Refusal(reason, finish, self._until_free(reason, task.caller, taken - limit, now))
        over = now + self._deadlines.safety_factor * finish - task.deadline
        if over > 0:
            alone = now + self._deadlines.safety_factor * size > task.deadline
            return Refusal(Reason.DEADLINE, finish, math.inf if alone else over)
        return Refusal(Reason.OTHERS, finish, size, late) if late else None

    def add(self, task: ImageTask, now: float) -> None:
        """Admit a task, whatever `refusal` says of it."""
        self._follow_times()
        caller = self._callers.setdefault(task.caller, _Caller(turn=now))
        caller.tasks += 1
        self._tasks[task] = caller
        task.admitted = now
        task._number = next(self._numbers)
        self._expect(task)
        self._counted += caller.tasks <= _MANY
        self._follow_load(task)
        self._rank(task)
        task._ceiling = task.handicap
        self.pixels += task.pixels
        self.bytes += task.bytes
        if task.deadline < math.inf and not self._first_come:
            self._deadlines.add(task)
        self._arrivals.add(now, task.remaining, _length(task))

    def remove(self, task: ImageTask, now: float) -> None:
        """The task has ended: finished, failed, expired or cancelled. Raises KeyError if it is not here."""
        caller = self._tasks.pop(task)
        caller.queue.drop(task)
        self._deadlines.drop(task)
        self._work = self._work - task.remaining if self._tasks else 0.0
        self.pixels -= task.pixels
        self.bytes -= task.bytes
        self._counted -= caller.tasks <= _MANY
        caller.tasks -= 1
        if task.used > 0 and self._takes_turns(caller.tasks):
            caller.turn = now
        if caller.tasks == 0:
            del self._callers[task.caller]
        self._place(caller)

    # What runs.

    def choose(self, now: float, most: int = 1, join: bool = True) -> list[ImageTask]:
        """The tasks whose next call is to be made now, in one call together; none if there are none.

        The first is the one whose turn it is, up to `most` - 1 others of its kind follow in the order of the schedule,
        as far as the longer call makes no deadline late. Calls that more share go before: whoever has finished its part
        of one expert waits for others to come to the next. It is put off so for at most `most` - 1 calls for each that
        it needs, the places in its own that would be empty, and never past a deadline. One that could follow after a
        single call of another kind, as of the text encoders, gets that call first where they `join`, even if it came
        last: that call has to be made at some time, and an empty place in all calls until then costs more.
        """
        first = self._first(now)
        if first is None or most == 1 or not first.kind.shared:
            return [first] if first else []
        alike: dict[Kind, list[ImageTask]] = {first.kind: [first]}
        looked: list[ImageTask] = []
        with closing(self._in_order()) as tasks:
            for task in tasks:
                looked.append(task)
                if task is not first:
                    alike.setdefault(task.kind, []).append(task)
                if len(alike[first.kind]) == most:
                    break

        batch = self._in_time(alike[first.kind][:most], now)
        if not self._first_come and first._put_off < (most - 1) * first.calls[0][1]:
            fullest = max((each[:most] for kind, each in alike.items() if kind.shared), key=len)
            if len(fullest) > len(batch) and not self._deadlines.most_urgent(
                now, self._times.expect(fullest[0].kind, len(fullest))
            ):
                first._put_off += 1
                batch = fullest
        if join and len(batch) < most and not self._first_come:
            for task in looked:
                if task.follows_with(batch[0].kind):
                    longer = self._times.expect(task.kind) + self._times.expect(batch[0].kind, len(batch) + 1)
                    return batch if self._deadlines.most_urgent(now, longer) else [task]
        return batch

    def _in_time(self, batch: list[ImageTask], now: float) -> list[ImageTask]:
        """As many of these as can share a call without making a deadline late, at least the first."""
        while len(batch) > 1 and self._deadlines.most_urgent(now, self._times.expect(batch[0].kind, len(batch))):
            batch = batch[:-1]
        return batch

    def choose_ahead(self, stage: Stage) -> list[ImageTask]:
        """The first task in order whose next call is of this stage, though it is not its turn; none if that is far."""
        with closing(self._in_order()) as tasks:
            return next(([task] for task in tasks if task.kind.stage is stage), [])

    def _in_order(self) -> Generator[ImageTask]:
        """The first tasks that can run. Each is taken out for the next to come to light, until this is closed."""
        looked: list[ImageTask] = []
        try:
            while len(looked) < _LOOK and (caller := self._turns.first()):
                task = caller.queue.first()
                assert task is not None
                looked.append(task)
                yield task
                caller.queue.drop(task)
                self._place(caller)
        finally:
            for task in looked:
                self._rank(task)

    def holds_until(self, now: float) -> float:
        """Until when calls of the task chosen now may begin before the choice may change, if nothing comes or goes."""
        first = self._first(now)
        if first is None:
            return math.inf
        step = self._times.expect(first.kind)
        return now if self._deadlines.most_urgent(now, step) else self._deadlines.latest_start - step

    def record_call(self, tasks: Sequence[ImageTask], seconds: float, calls: int = 1) -> None:
        """The next call of these tasks has been made, in one call together that took so many seconds of the device.

        `calls` counts such calls if more than one of the same kind was made in a row, `seconds` is their sum then. A
        task that has been removed meanwhile is passed over.
        """
        self._times.record(tasks[0].kind, seconds / calls, len(tasks))
        for task in tasks:
            kind, count = task.calls[0]
            task.calls[:1] = [(kind, count - calls)] if count > calls else []
            task._put_off *= count > calls
            task.used += seconds / len(tasks)
            self._changed(task)

    def replan(self, task: ImageTask, calls: list[tuple[Kind, int]]) -> None:
        """The calls that the task has still to make are others than was thought."""
        task.calls = calls
        self._changed(task)

    def hold(self, task: ImageTask, ahead: bool = False) -> None:
        """The task's next call is made beside those of others, or waits for that: it is not to be chosen.

        With `ahead` its turn has not come.
        """
        task._held, task._ahead = True, ahead
        self._changed(task)

    def resume(self, task: ImageTask) -> None:
        """The task can be chosen again."""
        task._held = task._ahead = False
        self._changed(task)

    # When it ends.

    def forecasts(self, now: float) -> Iterator[Forecast]:
        """All tasks in the order in which they will end, by what is known now.

        The order is played to its end, which costs O(n log n) for n tasks. Each time is then put off by the work that
        will still come and go first, if as much of each handicap comes as did lately.
        """
        for position, (task, wait) in enumerate(self._simulated_order(now)):
            yield Forecast(task, position, self._eta(task, wait, now))

    def forecast(self, task: ImageTask, now: float) -> Forecast:
        """When one task will end. Cheap for one that runs. Raises KeyError if the task is not here."""
        if task not in self._tasks:
            raise KeyError(task)
        if (task._held and not task._ahead) or task is self._first(now):
            return Forecast(task, 0, self._eta(task, 0.0, now))
        return next(forecast for forecast in self.forecasts(now) if forecast.task is task)

    def _eta(self, task: ImageTask, wait: float, now: float) -> float:
        """Seconds until the end of a task that would have `wait` seconds to wait if nothing came any more."""
        if not task.calls:  # whatever comes, nothing can go before it any more
            return 0.0
        arrivals = self._arrivals.rates(now, self._patience, self._grain)
        rank = task.admitted + task.handicap
        start = arrivals.finish_with_arrivals(now, wait, rank)
        # As it runs its handicap falls to nothing, by one patience on average.
        end = arrivals.finish_with_arrivals(start, task.remaining, rank - self._patience)
        if self._deadlines.holds(task):
            end = min(end, max(now + wait + task.remaining, task.deadline))
        return end - now

    def _simulated_order(self, now: float) -> Iterator[tuple[ImageTask, float]]:
        """Each task in order, with the seconds that it would wait if nothing came any more."""
        own: dict[_Caller, list[tuple[float, int, ImageTask]]] = {}
        for task, caller in self._tasks.items():
            own.setdefault(caller, []).append((task.admitted + task.handicap, task._number, task))
        turns: list[tuple[float, int, ImageTask, float, _Caller]] = []

        def next_turn(caller: _Caller, turn: float) -> None:
            if own[caller]:
                _, number, task = own[caller].pop()
                heapq.heappush(turns, (_turn_rank(task, turn), number, task, turn, caller))

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
                    deadlines.drop(urgent)
                    done.add(urgent)
                    yield urgent, end - now
                    end += urgent.remaining
                deadlines.drop(task)
                yield task, end - now
                end += task.remaining
            next_turn(caller, end if self._takes_turns(len(own[caller])) else turn)

    # Inside.

    def _first(self, now: float) -> ImageTask | None:
        self._follow_times()
        if (caller := self._turns.first()) is None:
            return None
        task = caller.queue.first()
        assert task is not None
        return self._deadlines.most_urgent(now, self._times.expect(task.kind)) or task

    def _changed(self, task: ImageTask) -> None:
        """Its calls have become others, or it can or cannot run."""
        if task in self._tasks:
            self._expect(task)
            self._deadlines.update(task)
            self._rank(task)

    def _expect(self, task: ImageTask) -> None:
        before = task.remaining
        task.remaining = self._seconds(task)
        self._work = max(0.0, self._work + task.remaining - before)

    def _seconds(self, task: ImageTask) -> float:
        return sum(count * self._times.expect(kind) for kind, count in task.calls)

    def _rank(self, task: ImageTask) -> None:
        """Put the task into its caller's order, and the caller into that of the callers."""
        caller = self._tasks[task]
        if task._held or not task.calls:
            caller.queue.drop(task)
        else:
            task._free_handicap = _handicap(_length(task), self._patience, self._grain)
            task.handicap = min(task._free_handicap, task._ceiling)
            caller.queue.put(task, task.admitted + task.handicap, task._number)
        self._place(caller)

    def _place(self, caller: "_Caller") -> None:
        if (task := caller.queue.first()) is None:
            self._turns.drop(caller)
        else:
            self._turns.put(caller, _turn_rank(task, caller.turn), task._number)

    def _takes_turns(self, tasks: int) -> bool:
        """Whether a caller with so many tasks left has to wait for its turn after one has left."""
        return tasks >= _MANY and not self._first_come

    def _follow_times(self) -> None:
        """Reckon anew when calls have turned out to cost notably more or less: rare, and O(n)."""
        if self._version != self._times.version:
            self._version = self._times.version
            for task in self._tasks:
                self._changed(task)
        self._deadlines.set_safety_factor(_SAFETY_FACTOR + _SAFETY_PER_DEVIATION * self._times.deviation)

    def _follow_load(self, task: ImageTask) -> None:
        """Let patience follow the load with each arrival; rank all anew when it has changed notably: rare, and O(n).

        Of a caller with many jobs only so many are thought to be ahead, lest they alone make everybody patient.
        """
        if self._first_come:
            return
        latency = self._mean_latency.add(self._work * self._counted / len(self._tasks))
        size = self._mean_size.add(task.remaining)
        if abs(_PATIENCE * latency - self._patience) > _NOTABLE * self._patience:
            self._patience = _PATIENCE * latency
            self._grain = max(_GRAIN * size, 1e-9)
            for each in self._tasks:
                self._rank(each)

    def _until_free(self, reason: Reason, caller: str, excess: float, now: float) -> float:
        """Seconds until so many jobs, pixels or bytes are free."""
        for task, _, eta in self.forecasts(now):
            excess -= {
                Reason.JOBS: 1,
                Reason.JOBS_OF_CALLER: task.caller == caller,
                Reason.PIXELS: task.pixels,
                Reason.BYTES: task.bytes,
            }[reason]
            if excess <= 0:
                return eta
        return math.inf


def _length(task: ImageTask) -> float:
    """What is left of the task in seconds, as its priority has it."""
    return task.remaining * _PRIORITY**-task.priority


def _handicap(length: float, patience: float, grain: float) -> float:
    return patience * math.log1p(length / grain)


def _turn_rank(task: ImageTask, turn: float) -> float:
    """The rank of a task between callers. The bound on its handicap holds from its arrival, not from a later turn."""
    return turn + task._free_handicap if turn > task.admitted else task.admitted + task.handicap


@dataclass(eq=False)
class _Caller:
    """One who asks. Its jobs count as come at `turn` at the earliest; `queue` has those of its `tasks` that can run."""

    turn: float
    tasks: int = 0
    queue: "_Queue[ImageTask]" = field(default_factory=lambda: _Queue())


_Item = TypeVar("_Item", bound=Hashable)


class _Queue(Generic[_Item]):
    """Items by key, least first. A changed item leaves its old entry in the heap until it surfaces or most are old."""

    __slots__ = ("_changes", "_heap", "_live")

    def __init__(self) -> None:
        self._changes = 0
        self._heap: list[tuple[float, int, int, _Item]] = []
        self._live: dict[_Item, tuple[float, int, int, _Item]] = {}

    def put(self, item: _Item, key: float, number: int) -> None:
        """Add an item, or give it another key. Equal keys go by number."""
        before = self._live.get(item)
        self._changes += 1
        entry = self._live[item] = (key, number, self._changes, item)
        heap = self._heap
        if before is not None and heap[0] is before and entry[:2] <= before[:2]:
            heap[0] = entry  # as at nearly every call: the task that runs was first already, and has less left
            return
        heapq.heappush(heap, entry)
        if len(heap) > 2 * len(self._live) + 8:
            self._heap = list(self._live.values())
            heapq.heapify(self._heap)

    def drop(self, item: _Item) -> None:
        """Take an item out, if it is in."""
        self._live.pop(item, None)

    def first(self) -> _Item | None:
        """The item with the least key."""
        heap, live = self._heap, self._live
        while heap and live.get(heap[0][3]) is not heap[0]:
            heapq.heappop(heap)
        return heap[0][3] if heap else None


class DeadlineSet:
    """The tasks with deadlines that can still all be met, earliest first.

    `latest_start` is when the first of them must run lest one be late, or an earlier time. It is reckoned exactly only
    when it may have come, since running tasks can only put it off.
    """

    def __init__(self) -> None:
        self._tasks: list[ImageTask] = []
        self._keys: list[tuple[float, int]] = []
        self._deadlines = np.empty(0)
        self._remaining = np.empty(0)
        self._exact = True
        self.latest_start = math.inf
        self.safety_factor = _SAFETY_FACTOR

    def copy(self) -> "DeadlineSet":
        other = DeadlineSet()
        other._tasks, other._keys = self._tasks.copy(), self._keys.copy()
        other._deadlines, other._remaining = self._deadlines.copy(), self._remaining.copy()
        other._exact, other.latest_start, other.safety_factor = self._exact, self.latest_start, self.safety_factor
        return other

    def holds(self, task: ImageTask) -> bool:
        return self._find(task) is not None

    def add(self, task: ImageTask) -> None:
        key = (task.deadline, task._number)
        place = bisect_left(self._keys, key)
        self._keys.insert(place, key)
        self._tasks.insert(place, task)
        self._deadlines = np.insert(self._deadlines, place, task.deadline)
        self._remaining = np.insert(self._remaining, place, task.remaining)
        self._exact, self.latest_start = False, -math.inf

    def drop(self, task: ImageTask) -> None:
        """The task has no claim (any more)."""
        if (place := self._find(task)) is not None:
            del self._keys[place], self._tasks[place]
            self._deadlines = np.delete(self._deadlines, place)
            self._remaining = np.delete(self._remaining, place)
            self._exact = False
            if not self._tasks:
                self._exact, self.latest_start = True, math.inf

    def update(self, task: ImageTask) -> None:
        """Its remaining time has changed."""
        if (place := self._find(task)) is not None:
            if task.remaining > self._remaining[place]:
                self.latest_start = -math.inf
            self._remaining[place] = task.remaining
            self._exact = False

    def set_safety_factor(self, safety_factor: float) -> None:
        """From now on take the work to need so many times what is expected; small changes wait for larger ones."""
        if abs(safety_factor - self.safety_factor) > _NOTABLE_FACTOR:
            self.safety_factor = safety_factor
            if self._tasks:
                self._exact, self.latest_start = False, -math.inf

    def most_urgent(self, now: float, step: float) -> ImageTask | None:
        """The task with the earliest deadline, if another's call of `step` seconds would make any late.

        Tasks lose their deadlines here if not all can be met.
        """
        while now + step > self.latest_start:
            needed = self._remaining.cumsum()
            if not self._exact:
                self._exact, self.latest_start = True, float((self._deadlines - self.safety_factor * needed).min())
                if now + step <= self.latest_start:
                    break
            late = self._deadlines < now + needed
            if not late.any():
                return next((task for task in self._tasks if task.calls and not task._held), None)
            self.drop(self._tasks[int(self._remaining[: int(late.argmax()) + 1].argmax())])
        return None

    def impact(self, deadline: float, seconds: float, now: float) -> tuple[float, tuple[ImageTask, ...]]:
        """Seconds of work with earlier deadlines, and the tasks with later ones that so much more would make late."""
        place = bisect_right(self._keys, (deadline, math.inf))
        needed = now + np.cumsum(self._remaining)
        ahead = float(needed[place - 1]) - now if place else 0.0
        slack = self._deadlines[place:] - needed[place:]
        late = np.flatnonzero((slack >= 0) & (slack < seconds))
        return ahead, tuple(self._tasks[place + int(each)] for each in late)

    def _find(self, task: ImageTask) -> int | None:
        place = bisect_left(self._keys, (task.deadline, task._number))
        return place if place < len(self._tasks) and self._tasks[place] is task else None


class _Arrivals:
    """What came lately: how much work, of which lengths."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=_RECENT)
        self._fresh = 0
        self._ranked = (0.0, 1.0)
        self._rates = _Rates([], 1.0)

    def add(self, now: float, seconds: float, length: float) -> None:
        self._recent.append((now, seconds, length))
        self._fresh += 1

    def rates(self, now: float, patience: float, grain: float) -> "_Rates":
        """With the handicaps that the like of what came would get now, not those of a time with another load."""
        stale = self._fresh >= len(self._recent) // 50 or self._ranked != (patience, grain)
        if len(self._recent) >= _FEW and stale and now > self._recent[0][0]:
            self._fresh, self._ranked = 0, (patience, grain)
            came = sorted((_handicap(length, patience, grain), seconds) for _, seconds, length in self._recent)
            self._rates = _Rates(came, now - self._recent[0][0])
        return self._rates


class _Rates:
    """The work that arrives each second, by handicap, from the (handicap, size) of all that arrived in a time span."""

    def __init__(self, arrivals: list[tuple[float, float]], span: float) -> None:
        self._handicaps = [handicap for handicap, _ in arrivals]
        self._rate = [0.0, *itertools.accumulate(size / span for _, size in arrivals)]
        self._moment = [0.0, *itertools.accumulate(size / span * handicap for handicap, size in arrivals)]

    def finish_with_arrivals(self, begin: float, seconds: float, rank: float) -> float:
        """When something ends that would take so many seconds from `begin` if nothing came any more.

        What comes at t with a handicap h goes first while t + h < rank, until the end. The end solves
        end = begin + seconds + (work that came until then), a concave function of it: Newton's method from above.
        """
        if rank <= begin:
            return begin + seconds
        room = rank - begin
        before_rank = bisect_left(self._handicaps, room)
        longest = seconds + self._rate[before_rank] * room - self._moment[before_rank]
        for _ in range(20):
            flowing = bisect_left(self._handicaps, room - longest)  # those that still come at the end
            rate = self._rate[flowing]
            if rate >= 1:
                break
            ebbed = (self._rate[before_rank] - rate) * room - (self._moment[before_rank] - self._moment[flowing])
            previous, longest = longest, (seconds + ebbed) / (1 - rate)
            if previous - longest <= 1e-3 * previous:
                break
        return begin + longest


class _Mean:
    """The mean of the last values, each of which counts the less the longer ago."""

    def __init__(self) -> None:
        self._count = 0
        self._value = 0.0

    def add(self, value: float) -> float:
        self._count = min(self._count + 1, _MEMORY)
        self._value += (value - self._value) / self._count
        return self._value
