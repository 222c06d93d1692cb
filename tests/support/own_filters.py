"""Minimal content filters of an operator, which reject blue images."""

import math
import os
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class Blueness:
    """Reject images with more blue than red."""

    name = "blueness 1.0"

    def score(self, pixels: NDArray[np.uint8]) -> float:
        red, _, blue = pixels.mean(axis=(0, 1))
        return float(blue > red)


class Patience(Blueness):
    """Reject like Blueness, and hold blue images until the file named by $PATIENCE exists."""

    def score(self, pixels: NDArray[np.uint8]) -> float:
        found = super().score(pixels)
        while found and not Path(os.environ["PATIENCE"]).exists():
            threading.Event().wait(0.01)
        return found


class NoNumber(Blueness):
    """Return NaN for blue images."""

    def score(self, pixels: NDArray[np.uint8]) -> float:
        return math.nan if super().score(pixels) else 0.0


class Broken(Blueness):
    """Fail on blue images."""

    def score(self, pixels: NDArray[np.uint8]) -> float:
        if super().score(pixels):
            raise RuntimeError("no words for a blue image at /secret/path")
        return 0.0


class BrokenFromTheStart(Blueness):
    """Fail on every image."""

    def score(self, pixels: NDArray[np.uint8]) -> float:
        raise RuntimeError("the weights are for another size")


class Nameless:
    """Lack the attribute `name`, so that it is no filter."""

    def score(self, pixels: NDArray[np.uint8]) -> float:
        return 0.0
