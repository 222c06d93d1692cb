"""Rounding to fp8, e4m3 (Micikevicius et al., "FP8 Formats for Deep Learning", 2022)."""

from __future__ import annotations

import torch

from server.acceleration.kernels.common import BLOCK_ELEMENTS, jit, runs_triton, tl, triton

FP8 = torch.float8_e4m3fn
E4M3_MAX = 448.0


def quantize(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return values / scale, clamped and rounded to fp8.

    `scale` has shape (), or one that broadcasts to that of the values, for which there is no kernel.
    """
    if not runs_triton(values) or scale.ndim:
        return (values.float() * scale.reciprocal()).clamp(-E4M3_MAX, E4M3_MAX).to(FP8)
    values = values.contiguous()
    result = torch.empty_like(values, dtype=FP8)
    grid = (triton.cdiv(values.numel(), BLOCK_ELEMENTS),)
    _quantize_kernel[grid](values, result, scale, values.numel(), BLOCK=BLOCK_ELEMENTS)
    return result


@jit
def _quantize_kernel(values, result, scale, count, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    store(result + index, tl.load(values + index, mask=mask).to(tl.float32), scale, mask, TO_FP8=True)


@jit
def store(pointers, values, scale, mask, TO_FP8: tl.constexpr):
    """Store fp32 values as the pointers' type; to fp8 divided by `scale` and clamped."""
    if TO_FP8:
        clamped = tl.minimum(tl.maximum(values * (1.0 / tl.load(scale)), -448.0), 448.0)
        tl.store(pointers, clamped.to(tl.float8e4nv), mask=mask)
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)
