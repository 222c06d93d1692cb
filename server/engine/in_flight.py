"""The calls of the model that are in flight, and those that wait for the side thread."""

import math
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from server.engine.job import Job


class CallsInFlight:
    """The calls that the device thread and the side thread have begun and not ended. Not locked by itself."""

    def __init__(self) -> None:
        self._began: dict[int, float] = {}  # by thread
        self._jobs: dict[int, Sequence[Job]] = {}  # by thread
        self._overlapped: set[int] = set()  # threads whose call ran at the same time as another

    @property
    def jobs(self) -> set[Job]:
        """The jobs of all calls in flight."""
        return {job for jobs in self._jobs.values() for job in jobs}

    @property
    def overlapped(self) -> bool:
        """Whether this thread's call has run at the same time as another."""
        return threading.get_ident() in self._overlapped

    def begin(self, jobs: Sequence[Job], now: float) -> None:
        """Record that this thread begins a call for these jobs."""
        thread = threading.get_ident()
        if self._began:
            self._overlapped |= {thread, *self._began}
        self._began[thread] = now
        self._jobs[thread] = jobs

    def repeat_alone(self) -> None:
        """Record that this thread repeats its call, now without another at the same time."""
        self._overlapped.discard(threading.get_ident())

    def end(self) -> None:
        """Record that this thread's call, if one is in flight, has ended."""
        thread = threading.get_ident()
        self._began.pop(thread, None)
        self._jobs.pop(thread, None)
        self._overlapped.discard(thread)

    def longest(self, now: float) -> float:
        """Return the seconds since the earliest call in flight began; 0 if there is none."""
        return max((now - began for began in self._began.values()), default=0.0)


_MAX_WAITING = 2  # calls: enough that the side thread is not idle, and that few finished latents wait


@dataclass
class SideQueue:
    """The jobs whose next call the side thread makes. Not locked by itself.

    It accepts calls from time `accepts_from` on. `running` is the job whose call is in flight there. `encoded_ahead`
    are jobs that were given to it for their prompt and have not begun their first step.
    """

    accepts_from: float = math.inf
    waiting: deque[Job] = field(default_factory=deque)
    running: Job | None = None
    encoded_ahead: set[Job] = field(default_factory=set)

    def accepts(self, now: float) -> bool:
        """Return whether calls may run on the side thread now."""
        return now >= self.accepts_from

    @property
    def full(self) -> bool:
        """Whether enough calls wait."""
        return len(self.waiting) >= _MAX_WAITING

    def discard(self, job: Job) -> None:
        """Remove a job that waits, if it does."""
        if job in self.waiting:
            self.waiting.remove(job)
