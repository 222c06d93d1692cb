"""Each kernel beside its plain PyTorch reference: on a GPU, or interpreted, as test_kernels.py runs this file."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from server.acceleration import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter has no products in bf16, and rounds to fp8 towards zero.
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]
NETWORK = DTYPES[-1]  # what networks compute in there
SCALE = torch.tensor(0.01, device=DEVICE)
IN_FP8 = 0.02 if DEVICE == "cuda" else 0.1  # relative error


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def compare(call: Callable[..., object], *tensors: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel makes of tensors against what the reference makes of them in fp32."""
    assert kernels._runs_kernels(torch.empty(0, device=DEVICE)), "there is no kernel to compare"
    made = call(*tensors)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_runs_kernels", lambda tensor: False)
        expected = call(*(None if each is None else each.float() for each in tensors))
    pairs = zip(made, expected, strict=True) if isinstance(made, tuple) else [(made, expected)]
    for one, other in pairs:
        error = float((one.float() - other.float()).norm() / other.float().norm())
        bound = {torch.float32: 1e-5, torch.bfloat16: 5e-3, kernels.FP8: IN_FP8}[one.dtype]
        assert error < bound, f"{error:.5f} in {one.dtype}"
        assert one.shape == other.shape


@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("width", [640, 1280, 96])
@pytest.mark.parametrize("adds", [True, False])
def test_layer_norm(dtype: torch.dtype, width: int, adds: bool, scale: torch.Tensor | None, monkeypatch):
    values, more = random(2, 9, width, dtype=dtype), random(2, 9, width, dtype=dtype) if adds else None
    weight, bias = random(width, dtype=dtype), random(width, dtype=dtype)
    compare(lambda *given: kernels.layer_norm(*given, 1e-5, scale), values, more, weight, bias, monkeypatch=monkeypatch)


@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("adds", [True, False])
def test_layer_norm_of_values_with_an_offset(dtype: torch.dtype, adds: bool, scale: torch.Tensor | None, monkeypatch):
    values, more = random(2, 9, 640, dtype=dtype), random(2, 9, 640, dtype=dtype) if adds else None
    weight, bias, offset = random(640, dtype=dtype), random(640, dtype=dtype), 2 * random(640, dtype=torch.float32)
    compare(
        lambda *given: kernels.layer_norm(*given, 1e-5, scale, offset),
        values, more, weight, bias, monkeypatch=monkeypatch,
    )  # fmt: skip


@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("width", [320, 1024, 5120])
def test_gated_gelu(dtype: torch.dtype, width: int, scale: torch.Tensor | None, monkeypatch):
    values = 3 * random(2, 3, 2 * width, dtype=dtype)
    compare(lambda given: kernels.gated_gelu(given, scale), values, monkeypatch=monkeypatch)


@pytest.mark.parametrize("in_fp8", [True, False])
@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize(("rows", "channels", "width"), [(300, 192, 320), (128, 128, 1024), (5, 80, 200)])
def test_gated_linear(rows: int, channels: int, width: int, scale: torch.Tensor | None, in_fp8: bool, monkeypatch):
    values, weight = random(2, rows, channels, dtype=NETWORK), random(2 * width, channels, dtype=NETWORK) / 10
    if in_fp8:
        values, weight = kernels.quantised(values, SCALE), kernels.quantised(weight, SCALE)
    scales = (SCALE, SCALE) if in_fp8 else (None, None)
    compare(
        lambda values, weight, bias: kernels.gated_linear(values, weight, bias, NETWORK, *scales, scale),
        values, weight, random(2 * width, dtype=NETWORK), monkeypatch=monkeypatch,
    )  # fmt: skip


def test_gates_between_are_those_of_a_linear_layer_and_its_geglu(dtype: torch.dtype):
    values, weight, bias = (random(*shape, dtype=dtype) for shape in ((2, 5, 48), (2 * 64, 48), (2 * 64,)))
    between = kernels.with_gates_between(weight), kernels.with_gates_between(bias)
    expected = kernels.gated_gelu(F.linear(values, weight, bias))
    made = kernels.gated_linear(values, *between, dtype)
    assert (made.float() - expected.float()).norm() < 1e-2 * expected.float().norm()


@pytest.mark.skipif(DEVICE == "cpu", reason="a processor's products of matrices depend on the place of a row")
def test_a_row_is_gated_alike_at_any_place():
    values, weight, bias = (random(*shape, dtype=NETWORK) for shape in ((700, 640), (2560, 640), (2560,)))
    turned = kernels.gated_linear(values.roll(300, 0), weight, bias, NETWORK)
    assert torch.equal(turned, kernels.gated_linear(values, weight, bias, NETWORK).roll(300, 0))


def test_quantised(dtype: torch.dtype, monkeypatch):
    values = torch.cat([random(100, 33, dtype=dtype), random(1, 33, dtype=dtype) * 1e4])  # beyond what fp8 holds
    compare(lambda given: kernels.quantised(given, SCALE), values, monkeypatch=monkeypatch)


@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize(("heads", "width", "tokens"), [(10, 64, 77), (3, 32, 77), (2, 64, 5), (1, 32, 100)])
def test_cross_attention(
    dtype: torch.dtype, heads: int, width: int, tokens: int, scale: torch.Tensor | None, monkeypatch
):
    inner = heads * width
    queries, texts = random(2, 150, inner, dtype=dtype), random(2, tokens, 2 * inner + 8, dtype=dtype)

    def attend(queries: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        keys, values = texts[..., :inner], texts[..., inner : 2 * inner]  # which lie in one tensor, as in the layers
        return kernels.cross_attention(queries, keys, values, heads, scale)

    compare(attend, queries, texts, monkeypatch=monkeypatch)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shifts", [True, False])
@pytest.mark.parametrize(
    ("channels", "groups", "height", "width"), [(320, 32, 15, 30), (96, 16, 16, 16), (1280, 32, 8, 7)]
)
def test_group_norm(
    dtype: torch.dtype, channels: int, groups: int, height: int, width: int, shifts: bool, silu: bool, monkeypatch
):
    images = 2 * random(2, channels, height, width, dtype=dtype) + 3
    shift = random(2, channels, dtype=dtype) if shifts else None
    weight, bias = random(channels, dtype=dtype), random(channels, dtype=dtype)
    compare(
        lambda images, shift, *given: kernels.group_norm(images, shift, groups, *given, 1e-5, silu),
        images, shift, weight, bias, monkeypatch=monkeypatch,
    )  # fmt: skip


@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize(("channels", "height", "width"), [(320, 15, 30), (96, 16, 16), (640, 1, 7)])
def test_group_norm_with_a_border(
    dtype: torch.dtype, channels: int, height: int, width: int, scale: torch.Tensor | None, monkeypatch
):
    images, shift = 2 * random(2, channels, height, width, dtype=dtype) + 3, random(2, channels, dtype=dtype)
    weight, bias = random(channels, dtype=dtype), random(channels, dtype=dtype)
    compare(
        lambda *given: kernels.group_norm(given[0], given[1], 16, given[2], given[3], 1e-5, True, scale, border=True),
        images, shift, weight, bias, monkeypatch=monkeypatch,
    )  # fmt: skip


@pytest.mark.parametrize("border", [False, True])
@pytest.mark.parametrize(("first", "more"), [(64, 128), (96, 64), (30, 18)])
def test_group_norm_of_images_in_two_parts(dtype: torch.dtype, first: int, more: int, border: bool, monkeypatch):
    images = [2 * random(2, channels, 9, 14, dtype=dtype) + 3 for channels in (first, more)]
    weight, bias = random(first + more, dtype=dtype), random(first + more, dtype=dtype)
    compare(
        lambda one, other, *given: kernels.group_norm(one, None, 16, *given, 1e-5, True, border=border, more=other),
        *images, weight, bias, monkeypatch=monkeypatch,
    )  # fmt: skip


@pytest.mark.parametrize("at_once", [70 * 3, 70 * 70])  # scores
def test_attention(dtype: torch.dtype, at_once: int, monkeypatch):
    monkeypatch.setattr(kernels, "_SCORES", at_once)
    compare(kernels.attention, *(random(2, 70, 96, dtype=dtype) for _ in range(3)), monkeypatch=monkeypatch)


def test_softmax(dtype: torch.dtype, monkeypatch):
    scores = 30 * random(5, 1000, dtype=torch.float32)
    compare(lambda scores: kernels.softmax(scores, 0.3, dtype), scores, monkeypatch=monkeypatch)


def test_group_norm_of_many_tiles_to_a_program(dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_ROWS", 2)  # so that 600 places are more than 256 tiles
    images, weight = random(1, 32, 20, 30, dtype=dtype) + 50, random(32, dtype=dtype)
    compare(
        lambda images, *given: kernels.group_norm(images, None, 8, *given, 1e-5, silu=False),
        images, weight, weight, monkeypatch=monkeypatch,
    )  # fmt: skip


@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize(("channels", "height", "width"), [(320, 15, 30), (96, 16, 16), (640, 1, 7)])
def test_bordered(dtype: torch.dtype, channels: int, height: int, width: int, scale: torch.Tensor | None, monkeypatch):
    images = random(2, channels, height, width, dtype=dtype)
    compare(lambda images: kernels.bordered(images, scale), images, monkeypatch=monkeypatch)


def bordered(batch: int, channels: int, height: int, width: int, in_fp8: bool) -> torch.Tensor:
    images = F.pad(random(batch, channels, height, width, dtype=NETWORK), [1] * 4)
    return kernels.quantised(images, SCALE) if in_fp8 else images


def weights(outputs: int, channels: int, kernel: int, in_fp8: bool) -> torch.Tensor:
    weight = random(kernels.phases(kernel) * outputs, channels, kernel, kernel, dtype=NETWORK)
    return kernels.quantised(weight, SCALE) if in_fp8 else weight


def what_is_kept(batch: int, outputs: int, height: int, width: int, kernel: int) -> torch.Tensor:
    side = 2 if kernel == 2 else 1
    return random(batch, outputs, side * height, side * width, dtype=NETWORK)


def convolution(in_fp8: bool, outputs: int) -> Callable[..., torch.Tensor]:
    scales = (SCALE, torch.rand(outputs, device=DEVICE)) if in_fp8 else (None, None)
    return lambda images, weight, bias, kept: kernels.convolution(images, weight, bias, NETWORK, kept, *scales)


@pytest.mark.parametrize("kernel", [3, 2])
@pytest.mark.parametrize("in_fp8", [True, False])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize(
    ("batch", "channels", "outputs", "height", "width"),
    [(2, 96, 160, 7, 9), (1, 160, 192, 16, 16), (3, 320, 96, 5, 4), (1, 64, 40, 1, 3)],
)
def test_convolution(
    batch: int, channels: int, outputs: int, height: int, width: int, adds: bool, in_fp8: bool, kernel: int, monkeypatch
):
    images, weight = bordered(batch, channels, height, width, in_fp8), weights(outputs, channels, kernel, in_fp8)
    bias, kept = random(outputs, dtype=NETWORK), what_is_kept(batch, outputs, height, width, kernel)
    added = (bias, kept) if adds else (None, None)
    compare(convolution(in_fp8, outputs), images, weight, *added, monkeypatch=monkeypatch)


@pytest.mark.parametrize("columns", [(64, 0), (64, 16)])
@pytest.mark.parametrize(("kernel", "split"), [(3, 1), (3, 3), (2, 1), (2, 2)])
def test_convolution_by_other_tiles(columns: tuple[int, int], kernel: int, split: int, monkeypatch):
    tile = kernels.Tile(64, columns, 32, group=2, split=split, warps=4, stages=3)
    monkeypatch.setattr(kernels, "_tile", lambda *shape: tile)
    images, weight = bordered(2, 48, 9, 15, in_fp8=False), weights(200, 48, kernel, in_fp8=False)
    bias, kept = random(200, dtype=NETWORK), what_is_kept(2, 200, 9, 15, kernel)
    compare(convolution(False, 200), images, weight, bias, kept, monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    ("rows", "channels", "in_fp8", "rows_of_tile", "columns", "split"),
    [
        (2 * 128 * 128, 320, True, 128, 320, 1), (2 * 64 * 64, 640, True, 128, 320, 1),
        (2 * 32 * 32, 1280, True, 64, 320, 1), (16 * 32 * 32, 1280, True, 128, 320, 1),
        (2 * 128 * 128, 384, True, 128, 128, 1), (2 * 64 * 64, 768, True, 64, 256, 1),
        (2 * 32 * 32, 1536, True, 128, 192, 1), (2 * 16 * 16, 1536, True, 64, 192, 2),
        (2 * 128 * 128, 320, False, 128, 320, 1), (2 * 32 * 32, 1280, False, 128, 320, 2),
        (2 * 128 * 128, 384, False, 256, 128, 1), (2 * 16 * 16, 1536, False, 128, 192, 4),
    ],
)  # fmt: skip
def test_a_convolution_of_sdxl_is_cut_up_as_was_fast(
    rows: int, channels: int, in_fp8: bool, rows_of_tile: int, columns: int, split: int
):
    tile = kernels._tile(rows, channels, channels, 3, in_fp8)
    assert (tile.rows, sum(tile.columns), tile.split) == (rows_of_tile, columns, split)


@pytest.mark.parametrize("in_fp8", [True, False])
@pytest.mark.parametrize(("rows", "channels"), [(2 * 32 * 32, 1280), (2 * 16 * 16, 1536)])
def test_phases_are_cut_up_as_so_many_more_pixels(rows: int, channels: int, in_fp8: bool):
    by_phases, whole = (kernels._tile(n, channels, channels, k, in_fp8) for n, k in ((rows, 2), (4 * rows, 3)))
    assert by_phases == whole != kernels._tile(rows, channels, channels, 3, in_fp8)


@pytest.mark.parametrize(
    ("rows", "channels", "outputs", "one_round"),
    [
        (2 * 64 * 64, 640, 640, True), (2 * 64 * 64, 320, 640, True), (2 * 64 * 64, 768, 768, True),
        (2 * 32 * 32, 1536, 1536, True), (2 * 128 * 128, 320, 320, False), (2 * 32 * 32, 1280, 1280, False),
        (2 * 16 * 16, 1536, 1536, False), (2 * 32 * 32, 96, 96, False),
    ],
)  # fmt: skip
def test_a_convolution_of_sdxl_is_one_round_where_it_was_faster(
    rows: int, channels: int, outputs: int, one_round: bool
):
    assert kernels.is_one_round(rows, channels, outputs) is one_round


@pytest.mark.parametrize("in_fp8", [True, False])
def test_a_tile_is_as_deep_as_what_hoppers_multiprocessors_share(in_fp8: bool):
    for tile in kernels._TILES_IN_FP8 if in_fp8 else kernels._TILES:
        assert tile.stages * (tile.rows + sum(tile.columns)) * tile.depth * (1 if in_fp8 else 2) <= 227 * 1024


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_processors_and_fp32_keep_the_convolution_of_pytorch(device: str, dtype: torch.dtype):
    assert not kernels.convolves(torch.device(device), dtype)


@pytest.mark.skipif(DEVICE == "cpu", reason="a processor's products of matrices depend on the place of a row")
@pytest.mark.parametrize("kernel", [3, 2])
@pytest.mark.parametrize("in_fp8", [True, False])
def test_an_image_is_convolved_alike_at_any_place(in_fp8: bool, kernel: int):
    images, weight = bordered(5, 320, 9, 15, in_fp8), weights(320, 320, kernel, in_fp8)
    convolve = convolution(in_fp8, 320)
    bits = images.view(torch.uint8) if in_fp8 else images  # in fp8 PyTorch moves nothing about
    turned = convolve(bits.roll(2, 0).view(images.dtype), weight, None, None)
    assert torch.equal(turned, convolve(images, weight, None, None).roll(2, 0))


@pytest.mark.parametrize("adds", [True, False])
def test_add(dtype: torch.dtype, adds: bool, monkeypatch):
    images, more = random(2, 96, 9, 7, dtype=dtype), random(2, 96, 9, 7, dtype=dtype) if adds else None
    compare(kernels.add, images, random(96, dtype=dtype), more, monkeypatch=monkeypatch)


@pytest.mark.parametrize(("outputs", "height", "width"), [(320, 8, 15), (96, 16, 16), (40, 1, 3)])
def test_interleaved(dtype: torch.dtype, outputs: int, height: int, width: int, monkeypatch):
    images = random(2, 4 * outputs, height + 1, width + 1, dtype=dtype)
    compare(kernels.interleaved, images, random(outputs, dtype=dtype), monkeypatch=monkeypatch)
