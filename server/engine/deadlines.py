"""The deadlines that can still be met, and when a task must run to meet its own.

DeadlineSet computes the impact of another task on the others. Schedule.rejection decides whether that task is admitted.
"""

import math
from bisect import bisect_left, bisect_right

import numpy as np

from server.engine.task import ImageTask

# The safety factor is the time that work with a deadline is assumed to need, relative to the expected time: this much,
# plus a share for each unit of the recent relative deviation of calls. In simulation it meets nearly all deadlines that
# can be met.
_SAFETY_FACTOR, _SAFETY_PER_DEVIATION = 1.02, 1.3
_NOTABLE_CHANGE = 0.01  # smaller changes of the safety factor are ignored


class DeadlineSet:
    """The tasks whose deadlines can all still be met, earliest deadline first.

    `latest_start` is the time at which the first of them must run to meet all deadlines, or an earlier time. It is
    computed exactly only when the lower bound has been reached, because running these tasks only makes it later.
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
        """Return an independent set of the same tasks."""
        other = DeadlineSet()
        other._tasks, other._keys = self._tasks.copy(), self._keys.copy()
        other._deadlines, other._remaining = self._deadlines.copy(), self._remaining.copy()
        other._exact, other.latest_start, other.safety_factor = self._exact, self.latest_start, self.safety_factor
        return other

    def __contains__(self, task: ImageTask) -> bool:
        return self._find(task) is not None

    def add(self, task: ImageTask) -> None:
        """Add a task with a finite deadline."""
        key = (task.deadline, task.number)
        place = bisect_left(self._keys, key)
        self._keys.insert(place, key)
        self._tasks.insert(place, task)
        self._deadlines = np.insert(self._deadlines, place, task.deadline)
        self._remaining = np.insert(self._remaining, place, task.remaining)
        self._exact, self.latest_start = False, -math.inf

    def discard(self, task: ImageTask) -> None:
        """Remove a task, if it is in the set."""
        if (place := self._find(task)) is not None:
            del self._keys[place], self._tasks[place]
            self._deadlines = np.delete(self._deadlines, place)
            self._remaining = np.delete(self._remaining, place)
            self._exact = False
            if not self._tasks:
                self._exact, self.latest_start = True, math.inf

    def update(self, task: ImageTask) -> None:
        """Take over the task's remaining time, if it is in the set."""
        if (place := self._find(task)) is not None:
            if task.remaining > self._remaining[place]:
                self.latest_start = -math.inf
            self._remaining[place] = task.remaining
            self._exact = False

    def set_safety_factor(self, deviation: float) -> None:
        """Adapt the safety factor to the recent relative deviation of calls, if that changes it notably."""
        safety_factor = _SAFETY_FACTOR + _SAFETY_PER_DEVIATION * deviation
        if abs(safety_factor - self.safety_factor) > _NOTABLE_CHANGE:
            self.safety_factor = safety_factor
            if self._tasks:
                self._exact, self.latest_start = False, -math.inf

    def most_urgent(self, now: float, step: float) -> ImageTask | None:
        """Return the runnable task with the earliest deadline, if a call of `step` seconds would make any task late.

        Drops tasks, the longest first, while not all deadlines can be met (Moore, 1968).
        """
        while now + step > self.latest_start:
            needed = self._remaining.cumsum()
            if not self._exact:
                self._exact, self.latest_start = True, float((self._deadlines - self.safety_factor * needed).min())
                if now + step <= self.latest_start:
                    break
            late = self._deadlines < now + needed
            if not late.any():
                return next((task for task in self._tasks if task.runnable), None)
            self.discard(self._tasks[int(self._remaining[: int(late.argmax()) + 1].argmax())])
        return None

    def impact(self, deadline: float, seconds: float, now: float) -> tuple[float, tuple[ImageTask, ...]]:
        """Return the effect of `seconds` more work with this deadline.

        The first value is the work with earlier deadlines in seconds, the second the tasks with later deadlines that
        would become late.
        """
        place = bisect_right(self._keys, (deadline, math.inf))
        needed = now + np.cumsum(self._remaining)
        ahead = float(needed[place - 1]) - now if place else 0.0
        slack = self._deadlines[place:] - needed[place:]
        late = np.flatnonzero((slack >= 0) & (slack < seconds))
        return ahead, tuple(self._tasks[place + int(each)] for each in late)

    def _find(self, task: ImageTask) -> int | None:
        place = bisect_left(self._keys, (task.deadline, task.number))
        return place if place < len(self._tasks) and self._tasks[place] is task else None
