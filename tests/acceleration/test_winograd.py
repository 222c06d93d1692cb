"""A convolution of fewer products computes what PyTorch's does, of any size, and each image's alike at any place."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from convolutions import convolution, convolved, images
from torch import nn

from server.acceleration import winograd
from server.acceleration.winograd import Winograd


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def bordered(images: torch.Tensor) -> torch.Tensor:
    return F.pad(images, [1] * 4)


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("bias", [None, (1,), (2,)], ids=["without a bias", "with one", "of each image another"])
@pytest.mark.parametrize(
    ("batch", "channels", "outputs", "height", "width"),
    [(2, 96, 160, 32, 32), (3, 64, 64, 20, 12), (1, 160, 96, 10, 7), (2, 64, 96, 1, 3), (2, 72, 64, 64, 100)],
)
def test_it_computes_what_pytorch_does(batch, channels, outputs, height, width, bias, keeps):
    layer, given = convolution(channels, outputs), images(batch, channels, height, width)
    added = None if bias is None else torch.randn(outputs) if bias == (1,) else torch.randn(batch, outputs)
    kept = images(batch, outputs, height, width) if keeps else None
    expected = convolved(layer, given, added, kept)
    made = Winograd(layer)(bordered(given), added, kept)
    assert made.shape == expected.shape
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert error(made, expected) < 5e-6


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [(8, 8), (16, 16), (21, 24)])
@pytest.mark.parametrize("channels", [64, 192])
def test_an_image_is_convolved_alike_at_any_place(channels: int, size: tuple[int, int], threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        convolve, given = Winograd(convolution(channels, 96)), images(8, channels, *size)
        bias, kept = torch.randn(8, 96), images(8, 96, *size)
        made = convolve(bordered(given), bias, kept, parts=8)
        assert error(made, convolve(bordered(given), bias, kept)) < 1e-6
        for place in range(8):
            turned = convolve(*(each.roll(place, 0) for each in (bordered(given), bias, kept)), parts=8)
            assert torch.equal(turned, made.roll(place, 0))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("layer", "gains"),
    [
        (convolution(96, 160), True),
        (convolution(32, 96), False),
        (convolution(640, 640), False),
        (convolution(96, 96, stride=2), False),
        (convolution(96, 96, padding=0), False),
        (convolution(96, 96, dtype=torch.bfloat16), False),
        (nn.Conv2d(96, 96, 1), False),
    ],
    ids=str,
)
def test_it_is_for_convolutions_in_which_it_is_the_faster(layer: nn.Conv2d, gains: bool, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert winograd.gains(layer) == gains


@pytest.mark.parametrize(("capability", "mkl"), [("AVX512", True), ("DEFAULT", True), ("AVX2", False)])
def test_where_nobody_measured_it_the_convolution_stays_pytorchs(capability: str, mkl: bool, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert not winograd.gains(convolution(96, 96))
