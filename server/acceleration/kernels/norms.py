"""Layer norm and group norm, with the sums before them, the SiLU after them and the padding of a convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from server.acceleration.kernels import cpu, fp8
from server.acceleration.kernels.common import (
    TILE_CHANNELS,
    TILE_POSITIONS,
    channels_last,
    jit,
    per_image,
    runs_triton,
    tl,
    triton,
    unpadded_position,
)
from server.acceleration.kernels.fp8 import FP8, store

_MAX_PARTS = 256  # programs that share the positions of an image in the moments of a group norm


def layer_norm(
    values: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values + residual, (..., width), and the layer norm of that sum.

    An `offset`, (width,), is added before the norm, and not to the returned sum.
    """
    if scale is None and cpu.can_run(values, values.shape[-1]):
        return _layer_norm_cpp(values, residual, weight, bias, eps)
    if not runs_triton(values):
        total = values if residual is None else values + residual
        row = total if offset is None else (total + offset).to(total.dtype)
        normed = F.layer_norm(row, row.shape[-1:], weight, bias, eps)
        return total, normed if scale is None else fp8.quantize(normed, scale)
    width = values.shape[-1]
    total = values if residual is None else torch.empty_like(values)
    normed = torch.empty_like(values, dtype=values.dtype if scale is None else FP8)
    _layer_norm_kernel[(values.numel() // width,)](
        values,
        values if residual is None else residual,
        weight if offset is None else offset,
        total,
        normed,
        weight,
        bias,
        weight if scale is None else scale,
        eps,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        HAS_RESIDUAL=residual is not None,
        HAS_OFFSET=offset is not None,
        TO_FP8=scale is not None,
        num_warps=1,
    )
    return total, normed


def _layer_norm_cpp(
    values: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    values = values.contiguous()
    total = values
    if residual is not None:
        residual, total = residual.contiguous(), torch.empty_like(values)
    result = torch.empty_like(values)
    width = values.shape[-1]
    cpu.library().layer_norm(
        values.data_ptr(),
        cpu.pointer(residual),
        weight.data_ptr(),
        bias.data_ptr(),
        total.data_ptr(),
        result.data_ptr(),
        values.numel() // width,
        width,
        eps,
        torch.get_num_threads(),
    )
    return total, result


@jit
def _layer_norm_kernel(
    values,
    residual,
    offset,
    total,
    normed,
    weight,
    bias,
    scale,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    TO_FP8: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    index = tl.program_id(0).to(tl.int64) * WIDTH + column
    row = tl.load(values + index, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        summed = (row + tl.load(residual + index, mask=mask, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + index, summed, mask=mask)
        row = summed.to(tl.float32)
    if HAS_OFFSET:
        row += tl.load(offset + column, mask=mask, other=0.0)
    centred = tl.where(mask, row - tl.sum(row) / WIDTH, 0.0)
    result = centred * tl.rsqrt(tl.sum(centred * centred) / WIDTH + eps)
    result = result * tl.load(weight + column, mask=mask).to(tl.float32)
    result += tl.load(bias + column, mask=mask).to(tl.float32)
    store(normed + index, result, scale, mask, TO_FP8)


def group_norm(
    images: torch.Tensor,
    shift: torch.Tensor | None,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool,
    scale: torch.Tensor | None = None,
    padded: bool = False,
    image_count: int = 1,
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the group norm of images (batch, channels, height, width) + shift (batch, channels), with SiLU if `silu`.

    `skip` holds the last channels of the images where these come in two parts, which are not concatenated. `padded`
    adds a border of zeros for `convolution.convolve`: the result is (batch, channels, height + 2, width + 2). On a CPU
    without a kernel, each of `image_count` images is computed by itself, as of `common.per_image`.

    The Triton kernels read channels-last images. The first computes the mean of each channel in a part of an image, and
    the sum of squared differences from it (m2). The second combines these for each group by the formula of Chan, Golub
    and LeVeque (1979), which has no cancellation. The third normalises.
    """
    if skip is not None and not runs_triton(images):
        images, skip = torch.cat([images, skip], dim=1), None
    if scale is None and not padded and cpu.can_run(images, images.shape[1]):
        return _group_norm_cpp(images, shift, groups, weight, bias, eps, silu)
    if runs_triton(images):
        return _group_norm_triton(images, shift, groups, weight, bias, eps, silu, scale, padded, skip)
    # PyTorch's own operators, the reference of both kernels.
    shifted = images if shift is None else images + shift[:, :, None, None]

    def apply(rows: torch.Tensor) -> torch.Tensor:
        normed = F.group_norm(rows, groups, weight, bias, eps)
        if not (silu and padded) or torch.compiler.is_dynamo_compiling():
            normed = F.silu(normed, inplace=True) if silu else normed
            return F.pad(normed, [1] * 4) if padded else normed
        batch, channels, height, width = normed.shape
        result = normed.new_zeros(batch, height + 2, width + 2, channels).permute(0, 3, 1, 2)
        torch.ops.aten.silu.out(normed, out=result[:, :, 1:-1, 1:-1])  # one pass less than F.pad
        return result

    result = per_image(image_count, apply, shifted)
    return result if scale is None else fp8.quantize(result, scale)


def _group_norm_cpp(
    images: torch.Tensor,
    shift: torch.Tensor | None,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool,
) -> torch.Tensor:
    images = channels_last(images)
    batch, channels, height, width = images.shape
    result = cpu.empty_images(batch, channels, height, width)
    shift, shift_stride = cpu.with_batch_stride(shift)
    cpu.library().group_norm(
        images.data_ptr(),
        cpu.pointer(shift),
        shift_stride,
        weight.data_ptr(),
        bias.data_ptr(),
        result.data_ptr(),
        batch,
        height * width,
        channels,
        groups,
        eps,
        silu,
        torch.get_num_threads(),
    )
    return result


def _group_norm_triton(
    images: torch.Tensor,
    shift: torch.Tensor | None,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool,
    scale: torch.Tensor | None,
    padded: bool,
    skip: torch.Tensor | None,
) -> torch.Tensor:
    batch, first_channels, height, width = images.shape
    skip_channels = 0 if skip is None else skip.shape[1]
    channels = first_channels + skip_channels
    images = channels_last(images)
    skip = images if skip is None else channels_last(skip)
    positions, border = height * width, 1 if padded else 0
    tiles = triton.cdiv(positions, TILE_POSITIONS)
    tiles_per_part = triton.cdiv(tiles, _MAX_PARTS)
    parts = triton.cdiv(tiles, tiles_per_part)
    tiles_across = triton.cdiv(channels, TILE_CHANNELS)
    means, m2s = torch.empty((2, batch, parts, channels), dtype=torch.float32, device=images.device)
    factors, addends = torch.empty((2, batch, channels), dtype=torch.float32, device=images.device)
    result = torch.empty(
        (batch, channels, height + 2 * border, width + 2 * border),
        dtype=images.dtype if scale is None else FP8,
        device=images.device,
        memory_format=torch.channels_last,
    )
    _moments_kernel[(parts, tiles_across, batch)](
        images,
        skip,
        means,
        m2s,
        positions,
        parts,
        FIRST=first_channels,
        SKIP=skip_channels,
        TILES_PER_PART=tiles_per_part,
        POSITIONS=TILE_POSITIONS,
        COLUMNS=TILE_CHANNELS,
    )
    _affine_kernel[(groups, batch)](
        means,
        m2s,
        bias if shift is None else shift,
        0 if shift is None else shift.stride(0),
        weight,
        bias,
        factors,
        addends,
        eps,
        positions,
        CHANNELS=channels,
        PER_GROUP=channels // groups,
        COLUMNS=triton.next_power_of_2(channels // groups),
        PARTS=parts,
        PARTS_AT_ONCE=min(32, triton.next_power_of_2(parts)),
        POSITIONS_PER_PART=tiles_per_part * TILE_POSITIONS,
        HAS_SHIFT=shift is not None,
    )
    _normalize_kernel[(triton.cdiv(result[0, 0].numel(), TILE_POSITIONS), tiles_across, batch)](
        images,
        skip,
        factors,
        addends,
        result,
        images if scale is None else scale,
        height,
        width,
        FIRST=first_channels,
        SKIP=skip_channels,
        POSITIONS=TILE_POSITIONS,
        COLUMNS=TILE_CHANNELS,
        SILU=silu,
        BORDER=border,
        TO_FP8=scale is not None,
    )
    return result


@jit
def _load_channels(images, skip, position, channel, mask, FIRST: tl.constexpr, SKIP: tl.constexpr):
    """Load some channels at some positions of images whose first channels are in one tensor, the others in `skip`."""
    index = position[:, None] * FIRST + channel[None, :]
    values = tl.load(images + index, mask=mask & (channel < FIRST)[None, :], other=0.0).to(tl.float32)
    if SKIP:
        index = position[:, None] * SKIP + (channel - FIRST)[None, :]
        values += tl.load(skip + index, mask=mask & (channel >= FIRST)[None, :], other=0.0).to(tl.float32)
    return values


@jit
def _moments_kernel(
    images,
    skip,
    means,
    m2s,
    positions,
    parts,
    FIRST: tl.constexpr,
    SKIP: tl.constexpr,
    TILES_PER_PART: tl.constexpr,
    POSITIONS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store the mean of each channel in a part of an image, and the sum of squared differences from it."""
    channels: tl.constexpr = FIRST + SKIP
    part, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mean = tl.zeros((COLUMNS,), tl.float32)
    m2 = tl.zeros((COLUMNS,), tl.float32)
    count = 0.0
    for tile in range(TILES_PER_PART):
        first = (part * TILES_PER_PART + tile) * POSITIONS
        position = first + tl.arange(0, POSITIONS)
        mask = (position < positions)[:, None] & (channel < channels)[None, :]
        tile_count = tl.minimum(positions - first, POSITIONS).to(tl.float32)
        if tile_count > 0:
            values = _load_channels(images, skip, batch * positions + position, channel, mask, FIRST, SKIP)
            tile_mean = tl.sum(values, axis=0) / tile_count
            centred = tl.where(mask, values - tile_mean[None, :], 0.0)
            difference = tile_mean - mean
            total = count + tile_count
            m2 += tl.sum(centred * centred, axis=0) + difference * difference * (count * tile_count / total)
            mean += difference * (tile_count / total)
            count = total
    index = (batch * parts + part) * channels + channel
    tl.store(means + index, mean, mask=channel < channels)
    tl.store(m2s + index, m2, mask=channel < channels)


@jit
def _affine_kernel(
    means,
    m2s,
    shift,
    shift_batch_stride,
    weight,
    bias,
    factors,
    addends,
    eps,
    positions,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_AT_ONCE: tl.constexpr,
    POSITIONS_PER_PART: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    """Store the factor and the addend by which the norm changes each channel of a group."""
    group, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    channel = group * PER_GROUP + column
    is_channel = column < PER_GROUP
    shifted = tl.zeros((COLUMNS,), tl.float32)
    if HAS_SHIFT:
        shifted = tl.load(shift + batch * shift_batch_stride + channel, mask=is_channel, other=0.0).to(tl.float32)

    total = 0.0
    for first in range(0, PARTS, PARTS_AT_ONCE):
        index, mask, mean, counts = _part_means(
            means,
            first,
            shifted,
            batch,
            channel,
            is_channel,
            positions,
            CHANNELS,
            PARTS,
            PARTS_AT_ONCE,
            POSITIONS_PER_PART,
        )
        total += tl.sum(tl.where(mask, mean * counts, 0.0))
    count = positions * PER_GROUP
    group_mean = total / count

    m2 = 0.0
    for first in range(0, PARTS, PARTS_AT_ONCE):
        index, mask, mean, counts = _part_means(
            means,
            first,
            shifted,
            batch,
            channel,
            is_channel,
            positions,
            CHANNELS,
            PARTS,
            PARTS_AT_ONCE,
            POSITIONS_PER_PART,
        )
        difference = mean - group_mean
        part_m2 = tl.load(m2s + index, mask=mask, other=0.0)
        m2 += tl.sum(tl.where(mask, part_m2 + difference * difference * counts, 0.0))
    factor = tl.rsqrt(m2 / count + eps) * tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32)
    addend = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32) + (shifted - group_mean) * factor
    tl.store(factors + batch * CHANNELS + channel, factor, mask=is_channel)
    tl.store(addends + batch * CHANNELS + channel, addend, mask=is_channel)


@jit
def _part_means(
    means,
    first,
    shifted,
    batch,
    channel,
    is_channel,
    positions,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_AT_ONCE: tl.constexpr,
    POSITIONS_PER_PART: tl.constexpr,
):
    """Return index and mask of the moments of some parts of an image, their means and their numbers of positions."""
    part = first + tl.arange(0, PARTS_AT_ONCE)
    mask = (part < PARTS)[:, None] & is_channel[None, :]
    index = (batch * PARTS + part[:, None]) * CHANNELS + channel[None, :]
    mean = tl.load(means + index, mask=mask, other=0.0) + shifted[None, :]
    counts = tl.minimum(positions - part * POSITIONS_PER_PART, POSITIONS_PER_PART).to(tl.float32)
    return index, mask, mean, counts[:, None]


@jit
def _normalize_kernel(
    images,
    skip,
    factors,
    addends,
    result,
    scale,
    height,
    width,
    FIRST: tl.constexpr,
    SKIP: tl.constexpr,
    POSITIONS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SILU: tl.constexpr,
    BORDER: tl.constexpr,
    TO_FP8: tl.constexpr,
):
    channels: tl.constexpr = FIRST + SKIP
    position, batch = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_channel = channel < channels
    positions = (height + 2 * BORDER) * (width + 2 * BORDER)  # of the result
    mask = (position < positions)[:, None] & is_channel[None, :]
    source, source_mask = batch * positions + position, mask
    if BORDER:
        source, is_inside = unpadded_position(position, batch, height, width)
        source_mask = mask & is_inside[:, None]
    factor = tl.load(factors + batch * channels + channel, mask=is_channel, other=0.0)
    addend = tl.load(addends + batch * channels + channel, mask=is_channel, other=0.0)
    values = _load_channels(images, skip, source, channel, source_mask, FIRST, SKIP)
    normed = values * factor[None, :] + addend[None, :]
    if SILU:
        normed = normed / (1.0 + tl.exp(-normed))
    if BORDER:
        normed = tl.where(source_mask, normed, 0.0)
    index = (batch * positions + position[:, None]) * channels + channel[None, :]
    store(result + index, normed, scale, mask, TO_FP8)
