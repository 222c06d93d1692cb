"""GEGLU by Triton and by C++ equals the reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from kernel_comparison import NETWORK_DTYPE, SCALE, compare, on_cuda, random, relative_error

from server.acceleration.kernels import cpu, fp8, geglu


@pytest.mark.triton
@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("width", [320, 1024, 5120])
def test_geglu(dtype: torch.dtype, width: int, scale: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch):
    values = 3 * random(2, 3, 2 * width, dtype=dtype)
    compare(lambda values: geglu.geglu(values, scale), values, monkeypatch=monkeypatch)


@pytest.mark.skipif(not cpu.is_supported(), reason="the C++ kernels are not for this CPU")
def test_geglu_by_cpp():
    values = 3 * torch.randn(2, 77, 320)
    with cpu.active():
        actual = geglu.geglu(values)
    assert relative_error(actual, geglu.geglu(values.double())) < 1e-6


@pytest.mark.triton
@pytest.mark.parametrize("in_fp8", [True, False])
@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize(("rows", "channels", "width"), [(300, 192, 320), (128, 128, 1024), (5, 80, 200)])
def test_linear_geglu(
    rows: int,
    channels: int,
    width: int,
    scale: torch.Tensor | None,
    in_fp8: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    values = random(2, rows, channels, dtype=NETWORK_DTYPE)
    weight = random(2 * width, channels, dtype=NETWORK_DTYPE) / 10
    bias = random(2 * width, dtype=NETWORK_DTYPE)
    scales = (None, None)
    if in_fp8:
        values, weight, scales = fp8.quantize(values, SCALE), fp8.quantize(weight, SCALE), (SCALE, SCALE)
    compare(
        lambda values, weight, bias: geglu.linear_geglu(values, weight, bias, NETWORK_DTYPE, *scales, scale),
        values,
        weight,
        bias,
        monkeypatch=monkeypatch,
    )


@pytest.mark.triton
def test_interleaved_gates_give_geglu_of_the_linear_layer(dtype: torch.dtype):
    values, weight, bias = (random(*shape, dtype=dtype) for shape in ((2, 5, 48), (2 * 64, 48), (2 * 64,)))
    expected = geglu.geglu(F.linear(values, weight, bias))
    actual = geglu.linear_geglu(values, geglu.interleave_gates(weight), geglu.interleave_gates(bias), dtype)
    assert relative_error(actual, expected) < 1e-2


@on_cuda
def test_linear_geglu_of_a_row_is_independent_of_its_position():
    values, weight, bias = (random(*shape, dtype=NETWORK_DTYPE) for shape in ((700, 640), (2560, 640), (2560,)))
    rolled = geglu.linear_geglu(values.roll(300, 0), weight, bias, NETWORK_DTYPE)
    assert torch.equal(rolled, geglu.linear_geglu(values, weight, bias, NETWORK_DTYPE).roll(300, 0))


@pytest.mark.skipif(not cpu.is_supported(), reason="the C++ kernels are not for this CPU")
def test_gelu_of_extreme_values_and_nan_by_cpp():
    gates = torch.tensor([0, -0.5, 1, -20, 88, -88, 1e4, -1e4, 1e30, math.nan]).repeat(8)
    with cpu.active():
        actual = geglu.geglu(torch.cat([torch.ones(gates.numel()), gates]))
    assert torch.allclose(actual, F.gelu(gates), rtol=1e-6, atol=1e-7, equal_nan=True)
