"""The Triton convolution equals the reference."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from kernel_comparison import DEVICE, NETWORK_DTYPE, SCALE, compare, on_cuda, random

from server.acceleration.kernels import convolution, fp8, tiles
from server.acceleration.kernels.tiles import Tile


def padded_images(batch: int, channels: int, height: int, width: int, in_fp8: bool) -> torch.Tensor:
    images = F.pad(random(batch, channels, height, width, dtype=NETWORK_DTYPE), [1] * 4)
    return fp8.quantize(images, SCALE) if in_fp8 else images


def random_weight(outputs: int, channels: int, kernel_size: int, in_fp8: bool) -> torch.Tensor:
    phases = tiles.phase_count(kernel_size)
    weight = random(phases * outputs, channels, kernel_size, kernel_size, dtype=NETWORK_DTYPE)
    return fp8.quantize(weight, SCALE) if in_fp8 else weight


def random_residual(batch: int, outputs: int, height: int, width: int, kernel_size: int) -> torch.Tensor:
    enlarged = 2 if kernel_size == 2 else 1
    return random(batch, outputs, enlarged * height, enlarged * width, dtype=NETWORK_DTYPE)


def convolve(in_fp8: bool, outputs: int) -> Callable[..., torch.Tensor]:
    scales = (SCALE, torch.rand(outputs, device=DEVICE)) if in_fp8 else (None, None)
    return lambda images, weight, bias, residual: convolution.convolve(
        images, weight, bias, NETWORK_DTYPE, residual, *scales
    )


@pytest.mark.triton
@pytest.mark.parametrize("kernel_size", [3, 2])
@pytest.mark.parametrize("in_fp8", [True, False])
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize(
    ("batch", "channels", "outputs", "height", "width"),
    [(2, 96, 160, 7, 9), (1, 160, 192, 16, 16), (3, 320, 96, 5, 4), (1, 64, 40, 1, 3)],
)
def test_convolve(
    batch: int,
    channels: int,
    outputs: int,
    height: int,
    width: int,
    has_residual: bool,
    in_fp8: bool,
    kernel_size: int,
    monkeypatch: pytest.MonkeyPatch,
):
    images = padded_images(batch, channels, height, width, in_fp8)
    weight = random_weight(outputs, channels, kernel_size, in_fp8)
    bias, residual = None, None
    if has_residual:
        bias = random(outputs, dtype=NETWORK_DTYPE)
        residual = random_residual(batch, outputs, height, width, kernel_size)
    compare(convolve(in_fp8, outputs), images, weight, bias, residual, monkeypatch=monkeypatch)


@pytest.mark.triton
@pytest.mark.parametrize("columns", [(64, 0), (64, 16)])
@pytest.mark.parametrize(("kernel_size", "split"), [(3, 1), (3, 3), (2, 1), (2, 2)])
def test_convolve_with_other_tiles(
    columns: tuple[int, int], kernel_size: int, split: int, monkeypatch: pytest.MonkeyPatch
):
    tile = Tile(64, columns, 32, group=2, split=split, warps=4, stages=3)
    monkeypatch.setattr(tiles, "choose", lambda *shape: tile)
    images, weight = padded_images(2, 48, 9, 15, in_fp8=False), random_weight(200, 48, kernel_size, in_fp8=False)
    bias, residual = random(200, dtype=NETWORK_DTYPE), random_residual(2, 200, 9, 15, kernel_size)
    compare(convolve(False, 200), images, weight, bias, residual, monkeypatch=monkeypatch)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_convolutions_on_a_cpu_or_in_fp32_stay_pytorchs(device: str, dtype: torch.dtype):
    assert not convolution.supports(torch.device(device), dtype)


@on_cuda
@pytest.mark.parametrize("kernel_size", [3, 2])
@pytest.mark.parametrize("in_fp8", [True, False])
def test_convolution_of_an_image_is_independent_of_its_position_in_the_batch(in_fp8: bool, kernel_size: int):
    images, weight = padded_images(5, 320, 9, 15, in_fp8), random_weight(320, 320, kernel_size, in_fp8)
    convolve_images = convolve(in_fp8, 320)
    bits = images.view(torch.uint8) if in_fp8 else images  # PyTorch cannot roll fp8
    rolled = convolve_images(bits.roll(2, 0).view(images.dtype), weight, None, None)
    assert torch.equal(rolled, convolve_images(images, weight, None, None).roll(2, 0))
