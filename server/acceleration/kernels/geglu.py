"""GEGLU (Shazeer, "GLU Variants Improve Transformer", 2020), alone or fused with the linear layer before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from server.acceleration.kernels import cpu, fp8
from server.acceleration.kernels.common import INTERPRETED, jit, per_image, runs_triton, supports_tiles, tl, triton
from server.acceleration.kernels.fp8 import FP8, store

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

_TILE = 128, 256, 128  # rows, columns before the gate halves them, and bytes of each sum at a time


def geglu(values: torch.Tensor, scale: torch.Tensor | None = None, image_count: int = 1) -> torch.Tensor:
    """Return the first half of every row of values (..., 2 * width) times the GELU of the second, (..., width).

    On a CPU without a kernel, each of `image_count` images is computed by itself, as of `common.per_image`.
    """
    width = values.shape[-1] // 2
    if scale is None and cpu.can_run(values, width):
        return _geglu_cpp(values)
    if not runs_triton(values):
        linear, gate = values.chunk(2, dim=-1)
        result = per_image(image_count, lambda linear, gate: F.gelu(gate).mul_(linear), linear, gate)
        return result if scale is None else fp8.quantize(result, scale)
    result = values.new_empty((*values.shape[:-1], width), dtype=values.dtype if scale is None else FP8)
    block = 512 if width % 1024 else 1024
    _geglu_kernel[(values.numel() // (2 * width), triton.cdiv(width, block))](
        values,
        result,
        values if scale is None else scale,
        WIDTH=width,
        BLOCK=block,
        TO_FP8=scale is not None,
        num_warps=2,
    )
    return result


def _geglu_cpp(values: torch.Tensor) -> torch.Tensor:
    values = values.contiguous()
    width = values.shape[-1] // 2
    result = torch.empty(*values.shape[:-1], width)
    rows = values.numel() // (2 * width)
    cpu.library().geglu(values.data_ptr(), result.data_ptr(), rows, width, torch.get_num_threads())
    return result


@jit
def _geglu_kernel(values, result, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TO_FP8: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    linear = tl.load(values + row * 2 * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(values + row * 2 * WIDTH + WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    store(result + row * WIDTH + column, linear * gate * _normal_cdf(gate), scale, mask, TO_FP8)


@jit
def _normal_cdf(x):
    """Approximate the normal CDF by a logistic function of a fitted polynomial: GELU is within 3e-6."""
    square = tl.minimum(x * x, 36.0)
    series = 0.07293758163566465 + square * (
        -0.00024972307333005804 + square * (-6.116205361996092e-05 + square * 2.2381668138143906e-06)
    )
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x * (1.5956562720514558 + square * series)))


def supports_fused_linear(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether `linear_geglu` has a kernel there for networks of this dtype, quantized to fp8 or not."""
    return supports_tiles(device, dtype)


def interleave_gates(weight: torch.Tensor) -> torch.Tensor:
    """Return the rows of a weight or a bias with every row of the first half followed by its gate of the second."""
    return torch.stack(weight.chunk(2), dim=1).flatten(0, 1)


def linear_geglu(
    values: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    dtype: torch.dtype,
    scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    result_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return GEGLU of a linear layer, (..., width), of values (..., channels).

    The weight is (2 * width, channels) and the bias (2 * width,), both from `interleave_gates`. In fp8 the products are
    multiplied by `scale` and `weight_scale`, of shape (). The result is of `dtype`, or in fp8 with a `result_scale`.

    The kernel is for Hopper's copy engine. Its programs go from tile to tile and load the next one while they finish
    one. A row of the result depends neither on the other rows nor on its position.
    """
    if not runs_triton(values):
        product = F.linear(values.float(), weight.float())
        if scale is not None and weight_scale is not None:
            product = product * (scale * weight_scale)
        linear, gate = (product + bias).unflatten(-1, (-1, 2)).unbind(-1)
        gated = F.gelu(gate) * linear
        return gated.to(dtype) if result_scale is None else fp8.quantize(gated, result_scale)
    rows = values.reshape(-1, values.shape[-1])
    outputs, channels = weight.shape
    result = torch.empty(
        (*values.shape[:-1], outputs // 2), dtype=dtype if result_scale is None else FP8, device=values.device
    )
    tile_rows, tile_columns, tile_depth = _TILE[0], _TILE[1], _TILE[2] // values.element_size()
    tiles = triton.cdiv(len(rows), tile_rows) * triton.cdiv(outputs, tile_columns)
    programs, bounds = 1, (triton.cdiv(channels, tile_depth), tiles, 1)
    if INTERPRETED:  # the interpreter wants loop bounds that Python knows
        bounds = tuple(map(tl.constexpr, bounds))
    else:
        programs = min(tiles, torch.cuda.get_device_properties(values.device).multi_processor_count)
        bounds = *bounds[:2], programs
    _linear_geglu_kernel[(programs,)](
        TensorDescriptor.from_tensor(rows, [tile_rows, tile_depth]),
        TensorDescriptor.from_tensor(weight, [tile_columns, tile_depth]),
        bias,
        values if scale is None else scale,
        values if weight_scale is None else weight_scale,
        result,
        values if result_scale is None else result_scale,
        len(rows),
        outputs,
        *bounds,
        ROWS=tile_rows,
        COLUMNS=tile_columns,
        DEPTH=tile_depth,
        GROUP=8,
        ONE_PROGRAM=programs == 1,
        HAS_SCALES=scale is not None,
        TO_FP8=result_scale is not None,
        num_warps=8,
        num_stages=4 if values.element_size() > 1 else 3,
    )
    return result


@jit
def _linear_geglu_kernel(
    values,
    weight,
    bias,
    scale,
    weight_scale,
    result,
    result_scale,
    rows,
    outputs,
    steps,
    tiles,
    programs,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    ONE_PROGRAM: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    TO_FP8: tl.constexpr,
):
    tiles_across, tiles_down = tl.cdiv(outputs, COLUMNS), tl.cdiv(rows, ROWS)
    for tile in tl.range(0 if ONE_PROGRAM else tl.program_id(0), tiles, programs, flatten=True):
        # Down through a group of tiles, then to the next columns, to read what is in the cache.
        first = tile // (GROUP * tiles_across) * GROUP
        group_rows = tl.minimum(tiles_down - first, GROUP)
        top = (first + tile % (GROUP * tiles_across) % group_rows) * ROWS
        left = tile % (GROUP * tiles_across) // group_rows * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(steps):
            factors = weight.load([left, step * DEPTH])
            total = tl.dot(values.load([top, step * DEPTH]), factors.T, total, input_precision="ieee")
        row = top + tl.arange(0, ROWS)
        halves = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        for half in tl.static_range(2):  # one after the other: both do not fit into the registers
            column = left + half * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
            product = halves[half]
            if HAS_SCALES:
                product *= tl.load(scale) * tl.load(weight_scale)
            product += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)[None, :]
            linear, gate = tl.split(tl.reshape(product, (ROWS, COLUMNS // 4, 2)))
            result_column = left // 2 + half * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
            mask = (row < rows)[:, None] & (result_column < outputs // 2)[None, :]
            index = row.to(tl.int64)[:, None] * (outputs // 2) + result_column[None, :]
            store(result + index, linear * gate * _normal_cdf(gate), result_scale, mask, TO_FP8)
