"""The recent arrivals, and how much later a task ends because similar ones will arrive and overtake it."""

import itertools
import math
from bisect import bisect_left
from collections import deque

_FEW = 20  # with fewer arrivals no rate is estimated
_RECENT = 300  # arrivals from which the rates are estimated
_NEWTON_STEPS = 20


def handicap(length: float, patience: float, grain: float) -> float:
    """Return the offset of a task's rank from its admission in seconds; `length` is its remaining work in seconds."""
    return patience * math.log1p(length / grain)


class Arrivals:
    """The size and the length of recent arrivals."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=_RECENT)
        self._fresh = 0
        self._ranked = (0.0, 1.0)
        self._rates = Rates([], 1.0)

    def add(self, now: float, seconds: float, length: float) -> None:
        """Record a task by its device seconds; its priority makes its `length` differ from them."""
        self._recent.append((now, seconds, length))
        self._fresh += 1

    def rates(self, now: float, patience: float, grain: float) -> "Rates":
        """Return the rates of arrival, with the handicaps that the recent tasks would get under the current load."""
        stale = self._fresh >= len(self._recent) // 50 or self._ranked != (patience, grain)
        if len(self._recent) >= _FEW and stale and now > self._recent[0][0]:
            self._fresh, self._ranked = 0, (patience, grain)
            came = sorted((handicap(length, patience, grain), seconds) for _, seconds, length in self._recent)
            self._rates = Rates(came, now - self._recent[0][0])
        return self._rates


class Rates:
    """The work that arrives per second, by handicap, from the (handicap, size) of all arrivals in a time span."""

    def __init__(self, arrivals: list[tuple[float, float]], span: float) -> None:
        self._handicaps = [handicap for handicap, _ in arrivals]
        self._rate = [0.0, *itertools.accumulate(size / span for _, size in arrivals)]
        self._moment = [0.0, *itertools.accumulate(size / span * handicap for handicap, size in arrivals)]

    def finish_with_arrivals(self, begin: float, seconds: float, rank: float) -> float:
        """Return the end of work that takes `seconds` from `begin` without further arrivals.

        An arrival at time t with handicap h goes first while t + h < rank, until the end. The end solves
        end = begin + seconds + (work that arrives until then and goes first), a concave function of the end. Newton's
        method finds it from above.
        """
        if rank <= begin:
            return begin + seconds
        room = rank - begin
        before_rank = bisect_left(self._handicaps, room)
        longest = seconds + self._rate[before_rank] * room - self._moment[before_rank]
        for _ in range(_NEWTON_STEPS):
            flowing = bisect_left(self._handicaps, room - longest)  # arrivals up to this handicap go first to the end
            rate = self._rate[flowing]
            if rate >= 1:
                break
            ebbed = (self._rate[before_rank] - rate) * room - (self._moment[before_rank] - self._moment[flowing])
            previous, longest = longest, (seconds + ebbed) / (1 - rate)
            if previous - longest <= 1e-3 * previous:
                break
        return begin + longest
