"""The C++ convolution by fewer products equals PyTorch's."""

import pytest
import torch
from convolutions import convolution, convolved, images
from kernel_comparison import relative_error
from torch import nn

from server.acceleration.kernels import cpu
from server.acceleration.kernels.winograd import WinogradConvolution


@pytest.mark.skipif(not cpu.is_supported(), reason="the C++ kernels are not for this CPU")
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("bias_dim", [0, 1, 2], ids=["no bias", "one bias", "bias per image"])
@pytest.mark.parametrize(
    ("batch", "channels", "outputs", "height", "width"),
    [(2, 96, 160, 32, 32), (3, 64, 32, 20, 12), (1, 160, 96, 10, 7), (2, 64, 96, 1, 3), (2, 72, 64, 64, 100)],
)
def test_winograd_convolution(
    batch: int, channels: int, outputs: int, height: int, width: int, bias_dim: int, has_residual: bool
):
    layer, given = convolution(channels, outputs), images(batch, channels, height, width)
    strided = torch.randn(batch, 2 * outputs)[:, outputs:]  # as the columns of one layer among those of all
    bias = [None, torch.randn(outputs), strided][bias_dim]
    residual = images(batch, outputs, height, width) if has_residual else None
    expected = convolved(layer, given, bias, residual)
    actual = WinogradConvolution(layer)(given, bias, residual)
    assert actual.shape == expected.shape
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(actual, expected) < 5e-6


@pytest.mark.parametrize(
    ("layer", "supported"),
    [
        (convolution(32, 96), True),
        (convolution(24, 96), False),
        (convolution(96, 40), False),
        (convolution(36, 96), False),
        (convolution(640, 640), False),
        (convolution(96, 96, stride=2), False),
        (convolution(96, 96, padding=0), False),
        (convolution(96, 96, dtype=torch.bfloat16), False),
        (nn.Conv2d(96, 96, 1), False),
    ],
    ids=str,
)
def test_winograd_supports_3x3_convolutions_in_fp32_that_it_speeds_up(layer: nn.Conv2d, supported: bool):
    assert WinogradConvolution.supports(layer) == supported
