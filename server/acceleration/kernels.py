"""What a step of a U-Net does beside and between PyTorch's matrix products, each in one pass over its bytes.

Every function is a plain PyTorch reference and, for CUDA, a kernel in Triton that computes the same in fp32 and rounds
once; tests compare the two. Where a CPU runs `cpu_kernels`, in fp32 and without a `scale`, most are one of those. Where
a function takes `scale`, what it makes is for a product in fp8: divided by it, kept within what e4m3 can hold, 448 at
most, and rounded to that. A row, an image or a group is summed up by one program in one order, so that what it comes to
depends neither on its neighbours nor on the run.
"""

from __future__ import annotations  # those of the kernels are read, and never evaluated, by Triton

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from server.acceleration import cpu_kernels

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a PyTorch for processors comes without
    triton = None

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # that e4m3 can hold

# Triton can also be interpreted, slowly and on any device: that is how tests run the kernels where no GPU is.
_INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
_ROWS, _CHANNELS = 128, 64  # of a tile that one program of a group norm has in its registers
_QUERIES = 64  # that one program of a cross-attention takes
_LOG2_E = 1.4426950408889634  # powers of two are what a GPU computes
_ELEMENTS = 2048  # that one program of a pointwise kernel takes


def _runs_kernels(tensor: torch.Tensor) -> bool:
    return triton is not None and (tensor.is_cuda or _INTERPRETED)


def _jit(function: Any) -> Any:
    return triton.jit(function) if triton is not None else function


def by_image(images: int, function: Callable[..., torch.Tensor], *values: torch.Tensor) -> torch.Tensor:
    """What a function makes of the rows of so many images, (rows, ...), on the CPU of those of each by themselves.

    torch shares the values of SiLU and GELU, and the places of a group norm, out to a CPU's threads without regard to
    rows, and where the threads' shares end they round otherwise: an image's bytes would depend on its place among
    others. Compiled code is not made of these functions, and has no such shares.
    """
    if images == 1 or values[0].device.type != "cpu" or torch.compiler.is_dynamo_compiling():
        return function(*values)
    return torch.cat([function(*rows) for rows in zip(*(each.chunk(images) for each in values), strict=True)])


def linear(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, images: int = 1) -> torch.Tensor:
    """A linear layer, (..., outputs), of the rows of so many images, (rows, ..., channels).

    On a CPU those of each image are a product of their own, compiled or not. MKL takes rows some at a time, six of them
    by its code for AVX2, and sums up the last few of a product in another order.
    """
    if images == 1 or values.device.type != "cpu":
        return F.linear(values, weight, bias)
    if torch.compiler.is_dynamo_compiling():
        return torch.cat([F.linear(rows, weight, bias) for rows in values.chunk(images)])
    result = values.new_empty(*values.shape[:-1], len(weight))
    for rows, made in zip(values.chunk(images), result.chunk(images), strict=True):
        given, place = rows.reshape(-1, values.shape[-1]), made.view(-1, len(weight))
        if bias is None:
            torch.mm(given, weight.t(), out=place)
        else:
            torch.addmm(bias, given, weight.t(), out=place)
    return result


def quantised(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Values in fp8, to be multiplied by `scale`, of shape () or, without a kernel, one that spreads over theirs."""
    if not _runs_kernels(values) or scale.ndim:
        return (values.float() * scale.reciprocal()).clamp(-LARGEST, LARGEST).to(FP8)
    values = values.contiguous()
    result = torch.empty_like(values, dtype=FP8)
    grid = (triton.cdiv(values.numel(), _ELEMENTS),)
    _quantise[grid](values, result, scale, values.numel(), BLOCK=_ELEMENTS)
    return result


@_jit
def _quantise(values, result, scale, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    _store(result + at, tl.load(values + at, mask=inside).to(tl.float32), scale, inside, IN_FP8=True)


@_jit
def _store(places, values, scale, inside, IN_FP8: tl.constexpr):
    if IN_FP8:
        within = tl.minimum(tl.maximum(values * (1.0 / tl.load(scale)), -448.0), 448.0)
        tl.store(places, within.to(tl.float8e4nv), mask=inside)
    else:
        tl.store(places, values.to(places.dtype.element_ty), mask=inside)


def layer_norm(
    values: torch.Tensor,
    more: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`values + more`, of shape (..., width), and that sum with every row normalised, weighted and shifted.

    An `offset`, (width,), is added to what is normalised, and not to the sum.
    """
    if scale is None and cpu_kernels.compute(values, values.shape[-1]):
        return cpu_kernels.layer_norm(values, more, weight, bias, eps)
    if not _runs_kernels(values):
        total = values if more is None else values + more
        row = total if offset is None else (total + offset).to(total.dtype)
        normed = F.layer_norm(row, row.shape[-1:], weight, bias, eps)
        return total, normed if scale is None else quantised(normed, scale)
    width = values.shape[-1]
    total = values if more is None else torch.empty_like(values)
    normed = torch.empty_like(values, dtype=values.dtype if scale is None else FP8)
    _layer_norm[(values.numel() // width,)](
        values, values if more is None else more, weight if offset is None else offset, total, normed, weight, bias,
        weight if scale is None else scale, eps, WIDTH=width, BLOCK=triton.next_power_of_2(width),
        ADDS=more is not None, OFFSETS=offset is not None, IN_FP8=scale is not None, num_warps=1,
    )  # fmt: skip
    return total, normed


@_jit
def _layer_norm(
    values, more, offset, total, normed, weight, bias, scale, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, OFFSETS: tl.constexpr, IN_FP8: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + column
    row = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        summed = (row + tl.load(more + at, mask=inside, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, summed, mask=inside)
        row = summed.to(tl.float32)
    if OFFSETS:
        row += tl.load(offset + column, mask=inside, other=0.0)
    centred = tl.where(inside, row - tl.sum(row) / WIDTH, 0.0)
    result = centred * tl.rsqrt(tl.sum(centred * centred) / WIDTH + eps)
    result = result * tl.load(weight + column, mask=inside).to(tl.float32)
    result += tl.load(bias + column, mask=inside).to(tl.float32)
    _store(normed + at, result, scale, inside, IN_FP8)


def gated_gelu(values: torch.Tensor, scale: torch.Tensor | None = None, images: int = 1) -> torch.Tensor:
    """The first half of every row of (..., 2 * width) times the GELU of the second: GEGLU (Shazeer, 2020).

    On a CPU those of each of so many images by themselves.
    """
    if scale is None and cpu_kernels.compute(values, values.shape[-1] // 2):
        return cpu_kernels.gated_gelu(values)
    if not _runs_kernels(values):
        linear, gate = values.chunk(2, dim=-1)
        gated = by_image(images, lambda linear, gate: F.gelu(gate).mul_(linear), linear, gate)
        return gated if scale is None else quantised(gated, scale)
    width = values.shape[-1] // 2
    result = values.new_empty((*values.shape[:-1], width), dtype=values.dtype if scale is None else FP8)
    block = 512 if width % 1024 else 1024
    _gated_gelu[(values.numel() // (2 * width), triton.cdiv(width, block))](
        values, result, values if scale is None else scale,
        WIDTH=width, BLOCK=block, IN_FP8=scale is not None, num_warps=2,
    )  # fmt: skip
    return result


@_jit
def _gated_gelu(values, result, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr, IN_FP8: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    linear = tl.load(values + row * 2 * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(values + row * 2 * WIDTH + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    _store(result + row * WIDTH + column, linear * gate * _normal(gate), scale, inside, IN_FP8)


@_jit
def _normal(values):
    """The cumulative normal distribution, as a logistic one of a fitted polynomial: a GELU is within 3e-6."""
    square = tl.minimum(values * values, 36.0)
    series = 0.07293758163566465 + square * (
        -0.00024972307333005804 + square * (-6.116205361996092e-05 + square * 2.2381668138143906e-06)
    )
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * values * (1.5956562720514558 + square * series)))


def gated_linear(
    values: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    dtype: torch.dtype,
    scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    result_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """GEGLU of a linear layer, (..., width) in `dtype` or for a `result_scale`, of values (..., channels).

    The weight is (2 * width, channels) and the bias (2 * width,), both `with_gates_between`. In fp8 products are
    multiplied by `scale` and `weight_scale`, of shape ().

    The kernel is for Hopper's copy engine. Its programs go from tile to tile, and read for the next one while they
    finish a tile. What a row comes to depends neither on the others nor on its place.
    """
    if not _runs_kernels(values):
        made = F.linear(values.float(), weight.float())
        if scale is not None and weight_scale is not None:
            made = made * (scale * weight_scale)
        linear, gate = (made + bias).unflatten(-1, (-1, 2)).unbind(-1)
        gated = F.gelu(gate) * linear
        return gated.to(dtype) if result_scale is None else quantised(gated, result_scale)
    rows = values.reshape(-1, values.shape[-1])
    outputs, channels = weight.shape
    result = torch.empty(
        (*values.shape[:-1], outputs // 2), dtype=dtype if result_scale is None else FP8, device=values.device
    )
    tall, wide, deep = _GATED_TILE[0], _GATED_TILE[1], _GATED_TILE[2] // values.element_size()
    tiles = triton.cdiv(len(rows), tall) * triton.cdiv(outputs, wide)
    programs, bounds = 1, (triton.cdiv(channels, deep), tiles, 1)
    if _INTERPRETED:  # where loops begin and end at what Python knows
        bounds = tuple(map(tl.constexpr, bounds))
    else:
        programs = min(tiles, torch.cuda.get_device_properties(values.device).multi_processor_count)
        bounds = *bounds[:2], programs
    _gated_linear[(programs,)](
        TensorDescriptor.from_tensor(rows, [tall, deep]), TensorDescriptor.from_tensor(weight, [wide, deep]), bias,
        values if scale is None else scale, values if weight_scale is None else weight_scale, result,
        values if result_scale is None else result_scale, len(rows), outputs, *bounds,
        ROWS=tall, COLUMNS=wide, DEPTH=deep, GROUP=8, ALONE=programs == 1, SCALES=scale is not None,
        IN_FP8=result_scale is not None, num_warps=8, num_stages=4 if values.element_size() > 1 else 3,
    )  # fmt: skip
    return result


def with_gates_between(weight: torch.Tensor) -> torch.Tensor:
    """The first half of the rows of a weight or a bias, each followed by the one that is its gate, of the second."""
    return torch.stack(weight.chunk(2), dim=1).flatten(0, 1)


_GATED_TILE = 128, 256, 128  # rows and columns before they are gated, and bytes of each sum at a time


@_jit
def _gated_linear(
    values, weight, bias, scale, weight_scale, result, result_scale, rows, outputs, turns, tiles, programs,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, ALONE: tl.constexpr,
    SCALES: tl.constexpr, IN_FP8: tl.constexpr,
):  # fmt: skip
    across, down = tl.cdiv(outputs, COLUMNS), tl.cdiv(rows, ROWS)
    for tile in tl.range(0 if ALONE else tl.program_id(0), tiles, programs, flatten=True):
        # As of `_convolve`: down through a group of tiles, then to the next columns.
        first = tile // (GROUP * across) * GROUP
        tall = tl.minimum(down - first, GROUP)
        top = (first + tile % (GROUP * across) % tall) * ROWS
        left = tile % (GROUP * across) // tall * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for turn in range(turns):
            factors = weight.load([left, turn * DEPTH])
            total = tl.dot(values.load([top, turn * DEPTH]), factors.T, total, input_precision="ieee")
        row = top + tl.arange(0, ROWS)
        halves = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        for half in tl.static_range(2):  # one after the other, for want of registers
            column = left + half * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
            made = halves[half]
            if SCALES:
                made *= tl.load(scale) * tl.load(weight_scale)
            made += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)[None, :]
            linear, gate = tl.split(tl.reshape(made, (ROWS, COLUMNS // 4, 2)))
            place = left // 2 + half * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
            inside = (row < rows)[:, None] & (place < outputs // 2)[None, :]
            at = row.to(tl.int64)[:, None] * (outputs // 2) + place[None, :]
            _store(result + at, linear * gate * _normal(gate), result_scale, inside, IN_FP8)


def cross_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    heads: int,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """What every query, of shape (batch, places, heads * width), takes of a text: (batch, tokens, heads * width) each.

    Texts are short, at most 128 tokens for the kernel: a program has all of one in its registers, and no loop.
    """
    (batch, places, inner), tokens = queries.shape, keys.shape[1]
    width = inner // heads
    if scale is None and cpu_kernels.attend(width) and cpu_kernels.compute(queries, width):
        return cpu_kernels.attention(queries, keys, values, heads)
    if not _runs_kernels(queries) or tokens > 128 or width & (width - 1) or width < 16:
        split = (each.unflatten(-1, (heads, width)).transpose(1, 2) for each in (queries, keys, values))
        taken = F.scaled_dot_product_attention(*split).transpose(1, 2).reshape(batch, places, inner)
        return taken if scale is None else quantised(taken, scale)
    result = torch.empty_like(queries, dtype=queries.dtype if scale is None else FP8)
    most = max(16, triton.next_power_of_2(tokens))
    parts = (64, 16) if 64 < tokens <= 80 else (most, 0)  # 128 for the 77 of CLIP would take a fifth longer
    _cross_attention[(triton.cdiv(places, _QUERIES), heads, batch)](
        queries, keys, values, result, queries if scale is None else scale, places, tokens,
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), width**-0.5 * _LOG2_E,
        INNER=inner, WIDTH=width, QUERIES=_QUERIES, TOKENS=parts[0], MORE=parts[1], IN_FP8=scale is not None,
        num_warps=4,
    )  # fmt: skip
    return result


@_jit
def _cross_attention(
    queries, keys, values, result, scale, places, tokens, key_batch, key_token, value_batch, value_token, factor,
    INNER: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, MORE: tl.constexpr,
    IN_FP8: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    asks = (place < places)[:, None]
    at = (batch * places + place[:, None]) * INNER + channel[None, :]
    query = tl.load(queries + at, mask=asks, other=0.0)
    keys += batch * key_batch
    values += batch * value_batch
    token = tl.arange(0, TOKENS)
    likeness, value = _likeness(query, keys, values, token, tokens, channel, key_token, value_token, factor)
    most = tl.max(likeness, axis=1)
    if MORE:
        token = TOKENS + tl.arange(0, MORE)
        others, more = _likeness(query, keys, values, token, tokens, channel, key_token, value_token, factor)
        most = tl.maximum(most, tl.max(others, axis=1))
    weight = tl.exp2(likeness - most[:, None])
    total = tl.sum(weight, axis=1)
    taken = tl.dot(weight.to(value.dtype), value, input_precision="ieee")
    if MORE:
        weight = tl.exp2(others - most[:, None])
        total += tl.sum(weight, axis=1)
        taken = tl.dot(weight.to(more.dtype), more, taken, input_precision="ieee")
    _store(result + at, taken / total[:, None], scale, asks, IN_FP8)


@_jit
def _likeness(query, keys, values, token, tokens, channel, key_token, value_token, factor):
    """How alike queries and the keys of some tokens are, as powers of two, and the values of these."""
    said = (token < tokens)[:, None]
    key = tl.load(keys + token[:, None] * key_token + channel[None, :], mask=said, other=0.0)
    value = tl.load(values + token[:, None] * value_token + channel[None, :], mask=said, other=0.0)
    likeness = tl.dot(query, tl.trans(key), input_precision="ieee") * factor
    return tl.where((token < tokens)[None, :], likeness, float("-inf")), value


_SCORES = 2**25  # of some queries with all keys, 128 MiB in fp32, which are in memory at a time
_MOST_PLACES = 2**15  # of which one program has all scores of a query in its registers


def attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Self-attention with one wide head: (batch, places, width) each.

    PyTorch's kernels are for heads up to 256 wide, but one that is slower than products which are in memory in between.
    """
    halves = queries.is_cuda and queries.dtype.itemsize == 2
    if not (_runs_kernels(queries) and (halves or _INTERPRETED)) or queries.shape[1] > _MOST_PLACES:
        return F.scaled_dot_product_attention(queries[:, None], keys[:, None], values[:, None])[:, 0]
    at_once = max(1, _SCORES // queries.shape[1])
    taken = torch.empty_like(queries)
    for query, key, value, result in zip(queries, keys, values, taken, strict=True):
        for some, made in zip(query.split(at_once), result.split(at_once), strict=True):
            scores = torch.mm(some, key.t(), out_dtype=torch.float32) if halves else some.float() @ key.t().float()
            torch.mm(softmax(scores, query.shape[-1] ** -0.5, query.dtype), value, out=made)
    return taken


def softmax(scores: torch.Tensor, factor: float, dtype: torch.dtype) -> torch.Tensor:
    """The softmax of every row of `factor * scores`, which are (rows, columns) of fp32, in another precision."""
    if not _runs_kernels(scores):
        return torch.softmax(factor * scores, dim=-1).to(dtype)
    rows, columns = scores.shape
    result = torch.empty_like(scores, dtype=dtype)
    _softmax[(rows,)](
        scores, result, factor * _LOG2_E, COLUMNS=columns, BLOCK=triton.next_power_of_2(columns), num_warps=16
    )
    return result


@_jit
def _softmax(scores, result, factor, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    at, inside = tl.program_id(0).to(tl.int64) * COLUMNS + column, column < COLUMNS
    row = tl.load(scores + at, mask=inside, other=float("-inf")) * factor
    row = tl.exp2(row - tl.max(row))
    tl.store(result + at, (row / tl.sum(row)).to(result.dtype.element_ty), mask=inside)


def group_norm(
    images: torch.Tensor,
    shift: torch.Tensor | None,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool,
    scale: torch.Tensor | None = None,
    border: bool = False,
    together: int = 1,
    more: torch.Tensor | None = None,
) -> torch.Tensor:
    """Group norm of `images + shift`, and its SiLU if so; (batch, channels, height, width) and (batch, channels).

    Images can come in two parts, the last of their channels as `more`: they need not be joined for this. With a
    `border` of zeros around each image, for `convolution`, it is (batch, channels, height + 2, width + 2). On a CPU the
    rows of each of so many as there are `together` are taken by themselves.
    The kernel is for channels-last images. One program finds the mean and the spread of each channel in a tile, another
    those of a group, by the formula of Chan, Golub and LeVeque (1979), which cancels nothing; the last normalises.
    """
    if more is not None and not _runs_kernels(images):
        images, more = torch.cat([images, more], dim=1), None
    batch, first, height, width = images.shape
    others = 0 if more is None else more.shape[1]
    channels = first + others
    edge = 1 if border else 0
    if scale is None and not border and cpu_kernels.compute(images, channels):
        return cpu_kernels.group_norm(images, shift, groups, weight, bias, eps, silu)
    if not _runs_kernels(images):
        shifted = images if shift is None else images + shift[:, :, None, None]

        def normed(rows: torch.Tensor) -> torch.Tensor:
            result = F.group_norm(rows, groups, weight, bias, eps)
            if not (silu and border) or torch.compiler.is_dynamo_compiling():
                result = F.silu(result, inplace=True) if silu else result
                return F.pad(result, [edge] * 4) if border else result
            framed = result.new_zeros(len(rows), height + 2, width + 2, channels).permute(0, 3, 1, 2)
            torch.ops.aten.silu.out(result, out=framed[:, :, 1:-1, 1:-1])  # which is one pass less
            return framed

        result = by_image(together, normed, shifted)
        return result if scale is None else quantised(result, scale)
    images = _channels_last(images)
    parts_of_channels = images, images if more is None else _channels_last(more)
    places, per_group = height * width, channels // groups
    tiles = triton.cdiv(places, _ROWS)
    in_turn = triton.cdiv(tiles, 256)  # tiles of one program
    parts = triton.cdiv(tiles, in_turn)
    across = triton.cdiv(channels, _CHANNELS)
    moments = torch.empty((2, batch, parts, channels), dtype=torch.float32, device=images.device)
    affine = torch.empty((2, batch, channels), dtype=torch.float32, device=images.device)
    result = torch.empty(
        (batch, channels, height + 2 * edge, width + 2 * edge), dtype=images.dtype if scale is None else FP8,
        device=images.device, memory_format=torch.channels_last,
    )  # fmt: skip
    _moments[(parts, across, batch)](
        *parts_of_channels, moments[0], moments[1], places, parts,
        FIRST=first, MORE=others, IN_TURN=in_turn, ROWS=_ROWS, WIDE=_CHANNELS,
    )  # fmt: skip
    _affine[(groups, batch)](
        moments[0], moments[1], *((bias, 0) if shift is None else (shift, shift.stride(0))), weight, bias, affine[0],
        affine[1], eps, places,
        CHANNELS=channels, PER_GROUP=per_group, WIDE=triton.next_power_of_2(per_group),
        PARTS=parts, AT_ONCE=min(32, triton.next_power_of_2(parts)), SPAN=in_turn * _ROWS, SHIFTS=shift is not None,
    )  # fmt: skip
    _normalise[(triton.cdiv(result[0, 0].numel(), _ROWS), across, batch)](
        *parts_of_channels, affine[0], affine[1], result, images if scale is None else scale, height, width,
        FIRST=first, MORE=others, ROWS=_ROWS, WIDE=_CHANNELS, SILU=silu, EDGE=edge, IN_FP8=scale is not None,
    )  # fmt: skip
    return result


@_jit
def _read(images, more, place, channel, inside, FIRST: tl.constexpr, MORE: tl.constexpr):
    """Some channels of some places of images whose first channels are in one tensor, and the others in another."""
    at = place[:, None] * FIRST + channel[None, :]
    values = tl.load(images + at, mask=inside & (channel < FIRST)[None, :], other=0.0).to(tl.float32)
    if MORE:
        at = place[:, None] * MORE + (channel - FIRST)[None, :]
        values += tl.load(more + at, mask=inside & (channel >= FIRST)[None, :], other=0.0).to(tl.float32)
    return values


@_jit
def _moments(
    images, more, means, spreads, places, parts,
    FIRST: tl.constexpr, MORE: tl.constexpr, IN_TURN: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of each channel in a part of an image: its mean, and the sum of squared differences from it."""
    channels: tl.constexpr = FIRST + MORE
    part, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    mean = tl.zeros((WIDE,), tl.float32)
    spread = tl.zeros((WIDE,), tl.float32)
    count = 0.0
    for turn in range(IN_TURN):
        place = (part * IN_TURN + turn) * ROWS + tl.arange(0, ROWS)
        inside = (place < places)[:, None] & (channel < channels)[None, :]
        here = tl.minimum(places - (part * IN_TURN + turn) * ROWS, ROWS).to(tl.float32)
        if here > 0:
            tile = _read(images, more, batch * places + place, channel, inside, FIRST, MORE)
            tile_mean = tl.sum(tile, axis=0) / here
            centred = tl.where(inside, tile - tile_mean[None, :], 0.0)
            away = tile_mean - mean
            both = count + here
            spread += tl.sum(centred * centred, axis=0) + away * away * (count * here / both)
            mean += away * (here / both)
            count = both
    at = (batch * parts + part) * channels + channel
    tl.store(means + at, mean, mask=channel < channels)
    tl.store(spreads + at, spread, mask=channel < channels)


@_jit
def _affine(
    means, spreads, shift, shift_batch, weight, bias, factors, addends, eps, places,
    CHANNELS: tl.constexpr, PER_GROUP: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, AT_ONCE: tl.constexpr,
    SPAN: tl.constexpr, SHIFTS: tl.constexpr,
):  # fmt: skip
    """What each channel of a group is to be multiplied by, and what is then to be added."""
    group, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    of_group = tl.arange(0, WIDE)
    channel = group * PER_GROUP + of_group
    is_channel = of_group < PER_GROUP
    moved = tl.zeros((WIDE,), tl.float32)
    if SHIFTS:
        moved = tl.load(shift + batch * shift_batch + channel, mask=is_channel, other=0.0).to(tl.float32)

    total = 0.0
    for first in range(0, PARTS, AT_ONCE):
        at, inside, mean, counts = _parts(
            means, first, moved, batch, channel, is_channel, places, CHANNELS, PARTS, AT_ONCE, SPAN
        )  # fmt: skip
        total += tl.sum(tl.where(inside, mean * counts, 0.0))
    count = places * PER_GROUP
    middle = total / count

    spread = 0.0
    for first in range(0, PARTS, AT_ONCE):
        at, inside, mean, counts = _parts(
            means, first, moved, batch, channel, is_channel, places, CHANNELS, PARTS, AT_ONCE, SPAN
        )  # fmt: skip
        away = mean - middle
        spread += tl.sum(tl.where(inside, tl.load(spreads + at, mask=inside, other=0.0) + away * away * counts, 0.0))
    factor = tl.rsqrt(spread / count + eps) * tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32)
    addend = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32) + (moved - middle) * factor
    tl.store(factors + batch * CHANNELS + channel, factor, mask=is_channel)
    tl.store(addends + batch * CHANNELS + channel, addend, mask=is_channel)


@_jit
def _parts(
    means, first, moved, batch, channel, is_channel, places,
    CHANNELS: tl.constexpr, PARTS: tl.constexpr, AT_ONCE: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Where the moments of some parts of an image are, which of those there are, their means and numbers of places."""
    part = first + tl.arange(0, AT_ONCE)
    inside = (part < PARTS)[:, None] & is_channel[None, :]
    at = (batch * PARTS + part[:, None]) * CHANNELS + channel[None, :]
    mean = tl.load(means + at, mask=inside, other=0.0) + moved[None, :]
    return at, inside, mean, tl.minimum(places - part * SPAN, SPAN).to(tl.float32)[:, None]


@_jit
def _normalise(
    images, more, factors, addends, result, scale, height, width,
    FIRST: tl.constexpr, MORE: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, SILU: tl.constexpr,
    EDGE: tl.constexpr, IN_FP8: tl.constexpr,
):  # fmt: skip
    channels: tl.constexpr = FIRST + MORE
    place, batch = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    is_channel = channel < channels
    places = (height + 2 * EDGE) * (width + 2 * EDGE)  # of the result
    inside = (place < places)[:, None] & is_channel[None, :]
    source, within = batch * places + place, inside
    if EDGE:
        source, is_inner = _without_border(place, batch, height, width)
        within = inside & is_inner[:, None]
    factor = tl.load(factors + batch * channels + channel, mask=is_channel, other=0.0)
    addend = tl.load(addends + batch * channels + channel, mask=is_channel, other=0.0)
    values = _read(images, more, source, channel, within, FIRST, MORE)
    normed = values * factor[None, :] + addend[None, :]
    if SILU:
        normed = normed / (1.0 + tl.exp(-normed))
    if EDGE:
        normed = tl.where(within, normed, 0.0)
    at = (batch * places + place[:, None]) * channels + channel[None, :]
    _store(result + at, normed, scale, inside, IN_FP8)


@_jit
def _without_border(place, batch, height, width):
    """Where a place of an image with a border is among those of all images without, and whether it is there at all."""
    down, right = place // (width + 2) - 1, place % (width + 2) - 1
    is_inner = (down >= 0) & (down < height) & (right >= 0) & (right < width)
    return (batch * height + down) * width + right, is_inner


def bordered(images: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Images, (batch, channels, height, width), with a border of zeros around each, for `convolution`."""
    if not _runs_kernels(images):
        result = F.pad(images, [1] * 4)
        return result if scale is None else quantised(result, scale)
    images = _channels_last(images)
    batch, channels, height, width = images.shape
    result = torch.empty(
        (batch, channels, height + 2, width + 2), dtype=images.dtype if scale is None else FP8,
        device=images.device, memory_format=torch.channels_last,
    )  # fmt: skip
    _border[(triton.cdiv(result[0, 0].numel(), _ROWS), triton.cdiv(channels, _CHANNELS), batch)](
        images, result, images if scale is None else scale, height, width,
        CHANNELS=channels, ROWS=_ROWS, WIDE=_CHANNELS, IN_FP8=scale is not None,
    )  # fmt: skip
    return result


@_jit
def _border(
    images, result, scale, height, width,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, IN_FP8: tl.constexpr,
):  # fmt: skip
    place, batch = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    places = (height + 2) * (width + 2)
    inside = (place < places)[:, None] & (channel < CHANNELS)[None, :]
    source, is_inner = _without_border(place, batch, height, width)
    at = source[:, None] * CHANNELS + channel[None, :]
    values = tl.load(images + at, mask=inside & is_inner[:, None], other=0.0).to(tl.float32)
    _store(result + (batch * places + place[:, None]) * CHANNELS + channel[None, :], values, scale, inside, IN_FP8)


class Tile(NamedTuple):
    """How a convolution is shared out: `rows` x `columns` outputs to a program, `depth` of each sum at a time.

    Columns are the sum of two powers of two, of which the second may be 0: SDXL's widths are multiples of 320 or 192.
    Programs that run one after the other take `group` tiles of rows in turn, to read what is in the cache. With
    `split`s above 1 so many programs share the sums of a tile, which a kernel of its own adds up.
    """

    rows: int
    columns: tuple[int, int]
    depth: int
    group: int
    split: int
    warps: int
    stages: int


_MULTIPROCESSORS = 132  # of an H100 and an H200, and as if of every card: sums are to be split up alike on all
_SPLITS = (1, 2, 3, 4)

# What was the fastest on an H200 for 3 x 3 weights of the widths of SDXL, with lines of 64 or 128 bytes for the depth.
_TILES_IN_FP8 = (
    Tile(128, (256, 64), 64, group=8, split=1, warps=8, stages=6),
    Tile(64, (256, 64), 128, group=8, split=1, warps=4, stages=4),
    Tile(64, (256, 0), 128, group=8, split=1, warps=4, stages=4),
    Tile(128, (128, 0), 128, group=8, split=1, warps=4, stages=3),
    Tile(128, (128, 64), 128, group=8, split=1, warps=8, stages=4),
    Tile(64, (128, 64), 128, group=8, split=1, warps=4, stages=4),
)
_TILES = (
    Tile(128, (256, 64), 64, group=8, split=1, warps=8, stages=3),
    Tile(256, (128, 0), 64, group=8, split=1, warps=8, stages=4),
    Tile(256, (128, 64), 64, group=8, split=1, warps=8, stages=4),
    Tile(128, (128, 64), 64, group=8, split=1, warps=8, stages=4),
)


def phases(kernel: int) -> int:
    """How many convolutions a `convolution` by weights of kernel x kernel is: one, or those of an enlarged image."""
    return 4 if kernel == 2 else 1


def _tile(rows: int, channels: int, outputs: int, kernel: int, in_fp8: bool) -> Tile:
    """What is fast for so many pixels and channels: the tile that leaves the busiest multiprocessor the least to do.

    All of those above take about as long for an output, so what counts is how well they fill the outputs and the
    multiprocessors. Of those that are as good the first is taken.
    """

    def work(tile: Tile) -> float:
        in_turn: int = triton.cdiv(_programs(tile, rows, outputs, kernel) * tile.split, _MULTIPROCESSORS)
        adding_up = 1 + 0.1 * (tile.split - 1)
        return in_turn * tile.rows * sum(tile.columns) / tile.split * adding_up

    tiles = (tile._replace(split=split) for tile in (_TILES_IN_FP8 if in_fp8 else _TILES) for split in _SPLITS)
    return min((tile for tile in tiles if _steps(tile, channels, kernel) % tile.split == 0), key=work)


def _programs(tile: Tile, rows: int, outputs: int, kernel: int) -> int:
    """How many tiles so many pixels have."""
    programs: int = triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, sum(tile.columns)) * phases(kernel)
    return programs


def is_one_round(rows: int, channels: int, outputs: int) -> bool:
    """Whether a convolution of so many pixels by 3 x 3 weights in half precision is one tile to each multiprocessor.

    Then the kernel is faster than cuDNN, by a tenth of the time and by what is added at the end.
    """
    tile = _tile(rows, channels, outputs, 3, in_fp8=False)
    programs = _programs(tile, rows, outputs, 3)
    return tile.split == 1 and 0.9 * _MULTIPROCESSORS < programs <= _MULTIPROCESSORS


def _steps(tile: Tile, channels: int, kernel: int) -> int:
    """In how many steps the sums of a tile are added up. Each is in one of the lines of the weight."""
    steps: int = kernel * triton.cdiv(kernel * channels, tile.depth)
    return steps


def convolves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `convolution` without scales, which depends on no place in the batch, keeps up with cuDNN's there."""
    return _is_for_hopper(device, dtype)


def gates(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a kernel of `gated_linear` for networks in this precision, or made of them in fp8."""
    return _is_for_hopper(device, dtype)


def _is_for_hopper(device: torch.device, dtype: torch.dtype) -> bool:
    """Tiles are for Hopper, and for products in half precision: those in fp32 would have no tensor cores."""
    return triton is not None and dtype.itemsize == 2 and is_hopper(device)


def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def convolution(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    kept: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The 3 x 3 convolution of images with a border, (batch, channels, height + 2, width + 2), plus what is `kept`.

    The weight is (outputs, channels, 3, 3), `kept` and the result are (batch, outputs, height, width). Or the weight is
    (4 * outputs, channels, 2, 2), for the phases of images enlarged to twice their sides as of `interleaved`, and both
    are (batch, outputs, 2 * height, 2 * width). In fp8 the sums are multiplied by `scale`, of shape (), and
    `weight_scale`, (outputs,).

    The kernel is for tensors in channels-last order and multiplies matrices: the pixels under a line of the weight lie
    in a row, as it does, and under its next line the same distance further for every pixel. An image's bytes depend
    neither on the others nor on its place.
    """
    kernel = weight.shape[-1]
    if not _runs_kernels(images):
        summed = F.conv2d(images.float(), weight.float())
        if phases(kernel) > 1:
            summed = _interleaved(summed)
        if scale is not None and weight_scale is not None:
            summed = summed * (scale * weight_scale)[:, None, None]
        if bias is not None:
            summed = summed + bias[:, None, None]
        return (summed if kept is None else summed + kept).to(dtype)
    images, weight = _channels_last(images), _channels_last(weight)
    kept = None if kept is None else _channels_last(kept)
    batch, channels, height, width = images.shape
    outputs, side = len(weight) // phases(kernel), 2 if phases(kernel) > 1 else 1
    shape = (batch, outputs, side * (height - 2), side * (width - 2))
    result = torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    tile = _tile(batch * (height - 2) * (width - 2), channels, outputs, kernel, scale is not None)
    convolve(tile, images, weight, bias, kept, scale, weight_scale, result)
    return result


def convolve(
    tile: Tile,
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kept: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    result: torch.Tensor,
) -> None:
    """Write into `result` what a convolution makes, all in channels-last order, by tiles of this kind."""
    batch, channels, height, width = images.shape[0], images.shape[1], images.shape[2] - 2, images.shape[3] - 2
    outputs, kernel, rows = result.shape[1], weight.shape[-1], batch * height * width
    programs = _programs(tile, rows, outputs, kernel)
    finishing = (
        images if scale is None else scale, images if weight_scale is None else weight_scale,
        images if bias is None else bias, images if kept is None else kept, result,
    )  # fmt: skip
    which = {"SCALES": scale is not None, "SHIFTS": bias is not None, "ADDS": kept is not None}
    split = tile.split
    steps, left = divmod(_steps(tile, channels, kernel), split)
    if left:
        raise ValueError(f"{channels} channels cannot be added up in {split} equal parts")
    stages = tile.stages
    if _INTERPRETED:  # where loops end at what Python knows
        steps = tl.constexpr(steps)
    else:  # Ada has less than half of what Hopper's multiprocessors share
        stage = (tile.rows + sum(tile.columns)) * tile.depth * images.element_size()
        device = torch.cuda.get_device_properties(images.device)
        room = device.shared_memory_per_block_optin  # type: ignore[attr-defined]  # PyTorch does not tell mypy of it
        stages = min(stages, room // stage)
    places = phases(kernel) * rows  # of the result
    sums = images if split == 1 else torch.empty((split, places, outputs), dtype=torch.float32, device=images.device)
    _convolve[(programs, split)](
        images, weight, *finishing, sums, rows, height, width, channels, outputs, steps,
        ROWS=tile.rows, COLUMNS=tile.columns[0], MORE=tile.columns[1], DEPTH=tile.depth, GROUP=tile.group, SPLIT=split,
        KERNEL=kernel, WHOLE=kernel * channels % tile.depth == 0, **which, num_warps=tile.warps, num_stages=stages,
    )  # fmt: skip
    if split > 1:
        _add_up[(triton.cdiv(places * outputs, _ELEMENTS),)](
            sums, *finishing, places, outputs, SPLIT=split, BLOCK=_ELEMENTS, **which
        )


@_jit
def _convolve(
    images, weight, scale, weight_scale, bias, kept, result, sums, rows, height, width, channels, outputs, steps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MORE: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    SPLIT: tl.constexpr, KERNEL: tl.constexpr, WHOLE: tl.constexpr, SCALES: tl.constexpr, SHIFTS: tl.constexpr,
    ADDS: tl.constexpr,
):  # fmt: skip
    # Programs go down through a group of tiles, then to the next columns, and last to those of the next phase.
    across = tl.cdiv(outputs, COLUMNS + MORE)
    tiles = across * 4 if KERNEL == 2 else across
    first = tl.program_id(0) // (GROUP * tiles) * GROUP
    tall = tl.minimum(tl.cdiv(rows, ROWS) - first, GROUP)
    in_group = tl.program_id(0) % (GROUP * tiles)
    row = (first + in_group % tall) * ROWS + tl.arange(0, ROWS)
    left = in_group // tall
    if KERNEL == 2:
        phase, left = left // across, left % across
    left *= COLUMNS + MORE
    column, another = left + tl.arange(0, COLUMNS), left + COLUMNS + tl.arange(0, MORE if MORE else COLUMNS)

    # Beyond the last row and column the last is read again: what comes of it is not stored.
    place = tl.minimum(row, rows - 1)
    line = place // width
    corner = (line + line // height * 2).to(tl.int64) * (width + 2) + place % width
    if KERNEL == 2:
        corner += phase // 2 * (width + 2) + phase % 2
        weight += phase * outputs * (4 * channels)
    deep = tl.arange(0, DEPTH)
    pixels = images + corner[:, None] * channels + deep[None, :]
    weights = weight + tl.minimum(column, outputs - 1)[None, :] * (KERNEL * KERNEL * channels) + deep[:, None]
    others = weight + tl.minimum(another, outputs - 1)[None, :] * (KERNEL * KERNEL * channels) + deep[:, None]

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    more = tl.zeros((ROWS, MORE if MORE else 1), tl.float32)
    turns = tl.cdiv(KERNEL * channels, DEPTH)  # of a line of the weight
    for step in range(steps):
        turn = tl.program_id(1) * steps + step
        down = (turn >= turns).to(tl.int32)
        if KERNEL == 3:
            down += (turn >= 2 * turns).to(tl.int32)
        within = (turn - down * turns) * DEPTH
        pixel_at, weight_at = down * ((width + 2) * channels) + within, down * (KERNEL * channels) + within
        if WHOLE:
            values = tl.load(pixels + pixel_at)
            total = tl.dot(values, tl.load(weights + weight_at), total, input_precision="ieee")
            if MORE:
                more = tl.dot(values, tl.load(others + weight_at), more, input_precision="ieee")
        else:
            inside = within + deep < KERNEL * channels
            values = tl.load(pixels + pixel_at, mask=inside[None, :], other=0.0)
            factors = tl.load(weights + weight_at, mask=inside[:, None], other=0.0)
            total = tl.dot(values, factors, total, input_precision="ieee")
            if MORE:
                factors = tl.load(others + weight_at, mask=inside[:, None], other=0.0)
                more = tl.dot(values, factors, more, input_precision="ieee")

    if KERNEL == 2:  # where those of the phase are in the result, and beyond its end those beyond the last
        above = row // width * 2 + phase // 2
        row = tl.where(row < rows, above * (2 * width) + row % width * 2 + phase % 2, 4 * rows)
        rows = 4 * rows
    row = row.to(tl.int64)
    if SPLIT > 1:
        _keep(total, sums, row + tl.program_id(1).to(tl.int64) * rows, column, row < rows, outputs)
        if MORE:
            _keep(more, sums, row + tl.program_id(1).to(tl.int64) * rows, another, row < rows, outputs)
    else:
        _finish(
            total, scale, weight_scale, bias, kept, result, row, left, rows, outputs, COLUMNS, SCALES, SHIFTS, ADDS
        )  # fmt: skip
        if MORE:
            _finish(
                more, scale, weight_scale, bias, kept, result, row, left + COLUMNS, rows, outputs, MORE, SCALES, SHIFTS,
                ADDS,
            )  # fmt: skip


@_jit
def _keep(total, sums, row, column, is_row, outputs):
    tl.store(sums + row[:, None] * outputs + column[None, :], total, mask=is_row[:, None] & (column < outputs)[None, :])


@_jit
def _finish(
    total, scale, weight_scale, bias, kept, result, row, left, rows, outputs,
    COLUMNS: tl.constexpr, SCALES: tl.constexpr, SHIFTS: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    if COLUMNS > 64:  # one part after the other: all that is kept would not be in registers beside the sums
        halves = tl.split(tl.permute(tl.reshape(total, (total.shape[0], 2, COLUMNS // 2)), (0, 2, 1)))
        for half in tl.static_range(2):
            _finish(
                halves[half], scale, weight_scale, bias, kept, result, row, left + half * (COLUMNS // 2), rows, outputs,
                COLUMNS // 2, SCALES, SHIFTS, ADDS,
            )  # fmt: skip
    else:
        column = left + tl.arange(0, COLUMNS)
        is_column = column < outputs
        inside = (row < rows)[:, None] & is_column[None, :]
        at = row[:, None] * outputs + column[None, :]
        if SCALES:
            total *= (tl.load(scale) * tl.load(weight_scale + column, mask=is_column, other=0.0))[None, :]
        if SHIFTS:
            total += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        if ADDS:
            total += tl.load(kept + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(result + at, total.to(result.dtype.element_ty), mask=inside)


@_jit
def _add_up(
    sums, scale, weight_scale, bias, kept, result, rows, outputs,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, SCALES: tl.constexpr, SHIFTS: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, column = at < rows * outputs, at % outputs
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(sums + part * rows * outputs + at, mask=inside, other=0.0)
    if SCALES:
        total *= tl.load(scale) * tl.load(weight_scale + column)
    if SHIFTS:
        total += tl.load(bias + column).to(tl.float32)
    if ADDS:
        total += tl.load(kept + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + at, total.to(result.dtype.element_ty), mask=inside)


def add(images: torch.Tensor, bias: torch.Tensor, more: torch.Tensor | None = None) -> torch.Tensor:
    """Images, (batch, channels, height, width), and `bias`, (channels,), and `more` images where there are any."""
    if not _runs_kernels(images):
        summed = images + bias[:, None, None]
        return summed if more is None else summed.add_(more)
    images, more = _channels_last(images), None if more is None else _channels_last(more)
    result = torch.empty_like(images)
    grid = (triton.cdiv(images.numel(), _ELEMENTS),)
    _add[grid](
        images, bias, images if more is None else more, result, images.numel(),
        CHANNELS=images.shape[1], ADDS=more is not None, BLOCK=_ELEMENTS,
    )  # fmt: skip
    return result


@_jit
def _add(
    images, bias, more, result, count, CHANNELS: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    inside = at < count
    summed = tl.load(images + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        summed += tl.load(more + at, mask=inside, other=0.0).to(tl.float32)
    summed += tl.load(bias + ((first % CHANNELS).to(tl.int32) + tl.arange(0, BLOCK)) % CHANNELS).to(tl.float32)
    tl.store(result + at, summed.to(result.dtype.element_ty), mask=inside)


def interleaved(images: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Images that were convolved phase by phase, (batch, outputs, 2 * height, 2 * width), and a bias, (outputs,).

    Phase 2 * a + b is that of the pixels at (2 * i + a, 2 * j + b). The given images have it at (i + a, j + b) in a
    quarter of their channels: they are (batch, 4 * outputs, height + 1, width + 1), as with a padding of 1.
    """
    if not _runs_kernels(images):
        return _interleaved(images) + bias[:, None, None]
    images = _channels_last(images)
    batch, _, lines, line = images.shape
    shape = (batch, len(bias), 2 * (lines - 1), 2 * (line - 1))
    result = torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=torch.channels_last)
    _interleave[(triton.cdiv(result[0, 0].numel(), _ROWS), triton.cdiv(len(bias), _CHANNELS), batch)](
        images, bias, result, lines - 1, line - 1, CHANNELS=len(bias), ROWS=_ROWS, WIDE=_CHANNELS
    )
    return result


def _interleaved(images: torch.Tensor) -> torch.Tensor:
    outputs, height, width = images.shape[1] // 4, images.shape[2] - 1, images.shape[3] - 1
    each = images.unflatten(1, (2, 2, outputs))
    cut = [each[:, down, right, :, down:, right:][..., :height, :width] for down in range(2) for right in range(2)]
    return F.pixel_shuffle(torch.stack(cut, dim=2).flatten(1, 2), 2)


@_jit
def _interleave(
    images, bias, result, height, width, CHANNELS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    place, batch = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    is_channel = channel < CHANNELS
    places = 4 * height * width
    inside = (place < places)[:, None] & is_channel[None, :]
    down, right = place // (2 * width), place % (2 * width)
    source = (batch * (height + 1) + down // 2 + down % 2) * (width + 1) + right // 2 + right % 2
    at = (source * 4 + down % 2 * 2 + right % 2)[:, None] * CHANNELS + channel[None, :]
    values = tl.load(images + at, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    at = (batch * places + place[:, None]) * CHANNELS + channel[None, :]
    tl.store(result + at, values.to(result.dtype.element_ty), mask=inside)


def _channels_last(images: torch.Tensor) -> torch.Tensor:
    return images.contiguous(memory_format=torch.channels_last)
