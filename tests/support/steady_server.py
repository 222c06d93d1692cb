"""The real server around a model without weights or torch, whose every call takes a fixed time.

STEADY_SECONDS in the environment is the time of a call in seconds, by default 0. An image is of one colour, which its
prompt and seed decide. A prompt with "hang" in it never comes back from the encoders, and "until FILE" when there is
that file; "broken" raises in a step, and the images of "loud" are noise of 1000 pixels a side. The log has a line
"begins: SEED" for each job. A process is ready in a second.
"""

# As in server/__main__.py.

from server import before_imports

if __name__ == "__main__":
    before_imports.exit_on_signals()

import hashlib
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from server import __main__ as program
from server.domain import Environment, ImageRequest, ModelInfo, Stage, Warning
from server.engine.interface import LaunchedStep
from server.settings import Settings

log = logging.getLogger("steady")

ENVIRONMENT = Environment({"steady": "1"}, "none", "fp32", "ieee", 0, 1, "off")
MODEL_INFO = ModelInfo(
    "steady", "0" * 64, True, "cpu", "fp32", ("euler", "dpmpp_2m"), 64, 8, 3, 4.0, 0.7, "euler", ENVIRONMENT
)


@dataclass(frozen=True)
class Prompt:
    """A prompt that is encoded."""

    warnings: tuple[Warning, ...] = ()
    environment: Environment = ENVIRONMENT


@dataclass(frozen=True)
class Image:
    """An image on its way: the base has its share of the steps, the refiner the others."""

    request: ImageRequest
    seed: int
    warnings: tuple[Warning, ...] = ()
    batch_key: str = ""

    @property
    def stages(self) -> tuple[Stage, ...]:
        base = max(1, round(self.request.steps * self.request.high_noise_frac))
        return (Stage.BASE,) * base + (Stage.REFINER,) * (self.request.steps - base)


class SteadyModel:
    """Calls take `seconds` each."""

    overlaps = False

    def __init__(self, seconds: float, max_batch: int) -> None:
        self.info = MODEL_INFO
        self.max_batch = max_batch
        self._seconds = seconds

    def _work(self) -> None:
        """Take the time of a call in steps, so that it is no further after a pause of the process than before it."""
        pause = threading.Event()  # and not time.sleep, which libfaketime breaks
        for _ in range(int(self._seconds / 0.05)):
            pause.wait(0.05)
        pause.wait(self._seconds % 0.05)

    def set_info(self, info: ModelInfo) -> None:
        self.info = info

    def limit_batch(self, images: int) -> None:
        self.max_batch = images

    def encode(self, request: ImageRequest) -> Prompt:
        log.info("begins: %d", request.seeds[0])
        if "hang" in request.prompt:
            threading.Event().wait()
        while request.prompt.startswith("until ") and not Path(request.prompt.removeprefix("until ")).exists():
            time.sleep(0.05)
        self._work()
        return Prompt()

    def plan(self, request: ImageRequest, conditioning: Prompt, seed: int) -> Image:
        return Image(request, seed)

    def launch(self, trajectories: Sequence[Image]) -> LaunchedStep:
        return LaunchedStep(partial(self._step, trajectories))

    def _step(self, trajectories: Sequence[Image]) -> None:
        self._work()
        if any("broken" in each.request.prompt for each in trajectories):
            raise RuntimeError("broken on purpose")

    def preview(self, trajectory: Image) -> np.ndarray:
        return self.decode(trajectory)[::8, ::8]

    def decode(self, trajectory: Image) -> np.ndarray:
        self._work()
        request = trajectory.request
        if "loud" in request.prompt:
            return np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)
        colour = hashlib.sha256(f"{request.prompt}\0{trajectory.seed}".encode()).digest()[:3]
        return np.broadcast_to(np.frombuffer(colour, np.uint8), (request.height, request.width, 3)).copy()


def load(settings: Settings) -> SteadyModel:
    return SteadyModel(float(os.environ.get("STEADY_SECONDS", "0")), settings.max_batch)


if __name__ == "__main__":
    program.load = load
    sys.exit(program.main())
