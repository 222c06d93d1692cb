"""What a call of the model costs: measured while it runs, extrapolated for what never ran."""

import math
from collections import deque
from statistics import median_low
from typing import NamedTuple

from server.domain import Stage

_EXPERTS = (Stage.BASE, Stage.REFINER)  # of one make: the cost of one is a fair guess at that of the other
_KEPT = 9  # measurements of which the median counts: four outliers do not move it
_NOTABLE = 0.1  # a change by more than this share makes a new `version`
_COMPARED = 300  # calls over which their deviation is taken


class Kind(NamedTuple):
    """Calls of one cost: an expert, a shape in pixels, and the rows that one job brings (two with guidance)."""

    stage: Stage
    width: int
    height: int
    rows: int = 1

    @property
    def shared(self) -> bool:
        """Whether several jobs' calls of this kind can be made as one."""
        return self.stage in _EXPERTS


class CallTimes:
    """Seconds per call, by expert, shape and rows.

    The lower median of the last few measurements is taken: neither a first call that compiles nor a stall counts once
    there are others.
    `version` changes whenever an expectation has changed by more than a tenth. `deviation` is how far calls were lately
    from what was expected of them, the mean as a share of that, of each at most 1.
    """

    def __init__(self) -> None:
        self.version = 0
        self.deviation = 0.0
        self._compared = 0
        self._measured: dict[Kind, deque[float]] = {}
        self._seconds: dict[Kind, float] = {}
        self._told: dict[Kind, float] = {}

    def record(self, kind: Kind, seconds: float, jobs: int = 1) -> None:
        """One call for so many jobs of a kind took so long."""
        call = _together(kind, jobs)
        if expected := self._seconds.get(call):
            self._compared = min(self._compared + 1, _COMPARED)
            self.deviation += (min(1.0, abs(seconds / expected - 1)) - self.deviation) / self._compared
        measured = self._measured.setdefault(call, deque(maxlen=_KEPT))
        measured.append(seconds)
        now = self._seconds[call] = median_low(measured)
        told = self._told.get(call)
        if told is None or abs(now - told) > _NOTABLE * told:
            self._told[call] = now
            self.version += 1

    def expect(self, kind: Kind, jobs: int = 1) -> float:
        """Expected seconds of one call for so many jobs of a kind.

        What was never measured is taken from the nearest measured size, by pixels and rows, of the same stage, or else
        of the other expert, and scaled. 0 before there is any.
        """
        call = _together(kind, jobs)
        seconds = self._seconds.get(call)
        return self._nearest(call) if seconds is None else seconds

    def _nearest(self, call: Kind) -> float:
        size = _size(call)
        for stages in ((call.stage,), _EXPERTS if call.stage in _EXPERTS else ()):
            known = [(abs(math.log(_size(each) / size)), each) for each in self._seconds if each.stage in stages]
            if known:
                nearest = min(known)[1]
                return self._seconds[nearest] * size / _size(nearest)
        return 0.0


def _together(kind: Kind, jobs: int) -> Kind:
    return kind if jobs == 1 else kind._replace(rows=kind.rows * jobs)


def _size(call: Kind) -> int:
    return call.width * call.height * call.rows
