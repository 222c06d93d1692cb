"""Pointwise operations on images before and after a convolution, each in one pass over its bytes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from server.acceleration.kernels import fp8
from server.acceleration.kernels.common import (
    BLOCK_ELEMENTS,
    TILE_CHANNELS,
    TILE_POSITIONS,
    channels_last,
    jit,
    runs_triton,
    tl,
    triton,
    unpadded_position,
)
from server.acceleration.kernels.fp8 import FP8, store


def pad(images: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Return images (batch, channels, height, width) with a border of zeros, (batch, channels, height + 2, width + 2).

    `convolution.convolve` reads images with a border.
    """
    if not runs_triton(images):
        result = F.pad(images, [1] * 4)
        return result if scale is None else fp8.quantize(result, scale)
    images = channels_last(images)
    batch, channels, height, width = images.shape
    result = torch.empty(
        (batch, channels, height + 2, width + 2),
        dtype=images.dtype if scale is None else FP8,
        device=images.device,
        memory_format=torch.channels_last,
    )
    grid = (triton.cdiv(result[0, 0].numel(), TILE_POSITIONS), triton.cdiv(channels, TILE_CHANNELS), batch)
    _pad_kernel[grid](
        images,
        result,
        images if scale is None else scale,
        height,
        width,
        CHANNELS=channels,
        POSITIONS=TILE_POSITIONS,
        COLUMNS=TILE_CHANNELS,
        TO_FP8=scale is not None,
    )
    return result


@jit
def _pad_kernel(
    images,
    result,
    scale,
    height,
    width,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TO_FP8: tl.constexpr,
):
    position, batch = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    positions = (height + 2) * (width + 2)
    mask = (position < positions)[:, None] & (channel < CHANNELS)[None, :]
    source, is_inside = unpadded_position(position, batch, height, width)
    index = source[:, None] * CHANNELS + channel[None, :]
    values = tl.load(images + index, mask=mask & is_inside[:, None], other=0.0).to(tl.float32)
    store(result + (batch * positions + position[:, None]) * CHANNELS + channel[None, :], values, scale, mask, TO_FP8)


def add_bias(images: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Return images (batch, channels, height, width) + bias (channels,), plus residual images if given."""
    if not runs_triton(images):
        result = images + bias[:, None, None]
        return result if residual is None else result.add_(residual)
    images, residual = channels_last(images), None if residual is None else channels_last(residual)
    result = torch.empty_like(images)
    _add_bias_kernel[(triton.cdiv(images.numel(), BLOCK_ELEMENTS),)](
        images,
        bias,
        images if residual is None else residual,
        result,
        images.numel(),
        CHANNELS=images.shape[1],
        HAS_RESIDUAL=residual is not None,
        BLOCK=BLOCK_ELEMENTS,
    )
    return result


@jit
def _add_bias_kernel(
    images, bias, residual, result, count, CHANNELS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index = first + tl.arange(0, BLOCK)
    mask = index < count
    values = tl.load(images + index, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        values += tl.load(residual + index, mask=mask, other=0.0).to(tl.float32)
    values += tl.load(bias + ((first % CHANNELS).to(tl.int32) + tl.arange(0, BLOCK)) % CHANNELS).to(tl.float32)
    tl.store(result + index, values.to(result.dtype.element_ty), mask=mask)


def interleave_phases(images: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return images (batch, outputs, 2 * height, 2 * width) from their four phases, plus bias (outputs,).

    Phase 2 * a + b has the pixels at (2 * i + a, 2 * j + b). The given images, (batch, 4 * outputs, height + 1, width +
    1), have it at (i + a, j + b) in its quarter of the channels, as 2 x 2 convolutions with a padding of 1 make it.
    """
    if not runs_triton(images):
        return interleaved(images) + bias[:, None, None]
    images = channels_last(images)
    batch, height, width = len(images), images.shape[2] - 1, images.shape[3] - 1
    shape = (batch, len(bias), 2 * height, 2 * width)
    result = torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=torch.channels_last)
    grid = (triton.cdiv(result[0, 0].numel(), TILE_POSITIONS), triton.cdiv(len(bias), TILE_CHANNELS), batch)
    _interleave_kernel[grid](
        images, bias, result, height, width, CHANNELS=len(bias), POSITIONS=TILE_POSITIONS, COLUMNS=TILE_CHANNELS
    )
    return result


def interleaved(images: torch.Tensor) -> torch.Tensor:
    """Return what `interleave_phases` does without a bias, by PyTorch."""
    outputs, height, width = images.shape[1] // 4, images.shape[2] - 1, images.shape[3] - 1
    phases = images.unflatten(1, (2, 2, outputs))
    cut = [phases[:, y, x, :, y:, x:][..., :height, :width] for y in range(2) for x in range(2)]
    return F.pixel_shuffle(torch.stack(cut, dim=2).flatten(1, 2), 2)


@jit
def _interleave_kernel(
    images, bias, result, height, width, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr
):
    position, batch = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_channel = channel < CHANNELS
    positions = 4 * height * width
    mask = (position < positions)[:, None] & is_channel[None, :]
    y, x = position // (2 * width), position % (2 * width)
    source = (batch * (height + 1) + y // 2 + y % 2) * (width + 1) + x // 2 + x % 2
    index = (source * 4 + y % 2 * 2 + x % 2)[:, None] * CHANNELS + channel[None, :]
    values = tl.load(images + index, mask=mask, other=0.0).to(tl.float32)
    values += tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    index = (batch * positions + position[:, None]) * CHANNELS + channel[None, :]
    tl.store(result + index, values.to(result.dtype.element_ty), mask=mask)
