"""The time of a model call: measured at run time, and extrapolated for kinds that have not been measured."""

import math
from collections import deque
from statistics import median_low
from typing import NamedTuple

from server.domain import EXPERTS, Stage

_MEASUREMENTS = 9  # of which the median counts, so that four outliers have no effect
_NOTABLE_CHANGE = 0.1  # a relative change above this increments `version`
_COMPARED_CALLS = 300  # over which the deviation is averaged


class CallKind(NamedTuple):
    """Calls of one cost: their stage, size in pixels, and rows per job (two with guidance)."""

    stage: Stage
    width: int
    height: int
    rows: int = 1

    @property
    def shared(self) -> bool:
        """Whether several jobs can share one call of this kind."""
        return self.stage in EXPERTS


class CallTimes:
    """Expected seconds per call, by kind.

    The expectation is the lower median of the last few measurements: neither a first call that compiles nor a stall
    counts once there are others. `version` changes whenever an expectation has changed by more than a tenth.
    `deviation` is the mean relative deviation of recent calls from their expectation, each at most 1.
    """

    def __init__(self) -> None:
        self.version = 0
        self.deviation = 0.0
        self._compared = 0
        self._measured: dict[CallKind, deque[float]] = {}
        self._seconds: dict[CallKind, float] = {}
        self._seconds_of_version: dict[CallKind, float] = {}

    def record(self, kind: CallKind, seconds: float, jobs: int = 1) -> None:
        """Record the time of one call that a number of jobs of this kind shared."""
        call = _batched(kind, jobs)
        if expected := self._seconds.get(call):
            self._compared = min(self._compared + 1, _COMPARED_CALLS)
            self.deviation += (min(1.0, abs(seconds / expected - 1)) - self.deviation) / self._compared
        measured = self._measured.setdefault(call, deque(maxlen=_MEASUREMENTS))
        measured.append(seconds)
        now = self._seconds[call] = median_low(measured)
        before = self._seconds_of_version.get(call)
        if before is None or abs(now - before) > _NOTABLE_CHANGE * before:
            self._seconds_of_version[call] = now
            self.version += 1

    def expect(self, kind: CallKind, jobs: int = 1) -> float:
        """Return the expected seconds of one call that a number of jobs of this kind share.

        A kind that was never measured is scaled, by pixels and rows, from the nearest measured size of the same stage,
        or else of the other expert. The result is 0 before there is a measurement.
        """
        call = _batched(kind, jobs)
        seconds = self._seconds.get(call)
        return self._scaled_from_nearest(call) if seconds is None else seconds

    def _scaled_from_nearest(self, call: CallKind) -> float:
        size = _size(call)
        for stages in ((call.stage,), EXPERTS if call.stage in EXPERTS else ()):  # similar U-Nets take similar times
            known = [(abs(math.log(_size(each) / size)), each) for each in self._seconds if each.stage in stages]
            if known:
                nearest = min(known)[1]
                return self._seconds[nearest] * size / _size(nearest)
        return 0.0


def _batched(kind: CallKind, jobs: int) -> CallKind:
    return kind if jobs == 1 else kind._replace(rows=kind.rows * jobs)


def _size(call: CallKind) -> int:
    return call.width * call.height * call.rows
