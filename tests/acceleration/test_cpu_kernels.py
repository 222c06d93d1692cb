"""The kernels of a CPU compute what PyTorch does, of any size, and each image's alike at any place by any threads."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from convolutions import convolution, convolved, images
from torch import nn

from server.acceleration import cpu_kernels, kernels

pytestmark = pytest.mark.skipif(not cpu_kernels.suit(), reason="the C++ kernels are not for this CPU")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("bias", [None, (1,), (2,)], ids=["without a bias", "with one", "of each image another"])
@pytest.mark.parametrize(
    ("batch", "channels", "outputs", "height", "width"),
    [(2, 96, 160, 32, 32), (3, 64, 32, 20, 12), (1, 160, 96, 10, 7), (2, 64, 96, 1, 3), (2, 72, 64, 64, 100)],
)
def test_a_convolution_computes_what_pytorch_does(batch, channels, outputs, height, width, bias, keeps):
    layer, given = convolution(channels, outputs), images(batch, channels, height, width)
    columns = torch.randn(batch, 2 * outputs)[:, outputs:]  # as those of one layer are among those of all
    added = None if bias is None else torch.randn(outputs) if bias == (1,) else columns
    kept = images(batch, outputs, height, width) if keeps else None
    expected = convolved(layer, given, added, kept)
    made = cpu_kernels.Winograd(layer)(given, added, kept)
    assert made.shape == expected.shape
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert error(made, expected) < 5e-6


@pytest.mark.parametrize(
    ("layer", "computes"),
    [
        (convolution(32, 96), True),
        (convolution(24, 96), False),
        (convolution(96, 40), False),
        (convolution(36, 96), False),
        (convolution(640, 640), False),
        (convolution(96, 96, stride=2), False),
        (convolution(96, 96, padding=0), False),
        (convolution(96, 96, dtype=torch.bfloat16), False),
        (nn.Conv2d(96, 96, 1), False),
    ],
    ids=str,
)
def test_it_is_for_convolutions_that_it_can_compute(layer: nn.Conv2d, computes: bool):
    assert cpu_kernels.Winograd.computes(layer) == computes


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "channels", "outputs"), [((2, 256), 160, 480), ((1,), 10, 32), ((3, 7), 640, 64)])
def test_a_linear_layer_computes_what_pytorch_does(rows: tuple[int, ...], channels: int, outputs: int, bias: bool):
    layer, values = nn.Linear(channels, outputs, bias=bias), torch.randn(*rows, channels)
    kernel = cpu_kernels.Linear(layer.weight, layer.bias)
    assert error(kernel(values), layer.double()(values.double())) < 1e-6
    assert error(kernel.gated(values), kernels.gated_gelu(layer(values.double()))) < 2e-6


def test_linear_layers_that_are_large_or_no_whole_panels_stay_pytorchs():
    computes = {size: cpu_kernels.Linear.computes(torch.empty(size)) for size in [(160, 160), (48, 64), (1024, 1024)]}
    assert computes == {(160, 160): True, (48, 64): False, (1024, 1024): False}
    assert not cpu_kernels.Linear.computes(torch.empty(160, 160, dtype=torch.bfloat16))


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shifts", [True, False])
@pytest.mark.parametrize("size", [(2, 96, 32, 32), (1, 32, 100, 71), (3, 40, 1, 1), (2, 352, 8, 8)])
def test_a_group_norm_computes_what_pytorch_does(size: tuple[int, ...], shifts: bool, silu: bool):
    batch, channels = size[:2]
    given = 3 * images(*size) + 100  # a mean that cancels most of the squares
    shift = torch.randn(batch, 2 * channels)[:, channels:] if shifts else None
    weight, bias = torch.randn(channels), torch.randn(channels)
    moved = given.double() if shift is None else given.double() + shift.double()[:, :, None, None]
    expected = F.group_norm(moved, 8, weight.double(), bias.double(), 1e-5)
    made = cpu_kernels.group_norm(given, shift, 8, weight, bias, 1e-5, silu)
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert error(made, F.silu(expected) if silu else expected) < 1e-5


@pytest.mark.parametrize("adds", [True, False])
def test_a_layer_norm_computes_what_pytorch_does(adds: bool):
    values, more = torch.randn(2, 77, 160) + 5, torch.randn(2, 77, 160) if adds else None
    weight, bias = torch.randn(160), torch.randn(160)
    total, normed = cpu_kernels.layer_norm(values, more, weight, bias, 1e-5)
    assert torch.equal(total, values if more is None else values + more)
    assert error(normed, F.layer_norm(total.double(), (160,), weight.double(), bias.double())) < 1e-6


@pytest.mark.parametrize(("places", "tokens"), [(256, 256), (64, 77), (1, 1), (130, 16)])
def test_an_attention_computes_what_pytorch_does(places: int, tokens: int):
    queries = 3 * torch.randn(2, places, 3 * 160)[..., 160:320]  # columns of a wider product
    keys, values = 3 * torch.randn(2, tokens, 160), torch.randn(2, tokens, 2 * 160)[..., 160:]
    expected = kernels.cross_attention(queries.double(), keys.double(), values.double(), heads=5)
    assert error(cpu_kernels.attention(queries, keys, values, heads=5), expected) < 2e-6


def test_geglu_computes_what_pytorch_does():
    values = 3 * torch.randn(2, 77, 320)
    assert error(cpu_kernels.gated_gelu(values), kernels.gated_gelu(values.double())) < 1e-6


def test_numbers_of_any_size_have_their_silu_and_what_is_none_stays_none():
    values = torch.tensor([0, -0.5, 1, -20, 88, -88, 1e4, -1e4, 1e30, math.nan]).repeat(8).view(1, 8, 1, 10)
    weight, bias = torch.zeros(8), torch.linspace(-100, 100, 8)
    made = cpu_kernels.group_norm(values.nan_to_num(), None, 1, weight, bias, 1e-5, True)
    assert torch.allclose(made, F.silu(bias)[None, :, None, None].expand_as(made), rtol=1e-6, atol=1e-35)
    assert cpu_kernels.group_norm(values, None, 1, weight, bias, 1e-5, True).isnan().all()
    gates = torch.cat([torch.ones(values.numel()), values.flatten()])
    assert torch.allclose(cpu_kernels.gated_gelu(gates), F.gelu(values.flatten()), rtol=1e-6, atol=1e-7, equal_nan=True)


def all_made(given: torch.Tensor, shift: torch.Tensor) -> list[torch.Tensor]:
    """What every kernel makes of images of 64 channels, and of something else of each image."""
    torch.manual_seed(0)
    weight, bias = torch.randn(2, 64)
    linear, places = nn.Linear(64, 64), given.permute(0, 2, 3, 1)
    multiply = cpu_kernels.Linear(linear.weight, linear.bias)
    return [
        cpu_kernels.Winograd(convolution(64, 64))(given, shift, given),
        cpu_kernels.group_norm(given, shift, 8, weight, bias, 1e-5, True),
        cpu_kernels.attention(*(places.flatten(1, 2) for _ in range(3)), heads=2),
        *cpu_kernels.layer_norm(places, places, weight, bias, 1e-5),
        cpu_kernels.gated_gelu(places),
        multiply(places),
        multiply.gated(places),
    ]


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (21, 24)])
def test_an_image_has_the_same_bytes_at_any_place_alone_and_by_any_number_of_threads(size: tuple[int, int]):
    before = torch.get_num_threads()
    given, shift = images(8, 64, *size), torch.randn(8, 64)
    expected = all_made(given, shift)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for place in range(8):
                for one, other in zip(all_made(given.roll(place, 0), shift.roll(place, 0)), expected, strict=True):
                    assert torch.equal(one, other.roll(place, 0))
            for one, other in zip(all_made(given[3:4], shift[3:4]), expected, strict=True):
                assert torch.equal(one, other[3:4])
    finally:
        torch.set_num_threads(before)


def test_they_compute_for_the_thread_that_runs_them_alone_and_in_fp32():
    values = torch.randn(2, 64)
    assert not cpu_kernels.compute(values, 64)
    with cpu_kernels.running():
        assert cpu_kernels.compute(values, 64)
        assert not cpu_kernels.compute(values, 60), "vectors are of eight"
        assert not cpu_kernels.compute(values.bfloat16(), 64)
    assert not cpu_kernels.run()


@pytest.mark.parametrize(
    ("capability", "suits"), [("AVX2", True), ("AVX512", True), ("DEFAULT", False), ("SVE256", False)]
)
def test_they_are_for_every_cpu_that_has_their_instructions_where_torch_may_use_them(
    capability: str, suits: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert cpu_kernels.suit() == suits


def test_a_cpu_without_their_instructions_is_not_taken_for_one_that_has_them(monkeypatch: pytest.MonkeyPatch):
    """torch takes ATEN_CPU_CAPABILITY at its word."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: False)
    assert not cpu_kernels.suit()


def test_one_openmp_is_in_the_process():
    cpu_kernels.prepare()
    mapped = {line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
    assert len({each.strip() for each in mapped if "libgomp" in each or "libomp" in each or "libiomp" in each}) == 1
