"""One job as the schedule sees it: the calls that it still needs, and its rank."""

import math
from dataclasses import dataclass, field

from server.engine.call_times import CallKind


@dataclass(eq=False)
class ImageTask:
    """The calls, limits and rank of one job. All times are seconds on the clock of the schedule's user.

    `calls` are the calls still to be made, in order, as runs of one kind: [(encode, 1), (base, 32), (refiner, 8), ...].
    `priority` is 0 for most jobs and negative for jobs that can wait. `jobs_per_caller`, if given, replaces the limit
    of the queue. The schedule sets the other fields: `admitted` is the time of admission, `remaining` the expected
    device time, `used` the device time spent, and `handicap` the offset of the rank from the admission.
    """

    caller: str
    calls: list[tuple[CallKind, int]]
    deadline: float = math.inf
    priority: int = 0
    pixels: int = 0
    bytes: int = 0
    jobs_per_caller: float | None = None
    admitted: float = 0.0
    remaining: float = 0.0
    used: float = 0.0
    handicap: float = 0.0
    number: int = field(default=0, repr=False)  # in the order of admission
    max_handicap: float = field(default=math.inf, repr=False)  # the handicap at admission
    uncapped_handicap: float = field(default=0.0, repr=False)
    held: bool = field(default=False, repr=False)  # cannot be chosen
    held_ahead: bool = field(default=False, repr=False)  # held before its turn has come
    postponements: int = field(default=0, repr=False)  # calls that went first since the next call is of this kind

    @property
    def kind(self) -> CallKind:
        """The kind of the next call."""
        return self.calls[0][0]

    @property
    def runnable(self) -> bool:
        """Whether the task has a next call that can be chosen."""
        return bool(self.calls) and not self.held

    def follows_with(self, kind: CallKind) -> bool:
        """Return whether the next call is of another kind and the one after it of this kind."""
        return len(self.calls) > 1 and self.calls[0][1] == 1 and self.calls[1][0] == kind != self.kind
