"""What a step of a U-Net does between its matrix products, each in one pass over its bytes.

Every function is a plain PyTorch reference and, for CUDA, a kernel in Triton that computes the same in fp32 and rounds
once; tests compare the two. Where a function takes `scale`, what it makes is for a product in fp8: divided by it, kept
within what e4m3 can hold, 448 at most, and rounded to that. A row, an image or a group is summed up by one program in
one order, so that what it comes to depends neither on its neighbours nor on the run.
"""

from __future__ import annotations  # those of the kernels are read, and never evaluated, by Triton

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
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


def by_row(function: Callable[..., torch.Tensor], *values: torch.Tensor) -> torch.Tensor:
    """What a function makes of values of shape (rows, ...), on the CPU of each row by itself.

    torch shares the values of SiLU and GELU, and the places of a group norm, out to a CPU's threads without regard to
    rows, and where the threads' shares end they round otherwise: a row's bytes would depend on its place among others.
    Compiled code is not made of these functions, and has no such shares.
    """
    if len(values[0]) == 1 or values[0].device.type != "cpu" or torch.compiler.is_compiling():
        return function(*values)
    return torch.cat([function(*row) for row in zip(*(each.split(1) for each in values), strict=True)])


def quantised(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Values in fp8, to be multiplied by `scale`, of shape ()."""
    if not _runs_kernels(values):
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """`values + more`, of shape (..., width), and that sum with every row normalised, weighted and shifted."""
    if not _runs_kernels(values):
        total = values if more is None else values + more
        normed = F.layer_norm(total, total.shape[-1:], weight, bias, eps)
        return total, normed if scale is None else quantised(normed, scale)
    width = values.shape[-1]
    total = values if more is None else torch.empty_like(values)
    normed = torch.empty_like(values, dtype=values.dtype if scale is None else FP8)
    _layer_norm[(values.numel() // width,)](
        values, values if more is None else more, total, normed, weight, bias, weight if scale is None else scale, eps,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), ADDS=more is not None, IN_FP8=scale is not None, num_warps=1,
    )  # fmt: skip
    return total, normed


@_jit
def _layer_norm(
    values, more, total, normed, weight, bias, scale, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, IN_FP8: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + column
    row = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        summed = (row + tl.load(more + at, mask=inside, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, summed, mask=inside)
        row = summed.to(tl.float32)
    centred = tl.where(inside, row - tl.sum(row) / WIDTH, 0.0)
    result = centred * tl.rsqrt(tl.sum(centred * centred) / WIDTH + eps)
    result = result * tl.load(weight + column, mask=inside).to(tl.float32)
    result += tl.load(bias + column, mask=inside).to(tl.float32)
    _store(normed + at, result, scale, inside, IN_FP8)


def gated_gelu(values: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """The first half of every row of (..., 2 * width) times the GELU of the second: GEGLU (Shazeer, 2020)."""
    if not _runs_kernels(values):
        linear, gate = values.chunk(2, dim=-1)
        gated = by_row(lambda linear, gate: linear * F.gelu(gate), linear, gate)
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
    """The cumulative normal distribution, by formula 26.2.17 of Abramowitz and Stegun (1964), within 7.5e-8."""
    size = tl.abs(values)
    t = 1.0 / (1.0 + 0.2316419 * size)
    series = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    tail = 0.3989422804014327 * tl.exp(-0.5 * size * size) * series
    return tl.where(values > 0, 1.0 - tail, tail)


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
    if not _runs_kernels(queries) or tokens > 128 or width & (width - 1) or width < 16:
        split = (each.unflatten(-1, (heads, width)).transpose(1, 2) for each in (queries, keys, values))
        taken = F.scaled_dot_product_attention(*split).transpose(1, 2).reshape(batch, places, inner)
        return taken if scale is None else quantised(taken, scale)
    result = torch.empty_like(queries, dtype=queries.dtype if scale is None else FP8)
    _cross_attention[(triton.cdiv(places, _QUERIES), heads, batch)](
        queries, keys, values, result, queries if scale is None else scale, places, tokens,
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), width**-0.5 * _LOG2_E,
        INNER=inner, WIDTH=width, QUERIES=_QUERIES, TOKENS=max(16, triton.next_power_of_2(tokens)),
        IN_FP8=scale is not None,
        num_warps=4,
    )  # fmt: skip
    return result


@_jit
def _cross_attention(
    queries, keys, values, result, scale, places, tokens, key_batch, key_token, value_batch, value_token, factor,
    INNER: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr,
    IN_FP8: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    batch = tl.program_id(2).to(tl.int64)
    token, channel = tl.arange(0, TOKENS), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    asks, said = (place < places)[:, None], (token < tokens)[:, None]
    at = (batch * places + place[:, None]) * INNER + channel[None, :]
    query = tl.load(queries + at, mask=asks, other=0.0)
    key = tl.load(keys + batch * key_batch + token[:, None] * key_token + channel[None, :], mask=said, other=0.0)
    value = tl.load(
        values + batch * value_batch + token[:, None] * value_token + channel[None, :], mask=said, other=0.0
    )
    likeness = tl.dot(query, tl.trans(key), input_precision="ieee") * factor
    likeness = tl.where((token < tokens)[None, :], likeness, float("-inf"))
    weight = tl.exp2(likeness - tl.max(likeness, axis=1)[:, None])
    taken = tl.dot(weight.to(value.dtype), value, input_precision="ieee") / tl.sum(weight, axis=1)[:, None]
    _store(result + at, taken, scale, asks, IN_FP8)


def group_norm(
    images: torch.Tensor,
    shift: torch.Tensor | None,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool,
) -> torch.Tensor:
    """Group norm of `images + shift`, and its SiLU if so; (batch, channels, height, width) and (batch, channels).

    The kernel is for channels-last images. One program finds the mean and the spread of each channel in a tile, another
    those of a group, by the formula of Chan, Golub and LeVeque (1979), which cancels nothing; the last normalises.
    """
    batch, channels, height, width = images.shape
    if not _runs_kernels(images):
        shifted = images if shift is None else images + shift[:, :, None, None]

        def normed(rows: torch.Tensor) -> torch.Tensor:
            result = F.group_norm(rows, groups, weight, bias, eps)
            return F.silu(result, inplace=True) if silu else result

        return by_row(normed, shifted)
    images = _channels_last(images)
    places, per_group = height * width, channels // groups
    tiles = triton.cdiv(places, _ROWS)
    in_turn = triton.cdiv(tiles, 256)  # tiles of one program
    parts = triton.cdiv(tiles, in_turn)
    across = triton.cdiv(channels, _CHANNELS)
    moments = torch.empty((2, batch, parts, channels), dtype=torch.float32, device=images.device)
    affine = torch.empty((2, batch, channels), dtype=torch.float32, device=images.device)
    result = torch.empty_like(images)
    _moments[(parts, across, batch)](
        images, moments[0], moments[1], places, parts, CHANNELS=channels, IN_TURN=in_turn, ROWS=_ROWS, WIDE=_CHANNELS
    )
    _affine[(groups, batch)](
        moments[0], moments[1], *((bias, 0) if shift is None else (shift, shift.stride(0))), weight, bias, affine[0],
        affine[1], eps, places,
        CHANNELS=channels, PER_GROUP=per_group, WIDE=triton.next_power_of_2(per_group),
        PARTS=parts, AT_ONCE=min(32, triton.next_power_of_2(parts)), SPAN=in_turn * _ROWS, SHIFTS=shift is not None,
    )  # fmt: skip
    _normalise[(tiles, across, batch)](
        images, affine[0], affine[1], result, places, CHANNELS=channels, ROWS=_ROWS, WIDE=_CHANNELS, SILU=silu
    )
    return result


@_jit
def _moments(
    images, means, spreads, places, parts,
    CHANNELS: tl.constexpr, IN_TURN: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of each channel in a part of an image: its mean, and the sum of squared differences from it."""
    part, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    mean = tl.zeros((WIDE,), tl.float32)
    spread = tl.zeros((WIDE,), tl.float32)
    count = 0.0
    for turn in range(IN_TURN):
        place = (part * IN_TURN + turn) * ROWS + tl.arange(0, ROWS)
        inside = (place < places)[:, None] & (channel < CHANNELS)[None, :]
        here = tl.minimum(places - (part * IN_TURN + turn) * ROWS, ROWS).to(tl.float32)
        if here > 0:
            at = (batch * places + place[:, None]) * CHANNELS + channel[None, :]
            tile = tl.load(images + at, mask=inside, other=0.0).to(tl.float32)
            tile_mean = tl.sum(tile, axis=0) / here
            centred = tl.where(inside, tile - tile_mean[None, :], 0.0)
            away = tile_mean - mean
            both = count + here
            spread += tl.sum(centred * centred, axis=0) + away * away * (count * here / both)
            mean += away * (here / both)
            count = both
    at = (batch * parts + part) * CHANNELS + channel
    tl.store(means + at, mean, mask=channel < CHANNELS)
    tl.store(spreads + at, spread, mask=channel < CHANNELS)


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
        part = first + tl.arange(0, AT_ONCE)
        inside = (part < PARTS)[:, None] & is_channel[None, :]
        weights = tl.minimum(places - part * SPAN, SPAN).to(tl.float32)[:, None]
        at = (batch * PARTS + part[:, None]) * CHANNELS + channel[None, :]
        mean = tl.load(means + at, mask=inside, other=0.0) + moved[None, :]
        total += tl.sum(tl.where(inside, mean * weights, 0.0))
    count = places * PER_GROUP
    middle = total / count

    spread = 0.0
    for first in range(0, PARTS, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        inside = (part < PARTS)[:, None] & is_channel[None, :]
        weights = tl.minimum(places - part * SPAN, SPAN).to(tl.float32)[:, None]
        at = (batch * PARTS + part[:, None]) * CHANNELS + channel[None, :]
        away = tl.load(means + at, mask=inside, other=0.0) + moved[None, :] - middle
        spread += tl.sum(tl.where(inside, tl.load(spreads + at, mask=inside, other=0.0) + away * away * weights, 0.0))
    factor = tl.rsqrt(spread / count + eps) * tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32)
    addend = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32) + (moved - middle) * factor
    tl.store(factors + batch * CHANNELS + channel, factor, mask=is_channel)
    tl.store(addends + batch * CHANNELS + channel, addend, mask=is_channel)


@_jit
def _normalise(
    images, factors, addends, result, places,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    place, batch = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    is_channel = channel < CHANNELS
    inside = (place < places)[:, None] & is_channel[None, :]
    at = (batch * places + place[:, None]) * CHANNELS + channel[None, :]
    factor = tl.load(factors + batch * CHANNELS + channel, mask=is_channel, other=0.0)
    addend = tl.load(addends + batch * CHANNELS + channel, mask=is_channel, other=0.0)
    normed = tl.load(images + at, mask=inside, other=0.0).to(tl.float32) * factor[None, :] + addend[None, :]
    if SILU:
        normed = normed / (1.0 + tl.exp(-normed))
    tl.store(result + at, normed.to(result.dtype.element_ty), mask=inside)


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


def doubled(images: torch.Tensor) -> torch.Tensor:
    """Images, (batch, channels, height, width), of twice the height and width: every pixel four times."""
    if not _runs_kernels(images):
        return F.interpolate(images, scale_factor=2.0, mode="nearest")
    images = _channels_last(images)
    batch, channels, height, width = images.shape
    shape = (batch, channels, 2 * height, 2 * width)
    result = torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=torch.channels_last)
    grid = (height * width, triton.cdiv(channels, 512), batch)
    _double[grid](images, result, height * width, width, CHANNELS=channels, WIDE=512, num_warps=1)
    return result


@_jit
def _double(images, result, places, width, CHANNELS: tl.constexpr, WIDE: tl.constexpr):
    place, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = channel < CHANNELS
    values = tl.load(images + (batch * places + place) * CHANNELS + channel, mask=inside)
    corner = batch * 4 * places + (place // width) * 4 * width + (place % width) * 2
    for down in tl.static_range(2):
        for right in tl.static_range(2):
            at = (corner + down * 2 * width + right) * CHANNELS + channel
            tl.store(result + at, values, mask=inside)


def _channels_last(images: torch.Tensor) -> torch.Tensor:
    return images.contiguous(memory_format=torch.channels_last)
