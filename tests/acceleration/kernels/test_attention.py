"""Attention by Triton and by C++ equals the reference."""

import pytest
import torch
from kernel_comparison import SCALE, compare, random, relative_error

from server.acceleration.kernels import attention, cpu

by_cpp = pytest.mark.skipif(not cpu.is_supported(), reason="the C++ kernels are not for this CPU")


@pytest.mark.triton
@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize(("heads", "head_dim", "tokens"), [(10, 64, 77), (3, 32, 77), (2, 64, 5), (1, 32, 100)])
def test_cross_attention(
    dtype: torch.dtype,
    heads: int,
    head_dim: int,
    tokens: int,
    scale: torch.Tensor | None,
    monkeypatch: pytest.MonkeyPatch,
):
    inner = heads * head_dim
    queries, text = random(2, 150, inner, dtype=dtype), random(2, tokens, 2 * inner + 8, dtype=dtype)

    def attend(queries: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        keys, values = text[..., :inner], text[..., inner : 2 * inner]  # strided, as in the layers
        return attention.cross_attention(queries, keys, values, heads, scale)

    compare(attend, queries, text, monkeypatch=monkeypatch)


@pytest.mark.triton
@pytest.mark.parametrize("max_scores", [70 * 3, 70 * 70])
def test_single_head_attention(dtype: torch.dtype, max_scores: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "_MAX_SCORES", max_scores)
    tensors = (random(2, 70, 96, dtype=dtype) for _ in range(3))
    compare(attention.single_head_attention, *tensors, monkeypatch=monkeypatch)


@pytest.mark.triton
def test_softmax(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    scores = 30 * random(5, 1000, dtype=torch.float32)
    compare(lambda scores: attention.softmax(scores, 0.3, dtype), scores, monkeypatch=monkeypatch)


@by_cpp
@pytest.mark.parametrize(("positions", "tokens"), [(256, 256), (64, 77), (1, 1), (130, 16)])
def test_cross_attention_by_cpp(positions: int, tokens: int):
    queries = 3 * torch.randn(2, positions, 3 * 160)[..., 160:320]  # columns of a wider tensor
    keys, values = 3 * torch.randn(2, tokens, 160), torch.randn(2, tokens, 2 * 160)[..., 160:]
    expected = attention.cross_attention(queries.double(), keys.double(), values.double(), heads=5)
    with cpu.active():
        actual = attention.cross_attention(queries, keys, values, heads=5)
    assert relative_error(actual, expected) < 2e-6


@by_cpp
def test_self_attention_by_cpp():
    projected = torch.randn(2, 70, 3 * 160)
    with cpu.active():
        actual = attention.self_attention(projected, heads=5)
    assert relative_error(actual, attention.self_attention(projected.double(), heads=5)) < 2e-6
