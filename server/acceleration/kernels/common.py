"""Shared by the families of kernels: whether Triton runs, and how images of a batch stay independent on a CPU."""

from __future__ import annotations  # Triton reads the annotations of kernels and never evaluates them

import os
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU build of PyTorch does not bring it
    triton = tl = None

__all__ = [
    "BLOCK_ELEMENTS",
    "INTERPRETED",
    "LOG2_E",
    "TILE_CHANNELS",
    "TILE_POSITIONS",
    "channels_last",
    "is_hopper",
    "jit",
    "per_image",
    "runs_triton",
    "supports_tiles",
    "tl",
    "triton",
    "unpadded_position",
]

# Triton can also interpret kernels, slowly and on any device: tests use that where there is no GPU.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"

BLOCK_ELEMENTS = 2048  # per program of a pointwise kernel
TILE_POSITIONS, TILE_CHANNELS = 128, 64  # the tile of an image that one program holds in registers
LOG2_E = 1.4426950408889634  # GPUs compute powers of two


def runs_triton(tensor: torch.Tensor) -> bool:
    """Return whether Triton kernels run on the tensor's device."""
    return triton is not None and (tensor.is_cuda or INTERPRETED)


def jit(function: Any) -> Any:
    """Compile a kernel by Triton, or leave it alone where Triton is not installed."""
    return triton.jit(function) if triton is not None else function


def is_hopper(device: torch.device) -> bool:
    """Return whether the device is a GPU of the Hopper generation, such as an H100."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def supports_tiles(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the matrix products of Triton kernels are fast: their tiles are Hopper's, in half precision.

    In fp32 they would use no tensor cores.
    """
    return triton is not None and dtype.itemsize == 2 and is_hopper(device)


def per_image(image_count: int, function: Callable[..., torch.Tensor], *values: torch.Tensor) -> torch.Tensor:
    """Apply `function` to values (rows, ...) of `image_count` images; on a CPU one image at a time.

    A CPU's threads share the values of SiLU and GELU, and the positions of a group norm, without regard to rows, and
    where a thread's share ends PyTorch rounds differently: the bytes of an image would depend on its position in the
    batch. Code that torch.compile makes has no such shares.
    """
    if image_count == 1 or values[0].device.type != "cpu" or torch.compiler.is_dynamo_compiling():
        return function(*values)
    return torch.cat([function(*rows) for rows in zip(*(each.chunk(image_count) for each in values), strict=True)])


def channels_last(images: torch.Tensor) -> torch.Tensor:
    """Return the images in channels-last memory format."""
    return images.contiguous(memory_format=torch.channels_last)


@jit
def unpadded_position(position, batch, height, width):
    """Map positions of an image with a border to positions among all images without, and whether they lie inside."""
    y, x = position // (width + 2) - 1, position % (width + 2) - 1
    is_inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return (batch * height + y) * width + x, is_inside
