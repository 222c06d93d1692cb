"""The C++ kernels run where they are activated and supported, and are batch-invariant for any number of threads."""

from pathlib import Path

import pytest
import torch
from convolutions import convolution, images
from torch import nn

from server.acceleration.kernels import attention, cpu, geglu, norms
from server.acceleration.kernels.linear import PackedLinear
from server.acceleration.kernels.winograd import WinogradConvolution

pytestmark = pytest.mark.skipif(not cpu.is_supported(), reason="the C++ kernels are not for this CPU")


def results(given: torch.Tensor, shift: torch.Tensor) -> list[torch.Tensor]:
    """Return the result of every kernel for images of 64 channels, with another shift for each image."""
    torch.manual_seed(0)
    weight, bias = torch.randn(2, 64)
    layer, positions = nn.Linear(64, 64), given.permute(0, 2, 3, 1)
    packed = PackedLinear(layer.weight, layer.bias)
    flat = positions.flatten(1, 2)
    with cpu.active():
        return [
            WinogradConvolution(convolution(64, 64))(given, shift, given),
            norms.group_norm(given, shift, 8, weight, bias, 1e-5, True),
            attention.cross_attention(flat, flat, flat, heads=2),
            *norms.layer_norm(positions, positions, weight, bias, 1e-5),
            geglu.geglu(positions),
            packed(positions),
            packed.geglu(positions),
        ]


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (21, 24)])
def test_image_has_the_same_bytes_at_any_batch_position_for_any_number_of_threads(size: tuple[int, int]):
    before = torch.get_num_threads()
    given, shift = images(8, 64, *size), torch.randn(8, 64)
    expected = results(given, shift)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for position in range(8):
                rolled = results(given.roll(position, 0), shift.roll(position, 0))
                for one, other in zip(rolled, expected, strict=True):
                    assert torch.equal(one, other.roll(position, 0))
            for one, other in zip(results(given[3:4], shift[3:4]), expected, strict=True):
                assert torch.equal(one, other[3:4])
    finally:
        torch.set_num_threads(before)


def test_kernels_run_in_the_thread_that_activated_them_and_in_fp32():
    values = torch.randn(2, 64)
    assert not cpu.can_run(values, 64)
    with cpu.active():
        assert cpu.can_run(values, 64)
        assert not cpu.can_run(values, 60), "vectors have eight channels"
        assert not cpu.can_run(values.bfloat16(), 64)
    assert not cpu.is_active()


@pytest.mark.parametrize(
    ("capability", "supported"), [("AVX2", True), ("AVX512", True), ("DEFAULT", False), ("SVE256", False)]
)
def test_kernels_are_supported_where_pytorch_may_use_avx2(
    capability: str, supported: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert cpu.is_supported() == supported


def test_kernels_are_not_supported_on_a_cpu_without_avx2_whatever_the_environment_claims(
    monkeypatch: pytest.MonkeyPatch,
):
    """PyTorch takes ATEN_CPU_CAPABILITY for granted."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: False)
    assert not cpu.is_supported()


def test_process_has_one_openmp_runtime():
    cpu.prepare()
    mapped = {line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
    assert len({each.strip() for each in mapped if "libgomp" in each or "libomp" in each or "libiomp" in each}) == 1
