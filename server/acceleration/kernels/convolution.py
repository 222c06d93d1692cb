"""3 x 3 convolutions on a GPU, and those of images enlarged to twice their sides, as products of matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from server.acceleration.kernels import pointwise, tiles
from server.acceleration.kernels.common import (
    BLOCK_ELEMENTS,
    INTERPRETED,
    channels_last,
    jit,
    runs_triton,
    supports_tiles,
    tl,
    triton,
)
from server.acceleration.kernels.tiles import Tile


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether `convolve` without scales, which is batch-invariant, keeps up with cuDNN there."""
    return supports_tiles(device, dtype)


def convolve(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the 3 x 3 convolution of padded images, (batch, channels, height + 2, width + 2), plus the residual.

    The weight is (outputs, channels, 3, 3); the residual and the result are (batch, outputs, height, width), the result
    of `dtype`. With a weight of (4 * outputs, channels, 2, 2), the four phases of images enlarged to twice their sides,
    both are (batch, outputs, 2 * height, 2 * width). In fp8 the sums are multiplied by `scale`, of shape (), and by
    `weight_scale`, (outputs,).

    The kernel reads channels-last tensors and multiplies matrices: the pixels under a line of the weight lie in a row,
    as it does, and those under its next line the same distance further for every pixel. The bytes of an image depend
    neither on the other images nor on its position in the batch.
    """
    kernel_size = weight.shape[-1]
    if not runs_triton(images):
        sums = F.conv2d(images.float(), weight.float())
        if tiles.phase_count(kernel_size) > 1:
            sums = pointwise.interleaved(sums)
        if scale is not None and weight_scale is not None:
            sums = sums * (scale * weight_scale)[:, None, None]
        if bias is not None:
            sums = sums + bias[:, None, None]
        return (sums if residual is None else sums + residual).to(dtype)
    images, weight = channels_last(images), channels_last(weight)
    residual = None if residual is None else channels_last(residual)
    batch, channels, height, width = images.shape[0], images.shape[1], images.shape[2] - 2, images.shape[3] - 2
    phases = tiles.phase_count(kernel_size)
    outputs, enlarged = len(weight) // phases, 2 if phases > 1 else 1
    shape = (batch, outputs, enlarged * height, enlarged * width)
    result = torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    tile = tiles.choose(batch * height * width, channels, outputs, kernel_size, scale is not None)
    _launch(tile, images, weight, bias, residual, scale, weight_scale, result)
    return result


def _launch(
    tile: Tile,
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    result: torch.Tensor,
) -> None:
    """Write a convolution of channels-last tensors into `result`."""
    batch, channels, height, width = images.shape[0], images.shape[1], images.shape[2] - 2, images.shape[3] - 2
    outputs, kernel_size, pixels, split = result.shape[1], weight.shape[-1], batch * height * width, tile.split
    epilogue = (
        images if scale is None else scale,
        images if weight_scale is None else weight_scale,
        images if bias is None else bias,
        images if residual is None else residual,
        result,
    )
    flags = {"HAS_SCALES": scale is not None, "HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None}
    steps, remainder = divmod(tiles.step_count(tile, channels, kernel_size), split)
    if remainder:
        raise ValueError(f"{channels} channels cannot be added up in {split} equal parts")
    result_pixels = tiles.phase_count(kernel_size) * pixels
    sums = images
    if split > 1:
        sums = torch.empty((split, result_pixels, outputs), dtype=torch.float32, device=images.device)
    _convolution_kernel[(tiles.tile_count(tile, pixels, outputs, kernel_size), split)](
        images,
        weight,
        *epilogue,
        sums,
        pixels,
        height,
        width,
        channels,
        outputs,
        tl.constexpr(steps) if INTERPRETED else steps,  # the interpreter wants loop bounds that Python knows
        ROWS=tile.rows,
        COLUMNS=tile.columns[0],
        MORE_COLUMNS=tile.columns[1],
        DEPTH=tile.depth,
        GROUP=tile.group,
        SPLIT=split,
        KERNEL_SIZE=kernel_size,
        IS_WHOLE=kernel_size * channels % tile.depth == 0,
        **flags,
        num_warps=tile.warps,
        num_stages=_stages(tile, images),
    )
    if split > 1:
        _add_splits_kernel[(triton.cdiv(result_pixels * outputs, BLOCK_ELEMENTS),)](
            sums, *epilogue, result_pixels, outputs, SPLIT=split, BLOCK=BLOCK_ELEMENTS, **flags
        )


def _stages(tile: Tile, images: torch.Tensor) -> int:
    """Return the number of stages that fit: Ada has less than half of Hopper's shared memory."""
    if INTERPRETED:
        return tile.stages
    device = torch.cuda.get_device_properties(images.device)
    shared: int = device.shared_memory_per_block_optin  # type: ignore[attr-defined]  # missing in PyTorch's stubs
    return min(tile.stages, shared // ((tile.rows + sum(tile.columns)) * tile.depth * images.element_size()))


@jit
def _convolution_kernel(
    images,
    weight,
    scale,
    weight_scale,
    bias,
    residual,
    result,
    sums,
    pixels,
    height,
    width,
    channels,
    outputs,
    steps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MORE_COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    # Programs go down through a group of tiles, then to the next columns, and last to those of the next phase.
    tiles_across = tl.cdiv(outputs, COLUMNS + MORE_COLUMNS)
    tiles_of_phases = tiles_across * 4 if KERNEL_SIZE == 2 else tiles_across
    first = tl.program_id(0) // (GROUP * tiles_of_phases) * GROUP
    group_rows = tl.minimum(tl.cdiv(pixels, ROWS) - first, GROUP)
    in_group = tl.program_id(0) % (GROUP * tiles_of_phases)
    row = (first + in_group % group_rows) * ROWS + tl.arange(0, ROWS)
    left = in_group // group_rows
    if KERNEL_SIZE == 2:
        phase, left = left // tiles_across, left % tiles_across
    left *= COLUMNS + MORE_COLUMNS
    column = left + tl.arange(0, COLUMNS)
    more_column = left + COLUMNS + tl.arange(0, MORE_COLUMNS if MORE_COLUMNS else COLUMNS)

    # Rows and columns beyond the end read the last one again; their sums are not stored.
    position = tl.minimum(row, pixels - 1)
    line = position // width
    corner = (line + line // height * 2).to(tl.int64) * (width + 2) + position % width
    if KERNEL_SIZE == 2:
        corner += phase // 2 * (width + 2) + phase % 2
        weight += phase * outputs * (4 * channels)
    depth = tl.arange(0, DEPTH)
    weight_size = KERNEL_SIZE * KERNEL_SIZE * channels
    pixel_pointers = images + corner[:, None] * channels + depth[None, :]
    weight_pointers = weight + tl.minimum(column, outputs - 1)[None, :] * weight_size + depth[:, None]
    more_pointers = weight + tl.minimum(more_column, outputs - 1)[None, :] * weight_size + depth[:, None]

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    more = tl.zeros((ROWS, MORE_COLUMNS if MORE_COLUMNS else 1), tl.float32)
    steps_per_line = tl.cdiv(KERNEL_SIZE * channels, DEPTH)
    for step in range(steps):
        absolute_step = tl.program_id(1) * steps + step
        weight_line = (absolute_step >= steps_per_line).to(tl.int32)
        if KERNEL_SIZE == 3:
            weight_line += (absolute_step >= 2 * steps_per_line).to(tl.int32)
        offset = (absolute_step - weight_line * steps_per_line) * DEPTH
        pixel_offset = weight_line * ((width + 2) * channels) + offset
        weight_offset = weight_line * (KERNEL_SIZE * channels) + offset
        if IS_WHOLE:
            values = tl.load(pixel_pointers + pixel_offset)
            total = tl.dot(values, tl.load(weight_pointers + weight_offset), total, input_precision="ieee")
            if MORE_COLUMNS:
                more = tl.dot(values, tl.load(more_pointers + weight_offset), more, input_precision="ieee")
        else:
            mask = offset + depth < KERNEL_SIZE * channels
            values = tl.load(pixel_pointers + pixel_offset, mask=mask[None, :], other=0.0)
            factors = tl.load(weight_pointers + weight_offset, mask=mask[:, None], other=0.0)
            total = tl.dot(values, factors, total, input_precision="ieee")
            if MORE_COLUMNS:
                factors = tl.load(more_pointers + weight_offset, mask=mask[:, None], other=0.0)
                more = tl.dot(values, factors, more, input_precision="ieee")

    if KERNEL_SIZE == 2:  # rows of the phase become rows of the result; those beyond the end stay beyond it
        above = row // width * 2 + phase // 2
        row = tl.where(row < pixels, above * (2 * width) + row % width * 2 + phase % 2, 4 * pixels)
        pixels = 4 * pixels
    row = row.to(tl.int64)
    if SPLIT > 1:
        split_row = row + tl.program_id(1).to(tl.int64) * pixels
        _store_sums(total, sums, split_row, column, row < pixels, outputs)
        if MORE_COLUMNS:
            _store_sums(more, sums, split_row, more_column, row < pixels, outputs)
    else:
        _finish(
            total,
            scale,
            weight_scale,
            bias,
            residual,
            result,
            row,
            left,
            pixels,
            outputs,
            COLUMNS,
            HAS_SCALES,
            HAS_BIAS,
            HAS_RESIDUAL,
        )
        if MORE_COLUMNS:
            _finish(
                more,
                scale,
                weight_scale,
                bias,
                residual,
                result,
                row,
                left + COLUMNS,
                pixels,
                outputs,
                MORE_COLUMNS,
                HAS_SCALES,
                HAS_BIAS,
                HAS_RESIDUAL,
            )


@jit
def _store_sums(total, sums, row, column, is_row, outputs):
    tl.store(sums + row[:, None] * outputs + column[None, :], total, mask=is_row[:, None] & (column < outputs)[None, :])


@jit
def _finish(
    total,
    scale,
    weight_scale,
    bias,
    residual,
    result,
    row,
    left,
    pixels,
    outputs,
    COLUMNS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Scale the sums of a tile, add bias and residual, and store them."""
    if COLUMNS > 64:  # one half after the other: the whole residual does not fit into the registers next to the sums
        halves = tl.split(tl.permute(tl.reshape(total, (total.shape[0], 2, COLUMNS // 2)), (0, 2, 1)))
        for half in tl.static_range(2):
            _finish(
                halves[half],
                scale,
                weight_scale,
                bias,
                residual,
                result,
                row,
                left + half * (COLUMNS // 2),
                pixels,
                outputs,
                COLUMNS // 2,
                HAS_SCALES,
                HAS_BIAS,
                HAS_RESIDUAL,
            )
    else:
        column = left + tl.arange(0, COLUMNS)
        is_column = column < outputs
        mask = (row < pixels)[:, None] & is_column[None, :]
        index = row[:, None] * outputs + column[None, :]
        if HAS_SCALES:
            total *= (tl.load(scale) * tl.load(weight_scale + column, mask=is_column, other=0.0))[None, :]
        if HAS_BIAS:
            total += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        if HAS_RESIDUAL:
            total += tl.load(residual + index, mask=mask, other=0.0).to(tl.float32)
        tl.store(result + index, total.to(result.dtype.element_ty), mask=mask)


@jit
def _add_splits_kernel(
    sums,
    scale,
    weight_scale,
    bias,
    residual,
    result,
    pixels,
    outputs,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask, column = index < pixels * outputs, index % outputs
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(sums + part * pixels * outputs + index, mask=mask, other=0.0)
    if HAS_SCALES:
        total *= tl.load(scale) * tl.load(weight_scale + column)
    if HAS_BIAS:
        total += tl.load(bias + column).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual + index, mask=mask, other=0.0).to(tl.float32)
    tl.store(result + index, total.to(result.dtype.element_ty), mask=mask)
