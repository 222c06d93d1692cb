"""Padding, bias and phase interleaving by Triton equal the reference."""

import pytest
import torch
from kernel_comparison import SCALE, compare, random

from server.acceleration.kernels import pointwise

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize(("channels", "height", "width"), [(320, 15, 30), (96, 16, 16), (640, 1, 7)])
def test_pad(
    dtype: torch.dtype,
    channels: int,
    height: int,
    width: int,
    scale: torch.Tensor | None,
    monkeypatch: pytest.MonkeyPatch,
):
    images = random(2, channels, height, width, dtype=dtype)
    compare(lambda images: pointwise.pad(images, scale), images, monkeypatch=monkeypatch)


@pytest.mark.parametrize("has_residual", [True, False])
def test_add_bias(dtype: torch.dtype, has_residual: bool, monkeypatch: pytest.MonkeyPatch):
    images, residual = random(2, 96, 9, 7, dtype=dtype), random(2, 96, 9, 7, dtype=dtype) if has_residual else None
    compare(pointwise.add_bias, images, random(96, dtype=dtype), residual, monkeypatch=monkeypatch)


@pytest.mark.parametrize(("outputs", "height", "width"), [(320, 8, 15), (96, 16, 16), (40, 1, 3)])
def test_interleave_phases(dtype: torch.dtype, outputs: int, height: int, width: int, monkeypatch: pytest.MonkeyPatch):
    images = random(2, 4 * outputs, height + 1, width + 1, dtype=dtype)
    compare(pointwise.interleave_phases, images, random(outputs, dtype=dtype), monkeypatch=monkeypatch)
