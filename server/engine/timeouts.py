"""The jobs that have a deadline, earliest first."""

import heapq
import itertools
import math
from collections.abc import Callable, Iterator

from server.engine.job import Job


class Timeouts:
    """A heap of jobs by deadline. Jobs that end earlier stay in it until they are the majority."""

    def __init__(self, is_active: Callable[[Job], bool]) -> None:
        self._is_active = is_active
        self._heap: list[tuple[float, int, Job]] = []
        self._numbers = itertools.count()

    def add(self, job: Job) -> None:
        """Add a job, if it has a deadline."""
        if job.task.deadline < math.inf:
            heapq.heappush(self._heap, (job.task.deadline, next(self._numbers), job))

    def expired(self, now: float) -> Iterator[Job]:
        """Remove and yield the jobs whose deadline has passed."""
        while self._heap and self._heap[0][0] <= now:
            yield heapq.heappop(self._heap)[2]

    def prune(self, active_jobs: int) -> None:
        """Let go of jobs that have ended, if they are the majority."""
        if len(self._heap) > 2 * active_jobs + 8:
            self._heap = [each for each in self._heap if self._is_active(each[2])]
            heapq.heapify(self._heap)
