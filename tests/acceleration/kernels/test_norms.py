"""Layer norm and group norm by Triton and by C++ equal the reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from convolutions import images as random_images
from kernel_comparison import SCALE, compare, random, relative_error

from server.acceleration.kernels import cpu, norms

by_cpp = pytest.mark.skipif(not cpu.is_supported(), reason="the C++ kernels are not for this CPU")


@pytest.mark.triton
@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("width", [640, 1280, 96])
@pytest.mark.parametrize("has_residual", [True, False])
def test_layer_norm(
    dtype: torch.dtype, width: int, has_residual: bool, scale: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
):
    values, residual = random(2, 9, width, dtype=dtype), random(2, 9, width, dtype=dtype) if has_residual else None
    weight, bias = random(width, dtype=dtype), random(width, dtype=dtype)
    compare(
        lambda *tensors: norms.layer_norm(*tensors, 1e-5, scale),
        values,
        residual,
        weight,
        bias,
        monkeypatch=monkeypatch,
    )


@pytest.mark.triton
@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("has_residual", [True, False])
def test_layer_norm_with_offset(
    dtype: torch.dtype, has_residual: bool, scale: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
):
    values, residual = random(2, 9, 640, dtype=dtype), random(2, 9, 640, dtype=dtype) if has_residual else None
    weight, bias, offset = random(640, dtype=dtype), random(640, dtype=dtype), 2 * random(640, dtype=torch.float32)
    compare(
        lambda *tensors: norms.layer_norm(*tensors, 1e-5, scale, offset),
        values,
        residual,
        weight,
        bias,
        monkeypatch=monkeypatch,
    )


@by_cpp
@pytest.mark.parametrize("has_residual", [True, False])
def test_layer_norm_by_cpp(has_residual: bool):
    values, residual = torch.randn(2, 77, 160) + 5, torch.randn(2, 77, 160) if has_residual else None
    weight, bias = torch.randn(160), torch.randn(160)
    with cpu.active():
        total, normed = norms.layer_norm(values, residual, weight, bias, 1e-5)
    assert torch.equal(total, values if residual is None else values + residual)
    assert relative_error(normed, F.layer_norm(total.double(), (160,), weight.double(), bias.double())) < 1e-6


@pytest.mark.triton
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("has_shift", [True, False])
@pytest.mark.parametrize(
    ("channels", "groups", "height", "width"), [(320, 32, 15, 30), (96, 16, 16, 16), (1280, 32, 8, 7)]
)
def test_group_norm(
    dtype: torch.dtype,
    channels: int,
    groups: int,
    height: int,
    width: int,
    has_shift: bool,
    silu: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    images = 2 * random(2, channels, height, width, dtype=dtype) + 3
    shift = random(2, channels, dtype=dtype) if has_shift else None
    weight, bias = random(channels, dtype=dtype), random(channels, dtype=dtype)
    compare(
        lambda images, shift, *affine: norms.group_norm(images, shift, groups, *affine, 1e-5, silu),
        images,
        shift,
        weight,
        bias,
        monkeypatch=monkeypatch,
    )


@pytest.mark.triton
@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize(("channels", "height", "width"), [(320, 15, 30), (96, 16, 16), (640, 1, 7)])
def test_group_norm_with_padding(
    dtype: torch.dtype,
    channels: int,
    height: int,
    width: int,
    scale: torch.Tensor | None,
    monkeypatch: pytest.MonkeyPatch,
):
    images, shift = 2 * random(2, channels, height, width, dtype=dtype) + 3, random(2, channels, dtype=dtype)
    weight, bias = random(channels, dtype=dtype), random(channels, dtype=dtype)
    compare(
        lambda images, shift, *affine: norms.group_norm(images, shift, 16, *affine, 1e-5, True, scale, padded=True),
        images,
        shift,
        weight,
        bias,
        monkeypatch=monkeypatch,
    )


@pytest.mark.triton
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("first", "skipped"), [(64, 128), (96, 64), (30, 18)])
def test_group_norm_with_a_skip_connection(
    dtype: torch.dtype, first: int, skipped: int, padded: bool, monkeypatch: pytest.MonkeyPatch
):
    images, skip = (2 * random(2, channels, 9, 14, dtype=dtype) + 3 for channels in (first, skipped))
    weight, bias = random(first + skipped, dtype=dtype), random(first + skipped, dtype=dtype)
    compare(
        lambda images, skip, *affine: norms.group_norm(images, None, 16, *affine, 1e-5, True, padded=padded, skip=skip),
        images,
        skip,
        weight,
        bias,
        monkeypatch=monkeypatch,
    )


@pytest.mark.triton
def test_group_norm_with_many_tiles_per_program(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(norms, "TILE_POSITIONS", 2)  # 600 positions are more than 256 tiles
    images, weight = random(1, 32, 20, 30, dtype=dtype) + 50, random(32, dtype=dtype)
    compare(
        lambda images, *affine: norms.group_norm(images, None, 8, *affine, 1e-5, silu=False),
        images,
        weight,
        weight,
        monkeypatch=monkeypatch,
    )


@by_cpp
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("has_shift", [True, False])
@pytest.mark.parametrize("size", [(2, 96, 32, 32), (1, 32, 100, 71), (3, 40, 1, 1), (2, 352, 8, 8)])
def test_group_norm_by_cpp(size: tuple[int, ...], has_shift: bool, silu: bool):
    batch, channels = size[:2]
    images = 3 * random_images(*size) + 100  # a mean that cancels most of the squares
    shift = torch.randn(batch, 2 * channels)[:, channels:] if has_shift else None
    weight, bias = torch.randn(channels), torch.randn(channels)
    shifted = images.double() if shift is None else images.double() + shift.double()[:, :, None, None]
    expected = F.group_norm(shifted, 8, weight.double(), bias.double(), 1e-5)
    with cpu.active():
        actual = norms.group_norm(images, shift, 8, weight, bias, 1e-5, silu)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(actual, F.silu(expected) if silu else expected) < 1e-5


@by_cpp
def test_silu_of_extreme_values_and_nan_by_cpp():
    images = torch.tensor([0, -0.5, 1, -20, 88, -88, 1e4, -1e4, 1e30, math.nan]).repeat(8).view(1, 8, 1, 10)
    weight, bias = torch.zeros(8), torch.linspace(-100, 100, 8)
    with cpu.active():
        actual = norms.group_norm(images.nan_to_num(), None, 1, weight, bias, 1e-5, True)
        of_nan = norms.group_norm(images, None, 1, weight, bias, 1e-5, True)
    assert torch.allclose(actual, F.silu(bias)[None, :, None, None].expand_as(actual), rtol=1e-6, atol=1e-35)
    assert of_nan.isnan().all()
