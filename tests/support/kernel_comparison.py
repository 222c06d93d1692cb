"""Comparison of Triton kernels with their PyTorch references, on a GPU or by Triton's interpreter."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from server.acceleration.kernels import common, fp8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter has no products in bf16, and rounds to fp8 towards zero.
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]
NETWORK_DTYPE = DTYPES[-1]
SCALE = torch.tensor(0.01, device=DEVICE)
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, fp8.FP8: 0.02 if DEVICE == "cuda" else 0.1}  # relative errors

on_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="on a CPU the product of a row depends on its position")


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def compare(call: Callable[..., Any], *tensors: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the kernel's results for some tensors with those of the reference in fp32."""
    assert common.runs_triton(torch.empty(0, device=DEVICE)), "there is no kernel to compare"
    results = call(*tensors)
    with monkeypatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("server.acceleration.kernels.") and hasattr(module, "runs_triton"):
                patch.setattr(module, "runs_triton", lambda tensor: False)
        references = call(*(None if each is None else each.float() for each in tensors))
    pairs = zip(results, references, strict=True) if isinstance(results, tuple) else [(results, references)]
    for actual, expected in pairs:
        error = relative_error(actual.float(), expected.float())
        assert error < BOUNDS[actual.dtype], f"{error:.5f} in {actual.dtype}"
        assert actual.shape == expected.shape
