"""Counters of what the engine has done since its start."""

import math
from collections import Counter, deque
from dataclasses import dataclass, field
from statistics import median

from server.engine.events import Failed, Finished
from server.engine.job import Job

_ETA_ERRORS = 1000  # finished jobs over which the error of predictions is taken


@dataclass
class Statistics:
    """A snapshot of an engine's counters.

    Of the admitted jobs, `waiting` have not had their first call and `running` have. `device` is the device
    time in seconds, `after_cancel` the part of it after the cancellation of its job; calls that ran at the same time
    count in full. `eta_error` is the median over the last thousand finished jobs of the error of the predicted end,
    relative to the time that the job took. Jobs without a prediction, such as the first one, are left out.
    """

    waiting: int = 0
    running: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    device: float = 0.0
    after_cancel: float = 0.0
    eta_error: float = math.nan


class Totals:
    """The running totals behind `Statistics`. Not locked by itself."""

    def __init__(self) -> None:
        self.device_seconds = 0.0
        self._seconds_after_cancel = 0.0
        self._outcomes: Counter[str] = Counter()
        self._eta_errors: deque[float] = deque(maxlen=_ETA_ERRORS)

    def record_end(self, job: Job, terminal: Finished | Failed, now: float) -> str:
        """Count a job that ends now and return its outcome: "finished" or the class name of its error."""
        outcome = "finished" if isinstance(terminal, Finished) else type(terminal.error).__name__
        self._outcomes[outcome] += 1
        self._seconds_after_cancel += job.seconds_after_cancel
        took = now - job.task.admitted
        if isinstance(terminal, Finished) and took > 0 and job.has_prediction:
            self._eta_errors.append(abs(job.predicted_end - now) / took)
        return outcome

    def snapshot(self, waiting: int, running: int) -> Statistics:
        """Return the totals, with the numbers of jobs that wait and run now."""
        return Statistics(
            waiting=waiting,
            running=running,
            outcomes=self._outcomes.copy(),
            device=self.device_seconds,
            after_cancel=self._seconds_after_cancel,
            eta_error=median(self._eta_errors) if self._eta_errors else math.nan,
        )
