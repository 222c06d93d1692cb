"""Rounding to fp8."""

import pytest
import torch
from kernel_comparison import SCALE, compare, random

from server.acceleration.kernels import fp8


@pytest.mark.triton
def test_quantize(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    values = torch.cat([random(100, 33, dtype=dtype), random(1, 33, dtype=dtype) * 1e4])  # beyond the range of e4m3
    compare(lambda values: fp8.quantize(values, SCALE), values, monkeypatch=monkeypatch)


def test_quantize_clamps_to_the_range_of_e4m3():
    values = torch.tensor([-1e6, -448.0, 0.0, 1.0, 448.0, 1e6])
    expected = torch.tensor([-448.0, -448.0, 0.0, 1.0, 448.0, 448.0])
    assert torch.equal(fp8.quantize(values, torch.tensor(1.0)).float(), expected)
