"""Content filters such as an operator may bring, as plain as can be: what they object to is blue."""

import math
import os
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class Blueness:
    """Objects to images with more blue in them than red."""

    name = "blueness 1.0"

    def score(self, pixels: NDArray[np.uint8]) -> float:
        red, _, blue = pixels.mean(axis=(0, 1))
        return float(blue > red)


class Patience(Blueness):
    """As Blueness, but a blue image has to wait until the file in $PATIENCE is there."""

    def score(self, pixels: NDArray[np.uint8]) -> float:
        found = super().score(pixels)
        while found and not Path(os.environ["PATIENCE"]).exists():
            threading.Event().wait(0.01)
        return found


class NoNumber(Blueness):
    """Does not know what to make of blue images."""

    def score(self, pixels: NDArray[np.uint8]) -> float:
        return math.nan if super().score(pixels) else 0.0


class Broken(Blueness):
    """Fails on blue images."""

    def score(self, pixels: NDArray[np.uint8]) -> float:
        if super().score(pixels):
            raise RuntimeError("no words for a blue image at /secret/path")
        return 0.0


class BrokenFromTheStart(Blueness):
    """Fails on every image."""

    def score(self, pixels: NDArray[np.uint8]) -> float:
        raise RuntimeError("the weights are for another size")


class Nameless:
    """Is no filter."""

    def score(self, pixels: NDArray[np.uint8]) -> float:
        return 0.0
