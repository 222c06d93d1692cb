"""The real server around a model without weights whose calls take a fixed time, so that it starts in a second or two.

STEADY_SECONDS is the time of each call (default: 0). A prompt with "hang" in it never comes back from the encoders.
"""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from stepped_model import CARD, Path, Prompt

from server import __main__ as program
from server.domain import ImageRequest

SECONDS = float(os.environ.get("STEADY_SECONDS", "0"))
SLICE = 0.05


class SteadyModel:
    """Two calls of the base, one of the refiner, and a grey image."""

    max_batch = 1
    overlaps = False

    def __init__(self) -> None:
        self.card = replace(CARD, name="steady", native_side=64)
        self._sizes: dict[int, tuple[int, int]] = {}

    def encode(self, request: ImageRequest) -> Prompt:
        if "hang" in request.prompt:
            threading.Event().wait()
        self._wait()
        return Prompt()

    def plan(self, request: ImageRequest, conditioning: Prompt, seed: int) -> Path:
        self._sizes[seed] = request.height, request.width
        return Path(seed)

    def step(self, trajectories: Sequence[Path], meanwhile: Callable[[], None]) -> None:
        meanwhile()
        self._wait()

    def limit_batch(self, images: int) -> None:
        pass

    def preview(self, trajectory: Path) -> np.ndarray:
        return np.full((1, 1, 3), 128, np.uint8)

    def decode(self, trajectory: Path) -> np.ndarray:
        self._wait()
        return np.full((*self._sizes[trajectory.seed], 3), 128, np.uint8)

    def _wait(self) -> None:
        """As work does: no further after a pause of the process than before it."""
        left = SECONDS
        while left > 0:
            threading.Event().wait(min(left, SLICE))
            left -= SLICE


if __name__ == "__main__":
    program.load = lambda settings: SteadyModel()
    sys.exit(program.main())
