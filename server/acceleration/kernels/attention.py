"""Attention: of a transformer with itself, of it with a short text, and of a decoder with one wide head."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from server.acceleration.kernels import cpu, fp8
from server.acceleration.kernels.common import INTERPRETED, LOG2_E, jit, runs_triton, tl, triton
from server.acceleration.kernels.fp8 import FP8, store

_TILE_QUERIES = 64  # per program of the cross-attention kernel
_MAX_TOKENS = 128  # of a text that a program holds in registers
_MAX_SCORES = 2**25  # of some queries with all keys, in memory at a time: 128 MiB in fp32
_MAX_POSITIONS = 2**15  # a program holds all scores of one query in registers


def self_attention(projected: torch.Tensor, heads: int, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Return the attention (batch, positions, inner) of queries, keys and values, (batch, positions, 3 * inner)."""
    batch, positions, width = projected.shape
    if scale is None and supports_cpp(width // 3 // heads) and cpu.can_run(projected, width // 3 // heads):
        queries, keys, values = projected.chunk(3, dim=-1)
        return _attention_cpp(queries, keys, values, heads)
    split = projected.view(batch, positions, 3, heads, -1).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(*split).transpose(1, 2).reshape(batch, positions, -1)
    return attended if scale is None else fp8.quantize(attended, scale)


def cross_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, heads: int, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the attention of queries (batch, positions, inner) to keys and values (batch, tokens, inner).

    `inner` is heads * head dimension. The kernel is for texts of at most 128 tokens: a program holds all of them in its
    registers and needs no loop.
    """
    (batch, positions, inner), tokens = queries.shape, keys.shape[1]
    head_dim = inner // heads
    if scale is None and supports_cpp(head_dim) and cpu.can_run(queries, head_dim):
        return _attention_cpp(queries, keys, values, heads)
    is_power_of_two = head_dim & (head_dim - 1) == 0
    if not runs_triton(queries) or tokens > _MAX_TOKENS or not is_power_of_two or head_dim < 16:
        split = (each.unflatten(-1, (heads, head_dim)).transpose(1, 2) for each in (queries, keys, values))
        attended = F.scaled_dot_product_attention(*split).transpose(1, 2).reshape(batch, positions, inner)
        return attended if scale is None else fp8.quantize(attended, scale)
    result = torch.empty_like(queries, dtype=queries.dtype if scale is None else FP8)
    padded = max(16, triton.next_power_of_2(tokens))
    parts = (64, 16) if 64 < tokens <= 80 else (padded, 0)  # for CLIP's 77 tokens 128 would take a fifth longer
    _cross_attention_kernel[(triton.cdiv(positions, _TILE_QUERIES), heads, batch)](
        queries,
        keys,
        values,
        result,
        queries if scale is None else scale,
        positions,
        tokens,
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        head_dim**-0.5 * LOG2_E,
        INNER=inner,
        HEAD_DIM=head_dim,
        QUERIES=_TILE_QUERIES,
        TOKENS=parts[0],
        MORE_TOKENS=parts[1],
        TO_FP8=scale is not None,
        num_warps=4,
    )
    return result


def supports_cpp(head_dim: int) -> bool:
    """Return whether the C++ kernel is for heads of this dimension."""
    return head_dim == 2 * cpu.PANEL


def _attention_cpp(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, heads: int) -> torch.Tensor:
    (batch, positions, inner), tokens = queries.shape, keys.shape[1]
    result = torch.empty(batch, positions, inner)
    inputs = [each if each.stride(2) == 1 else each.contiguous() for each in (queries, keys, values)]
    arguments = [number for each in inputs for number in (each.data_ptr(), each.stride(0), each.stride(1))]
    cpu.library().attention(*arguments, result.data_ptr(), batch, heads, positions, tokens, torch.get_num_threads())
    return result


@jit
def _cross_attention_kernel(
    queries,
    keys,
    values,
    result,
    scale,
    positions,
    tokens,
    key_batch_stride,
    key_token_stride,
    value_batch_stride,
    value_token_stride,
    factor,
    INNER: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    TOKENS: tl.constexpr,
    MORE_TOKENS: tl.constexpr,
    TO_FP8: tl.constexpr,
):
    position = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * HEAD_DIM + tl.arange(0, HEAD_DIM)
    mask = (position < positions)[:, None]
    index = (batch * positions + position[:, None]) * INNER + channel[None, :]
    query = tl.load(queries + index, mask=mask, other=0.0)
    keys += batch * key_batch_stride
    values += batch * value_batch_stride
    token = tl.arange(0, TOKENS)
    scores, value = _scores(query, keys, values, token, tokens, channel, key_token_stride, value_token_stride, factor)
    highest = tl.max(scores, axis=1)
    if MORE_TOKENS:
        token = TOKENS + tl.arange(0, MORE_TOKENS)
        more_scores, more_value = _scores(
            query, keys, values, token, tokens, channel, key_token_stride, value_token_stride, factor
        )
        highest = tl.maximum(highest, tl.max(more_scores, axis=1))
    weight = tl.exp2(scores - highest[:, None])
    total = tl.sum(weight, axis=1)
    attended = tl.dot(weight.to(value.dtype), value, input_precision="ieee")
    if MORE_TOKENS:
        weight = tl.exp2(more_scores - highest[:, None])
        total += tl.sum(weight, axis=1)
        attended = tl.dot(weight.to(more_value.dtype), more_value, attended, input_precision="ieee")
    store(result + index, attended / total[:, None], scale, mask, TO_FP8)


@jit
def _scores(query, keys, values, token, tokens, channel, key_token_stride, value_token_stride, factor):
    """Return the scores of queries with some tokens, as exponents of two, and the values of these tokens."""
    mask = (token < tokens)[:, None]
    key = tl.load(keys + token[:, None] * key_token_stride + channel[None, :], mask=mask, other=0.0)
    value = tl.load(values + token[:, None] * value_token_stride + channel[None, :], mask=mask, other=0.0)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * factor
    return tl.where((token < tokens)[None, :], scores, float("-inf")), value


def single_head_attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return self-attention with one wide head, of (batch, positions, width) each.

    PyTorch's fused kernels are for heads of at most 256 channels, apart from one that is slower than two products with
    the scores in memory between them.
    """
    is_half = queries.is_cuda and queries.dtype.itemsize == 2
    if not (runs_triton(queries) and (is_half or INTERPRETED)) or queries.shape[1] > _MAX_POSITIONS:
        return F.scaled_dot_product_attention(queries[:, None], keys[:, None], values[:, None])[:, 0]
    queries_at_once = max(1, _MAX_SCORES // queries.shape[1])
    attended = torch.empty_like(queries)
    for query, key, value, result in zip(queries, keys, values, attended, strict=True):
        for part, out in zip(query.split(queries_at_once), result.split(queries_at_once), strict=True):
            scores = torch.mm(part, key.t(), out_dtype=torch.float32) if is_half else part.float() @ key.t().float()
            torch.mm(softmax(scores, query.shape[-1] ** -0.5, query.dtype), value, out=out)
    return attended


def softmax(scores: torch.Tensor, factor: float, dtype: torch.dtype) -> torch.Tensor:
    """Return the softmax of every row of factor * scores, (rows, columns) in fp32, as `dtype`."""
    if not runs_triton(scores):
        return torch.softmax(factor * scores, dim=-1).to(dtype)
    rows, columns = scores.shape
    result = torch.empty_like(scores, dtype=dtype)
    block = triton.next_power_of_2(columns)
    _softmax_kernel[(rows,)](scores, result, factor * LOG2_E, COLUMNS=columns, BLOCK=block, num_warps=16)
    return result


@jit
def _softmax_kernel(scores, result, factor, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    index, mask = tl.program_id(0).to(tl.int64) * COLUMNS + column, column < COLUMNS
    row = tl.load(scores + index, mask=mask, other=float("-inf")) * factor
    row = tl.exp2(row - tl.max(row))
    tl.store(result + index, (row / tl.sum(row)).to(result.dtype.element_ty), mask=mask)
