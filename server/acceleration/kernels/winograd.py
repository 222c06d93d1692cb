"""3 x 3 convolutions on a CPU in C++, by a quarter of the products: F(4 x 4, 3 x 3) of Lavin and Gray, "Fast Algorithms
for Convolutional Neural Networks", 2015.

A tile of 6 x 6 pixels becomes 36 values, each is multiplied by its own matrix, and the products become 4 x 4 pixels.
The kernel transforms tiles in registers and multiplies them while they are in the cache. It differs from the direct
convolution by rounding alone: 2e-6 of the result's size in fp32, five times as much as PyTorch's.
"""

import torch
from torch import nn

from server.acceleration.kernels import cpu
from server.acceleration.kernels.common import channels_last

_MIN_CHANNELS = 32  # below, the transforms cost more than the saved products
_MAX_PRODUCTS = 1 << 17  # channels * outputs: the transformed weight is four times as large, 19 MB then

# The transform of a line of 3 weights.
_WEIGHTS = torch.tensor(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    dtype=torch.float64,
)


class WinogradConvolution:
    """A 3 x 3 convolution of stride 1 with a zero padding of 1."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self._weight = transform_weight(layer.weight.detach())

    @staticmethod
    def supports(layer: nn.Conv2d) -> bool:
        """Return whether the kernel computes this convolution, and faster than PyTorch."""
        shape = layer.kernel_size == (3, 3) and layer.padding == (1, 1) and layer.stride == (1, 1)
        plain = layer.dilation == (1, 1) and layer.groups == 1
        whole = layer.in_channels % cpu.LANES == 0 and layer.out_channels % cpu.PANEL == 0
        small = layer.in_channels * layer.out_channels <= _MAX_PRODUCTS
        wide = min(layer.in_channels, layer.out_channels) >= _MIN_CHANNELS
        is_fp32_on_cpu = layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32
        return shape and plain and whole and small and wide and is_fp32_on_cpu

    def __call__(self, images: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None) -> torch.Tensor:
        """Return the convolution of images (batch, channels, height, width), plus bias and residual if given.

        The bias is (outputs,), or (batch, outputs) with one for each image; the residual and the result are (batch,
        outputs, height, width).
        """
        images = channels_last(images)
        batch, channels, height, width = images.shape
        outputs = self._weight.shape[1] * cpu.PANEL
        result = cpu.empty_images(batch, outputs, height, width)
        if residual is not None:
            residual = channels_last(residual)
        bias, bias_stride = cpu.with_batch_stride(bias)
        cpu.library().winograd(
            images.data_ptr(),
            self._weight.data_ptr(),
            cpu.pointer(bias),
            bias_stride,
            cpu.pointer(residual),
            result.data_ptr(),
            batch,
            height,
            width,
            channels,
            outputs,
            torch.get_num_threads(),
        )
        return result


def transform_weight(weight: torch.Tensor) -> torch.Tensor:
    """Return weights (outputs, channels, 3, 3) as (36, outputs / cpu.PANEL, channels, cpu.PANEL)."""
    outputs, channels = weight.shape[:2]
    # Permute before the weights grow fourfold: start-up waits for this.
    panels = weight.reshape(outputs // cpu.PANEL, cpu.PANEL, channels, 3, 3).permute(3, 4, 0, 2, 1)
    columns = (_WEIGHTS @ panels.reshape(3, -1).double()).reshape(6, 3, -1)
    transformed = torch.matmul(_WEIGHTS, columns).to(weight.dtype)
    return transformed.reshape(36, outputs // cpu.PANEL, channels, cpu.PANEL)
