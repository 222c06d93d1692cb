"""Timeouts in seconds, and the deadline that all calls of one request share."""

import math
from dataclasses import dataclass
from numbers import Real

import grpc

from ._exceptions import TIMEOUT_MESSAGE, DeadlineExceeded

_LONGEST_TIMEOUT = 1e8  # seconds, three years; gRPC's clocks overflow in some centuries, which ends a call at once


def check_timeout(timeout: float | None) -> float | None:
    """Return `timeout` in seconds, or None if it never passes: None, infinity, or more than three years.

    Raises TypeError for a value that is no number, ValueError for NaN.
    """
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, Real):
        raise TypeError(f"timeout must be a number of seconds, or None, not {timeout!r}")
    if timeout > _LONGEST_TIMEOUT:
        return None
    if math.isnan(timeout):
        raise ValueError("timeout must be a number of seconds, or None, not nan")
    return float(max(timeout, 0))


@dataclass(frozen=True)
class Deadline:
    """The time by which a request must be answered, on the caller's monotonic clock; None for never."""

    at: float | None

    @classmethod
    def after(cls, timeout: float | None, now: float) -> "Deadline":
        """Return the deadline that is `timeout` seconds after `now`."""
        return cls(None if timeout is None else now + timeout)

    def left(self, now: float) -> float | None:
        """Return the seconds left for another call, None without a deadline. Raises DeadlineExceeded if none are."""
        if self.at is None:
            return None
        if self.at <= now:
            raise DeadlineExceeded(TIMEOUT_MESSAGE, grpc.StatusCode.DEADLINE_EXCEEDED)
        return self.at - now

    def within(self, seconds: float, now: float) -> "Deadline":
        """Return this deadline, or the one `seconds` after `now` if that is earlier."""
        return Deadline(now + seconds if self.at is None else min(self.at, now + seconds))
