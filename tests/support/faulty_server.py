"""The real server around the real model, which does as a failing device does when a prompt says so.

"hang" never comes back from the text encoders and "slow" after eight seconds, "no memory" has none for the networks,
"broken" raises inside a step. "loud" is no fault: its images are noise, four times as wide and high.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from server import __main__ as program
from server.domain import ImageRequest, OutOfMemory, StepFailed
from server.engine.interface import AnyServedModel, LaunchedStep
from server.settings import Settings


class Faulty:
    """An ensemble with faults on demand; all else is the ensemble's own."""

    def __init__(self, ensemble: Any) -> None:
        self._ensemble = ensemble
        self._prompts: dict[int, str] = {}  # by trajectory

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ensemble, name)

    def encode(self, request: ImageRequest) -> Any:
        if "hang" in request.prompt:
            threading.Event().wait()
        if "slow" in request.prompt:
            threading.Event().wait(8)
        return self._ensemble.encode(request)

    def plan(self, request: ImageRequest, conditioning: Any, seed: int) -> Any:
        trajectory = self._ensemble.plan(request, conditioning, seed)
        self._prompts[id(trajectory)] = request.prompt
        return trajectory

    def launch(self, trajectories: Sequence[Any]) -> LaunchedStep:
        prompts = [self._prompts[id(each)] for each in trajectories]
        if any("no memory" in prompt for prompt in prompts):
            raise OutOfMemory("tried to allocate 80.00 GiB")
        broken = {
            place: RuntimeError("broken on purpose") for place, prompt in enumerate(prompts) if "broken" in prompt
        }
        healthy = [each for place, each in enumerate(trajectories) if place not in broken]
        launched = self._ensemble.launch(healthy) if healthy else None

        def wait() -> None:
            if launched is not None:
                launched.wait()
            if broken:
                raise StepFailed(broken)

        return LaunchedStep(wait)

    def decode(self, trajectory: Any) -> Any:
        pixels = self._ensemble.decode(trajectory)
        if "loud" in self._prompts[id(trajectory)]:
            height, width, _ = pixels.shape
            return np.random.default_rng(0).integers(0, 256, (4 * height, 4 * width, 3), np.uint8)
        return pixels


def _faulty(load: Callable[[Settings], AnyServedModel]) -> Callable[[Settings], Any]:
    return lambda settings: Faulty(load(settings))


if __name__ == "__main__":
    program.load = _faulty(program.load)
    sys.exit(program.main())
