"""Fused layers compute the same as diffusers' layers; in fp8 they come close, and always to the same bytes."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from pydantic import ValidationError
from torch import nn

from server import model
from server.acceleration import convolutions, layers, quantization
from server.acceleration.kernels import convolution, cpu, tiles
from server.domain import Stage, default_request
from server.ensemble import checkpoint
from server.ensemble.batch_invariance import make_batch_invariant
from server.errors import CompileError, NoDevice
from server.settings import EMBEDDED, Settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


NO_KERNELS = "the C++ kernels are not for this CPU"


def unet(expert: str) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(EMBEDDED / expert / "unet", variant="fp16", dtype=torch.float32).eval()


@torch.inference_mode()
def predicted(network: UNet2DConditionModel, height: int = 32, width: int = 32) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    config = network.config
    ids = 6 if config.projection_class_embeddings_input_dim == 352 else 5
    pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
    added = {"text_embeds": torch.randn(2, pooled, generator=draw), "time_ids": torch.full((2, ids), 256.0)}
    rows, hidden = (
        torch.randn(2, *shape, generator=draw) for shape in ((4, height, width), (77, config.cross_attention_dim))
    )
    return network(rows, torch.tensor(500.0), encoder_hidden_states=hidden, added_cond_kwargs=added, return_dict=False)[
        0
    ]


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("expert", ["base", "refiner"])
@pytest.mark.parametrize("size", [(32, 32), (20, 44), (30, 42)])  # the last is enlarged to odd sizes on its way up
@pytest.mark.parametrize("device", ["cpu", "cuda"])  # layers fused for either device compute on a CPU too
def test_fused_unet_predicts_the_same_noise(device: str, expert: str, size: tuple[int, int]):
    plain = unet(expert)
    fused = copy.deepcopy(plain)
    layers.fuse_layers(fused, device)
    assert error(predicted(fused, *size), predicted(plain, *size)) < 1e-5


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fused_decoder_decodes_the_same_pixels(device: str):
    plain = AutoencoderKL.from_pretrained(EMBEDDED / "base/vae", variant="fp16", dtype=torch.float32).eval()
    fused = copy.deepcopy(plain)
    layers.fuse_layers(fused.decoder, device)
    latents = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert error(fused.decode(latents).sample, plain.decode(latents).sample) < 1e-5


def enlarging(device: str, channels: int = 48) -> tuple[Upsample2D, convolutions.Upsample]:
    """diffusers' layer, and the one that `fuse_layers` makes of it for a device."""
    torch.manual_seed(0)
    plain = Upsample2D(channels, use_conv=True).requires_grad_(False)
    return plain, convolutions.Upsample(copy.deepcopy(plain), device).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", ["cpu", "cuda", "by a kernel"])
@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 6)])
@pytest.mark.parametrize("cut", [None, (0, 0), (1, 0), (0, 1), (1, 1)])  # of twice the size
def test_fused_upsampling_is_exact_to_the_edges(device: str, size: tuple[int, int], cut: tuple[int, int] | None):
    plain, fused = enlarging("cpu" if device == "cpu" else "cuda")
    if device == "by a kernel":
        fused.use_kernel()
    images = torch.randn(2, 48, *size)
    output_size = None if cut is None else tuple(2 * side - less for side, less in zip(size, cut, strict=True))
    made, expected = fused(images, output_size), plain(images, output_size)
    assert made.shape == expected.shape
    assert error(made, expected) < 1e-6


def test_phase_weights_are_summed_in_fp32():
    plain, _ = enlarging("cuda")
    rounded = convolutions._by_phases(plain.conv.bfloat16()).weight
    assert torch.equal(rounded, convolutions._by_phases(plain.conv.float()).weight.bfloat16())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_fused_upsampling_is_batch_invariant(threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for channels, height, width in [(160, 7, 10), (192, 8, 8), (96, 5, 11)]:
            _, fused = enlarging("cpu", channels)
            images = torch.randn(6, channels, height, width).to(memory_format=torch.channels_last)
            made = fused(images)
            for turn in range(1, 6):
                assert torch.equal(fused(images.roll(turn, 0)), made.roll(turn, 0))
    finally:
        torch.set_num_threads(before)


def test_fp8_upsampling_is_close():
    plain, fused = enlarging("cuda")
    images = torch.randn(2, 48, 8, 8)
    with quantization.calibrating():
        fused(images)
    fused.quantize(fused.calibration_scale())
    assert 1e-3 < error(fused(images), plain(images)) < 0.05
    assert fused.weight.dtype == torch.float8_e4m3fn
    assert error(fused(images, (15, 16)), plain(images, (15, 16))) < 1e-6, "odd sizes are not in fp8"


def winograd(network: nn.Module) -> list[bool]:
    """For each convolution of a residual network, whether it runs as a Winograd convolution."""
    return [each.uses_winograd for each in network.modules() if isinstance(each, convolutions.ResnetConvolution)]


@pytest.mark.skipif(not cpu.is_supported(), reason=NO_KERNELS)
@pytest.mark.parametrize("expert", ["base", "refiner"])
@pytest.mark.parametrize("size", [(32, 32), (20, 44), (30, 42)])
def test_unet_by_cpu_kernels_predicts_the_same_noise(expert: str, size: tuple[int, int]):
    plain = unet(expert)
    fused = copy.deepcopy(plain)
    layers.fuse_layers(fused, "cpu")
    before = predicted(fused, *size)
    layers.use_cpu_kernels(fused)
    assert torch.equal(predicted(fused, *size), before), "they do not run yet"
    with cpu.active():
        assert all(winograd(fused))
        by_kernels = predicted(fused, *size)
    assert error(by_kernels, before) > 0
    assert error(by_kernels, predicted(plain, *size)) < 1e-5


@pytest.mark.skipif(not cpu.is_supported(), reason=NO_KERNELS)
def test_decoder_by_cpu_kernels_decodes_the_same_pixels():
    plain = AutoencoderKL.from_pretrained(EMBEDDED / "base/vae", variant="fp16", dtype=torch.float32).eval()
    fused = copy.deepcopy(plain)
    layers.fuse_layers(fused.decoder, "cpu")
    layers.use_cpu_kernels(fused.decoder)
    latents = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), cpu.active():
        assert error(fused.decode(latents).sample, plain.decode(latents).sample) < 1e-5


@pytest.mark.skipif(not cpu.is_supported(), reason=NO_KERNELS)
def test_quantized_convolutions_do_not_run_cpu_kernels():
    network = unet("base")
    layers.fuse_layers(network, "cpu")
    quantise(network)
    layers.use_cpu_kernels(network)
    with cpu.active():
        assert not any(winograd(network))


def test_text_projection_cache_is_per_tensor():
    layer = nn.Linear(4, 4)
    once = layers.MemoizeLast(layer)
    texts = [torch.ones(2, 4), torch.zeros(2, 4)]
    with torch.inference_mode():
        for text in [*texts, *texts]:
            assert torch.equal(once(text), layer(text))
            assert once(text) is once(text)


def test_fp8_unet_predicts_nearly_the_same_noise():
    plain = unet("base")
    fused = copy.deepcopy(plain)
    layers.fuse_layers(fused)
    with quantization.calibrating():
        predicted(fused)
    for layer in quantization.quantizable(fused).values():
        layer.quantize(layer.calibration_scale())
    assert 1e-4 < error(predicted(fused), predicted(plain)) < 0.05


def all_convolutions(network: nn.Module) -> list[convolutions.QuantizableConvolution]:
    return [each for each in network.modules() if isinstance(each, convolutions.QuantizableConvolution)]


@pytest.mark.parametrize("expert", ["base", "refiner"])
def test_unet_by_convolution_kernels_predicts_the_same_noise(expert: str):
    plain = unet(expert)
    by_kernel = copy.deepcopy(plain)
    layers.fuse_layers(by_kernel)
    layers.use_convolution_kernels(by_kernel)
    assert all(each.uses_kernel for each in all_convolutions(by_kernel))
    assert error(predicted(by_kernel, 20, 44), predicted(plain, 20, 44)) < 1e-5


@pytest.mark.parametrize("expert", ["base", "refiner"])
def test_unet_by_some_convolution_kernels_predicts_the_same_noise(expert: str, monkeypatch):
    monkeypatch.setattr(convolution, "supports", lambda device, dtype: True)
    monkeypatch.setattr(tiles, "fills_one_wave", lambda rows, channels, outputs: rows == 2 * 16 * 16)
    by_kernel = []
    convolve = convolution.convolve
    monkeypatch.setattr(convolution, "convolve", lambda *given: by_kernel.append(given[0]) or convolve(*given))
    plain = unet(expert)
    mixed = copy.deepcopy(plain)
    layers.fuse_layers(mixed)
    assert error(predicted(mixed, 32, 32), predicted(plain, 32, 32)) < 1e-5
    ways_up = [each for each in mixed.modules() if isinstance(each, convolutions.Upsample)]
    assert all(each.uses_kernel for each in ways_up)
    assert len(by_kernel) > len(ways_up) > 0
    assert not any(each.uses_kernel for each in mixed.modules() if isinstance(each, convolutions.ResnetConvolution))


def quantise(network: nn.Module) -> None:
    for layer in all_convolutions(network):
        layer.quantize(torch.tensor(0.1))


@pytest.mark.parametrize("change", [layers.use_convolution_kernels, quantise])
def test_convolution_kernels_need_no_per_image_calls(change: Callable[[nn.Module], None]):
    plain, changed = unet("base"), unet("base")
    layers.fuse_layers(plain)
    layers.fuse_layers(changed)
    change(changed)
    by_image, fewer = (len(make_batch_invariant(each, "cuda")) for each in (plain, changed))
    assert by_image - fewer == len(all_convolutions(changed)) > 0


def test_convolution_kernels_share_the_weights_in_place():
    network = unet("base")
    layers.fuse_layers(network)
    before = [each.layer.weight.data_ptr() for each in all_convolutions(network)]
    layers.use_convolution_kernels(network)
    network.to(memory_format=torch.channels_last)  # as those that are compiled are once more
    assert [each.weight.data_ptr() for each in all_convolutions(network)] == before
    quantise(network)
    assert all(each.weight.is_contiguous(memory_format=torch.channels_last) for each in all_convolutions(network))


@pytest.mark.parametrize("expert", ["base", "refiner"])
def test_fusing_a_shared_weight_copy_leaves_the_network_unchanged(expert: str):
    network = unet(expert)
    expected, weights = predicted(network), {each.data_ptr(): each.stride() for each in network.parameters()}
    copy = layers.share_weights(network)
    assert weights.keys() == {each.data_ptr() for each in copy.parameters()}, "their weights are in memory once"
    layers.fuse_layers(copy)
    assert error(predicted(copy), expected) < 1e-5
    assert torch.equal(predicted(network), expected)
    assert weights == {each.data_ptr(): each.stride() for each in network.parameters()}
    assert weights.keys() & {each.data_ptr() for each in copy.parameters()}, "what is the same is still shared"


def test_unsupported_network_is_left_unchanged():
    odd = unet("base")
    odd.time_embed_act = nn.SiLU()
    before = predicted(odd)
    with pytest.raises(layers.UnsupportedLayer, match="UNet2DConditionModel"):
        layers.fuse_layers(odd)
    assert torch.equal(predicted(odd), before)


@pytest.mark.parametrize(("spared", "in_fp8"), [(0, {0, 1, 2}), (1, {0, 1}), (2, {0}), (9, set())])
def test_last_blocks_can_stay_unquantized(spared: int, in_fp8: set[int]):
    fused = unet("base")
    layers.fuse_layers(fused)
    names = quantization.quantizable(fused, spared)
    assert {int(name.split(".")[1]) for name in names if name.startswith("up_blocks.")} == in_fp8
    assert {name.split(".")[0] for name in names} >= {"down_blocks", "mid_block"}, "but for those all can"


def test_layer_without_calibration_has_no_scale():
    fused = unet("base")
    layers.fuse_layers(fused)
    with pytest.raises(RuntimeError, match="no input was seen"):
        next(iter(quantization.quantizable(fused).values())).calibration_scale()


def load(**options) -> model.Ensemble:
    return model.load(checkpoint.inspect(EMBEDDED / "base", EMBEDDED / "refiner"), device="cpu", **options)


def drawn(ensemble: model.Ensemble) -> np.ndarray:
    request = replace(default_request(ensemble.info, "cat", seed=1), steps=8)
    trajectory = ensemble.plan(request, ensemble.encode(request), 1)
    for _ in trajectory.stages:
        ensemble.step([trajectory])
    return ensemble.decode(trajectory)


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    return drawn(load())


@pytest.fixture(scope="module")
def kept_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scales")


@pytest.fixture(scope="module")
def in_fp8(kept_in: Path) -> model.Ensemble:
    return load(precision="fp8", compile_cache=kept_in)


def test_fp8_ensemble_leaves_its_last_blocks_unquantized(in_fp8: model.Ensemble):
    for stage, left in ((Stage.BASE, {2}), (Stage.REFINER, {1, 2})):
        unet = in_fp8._unets[stage]
        for at, block in enumerate(unet.up_blocks):
            scales = [each.scale for each in block.modules() if isinstance(each, quantization.Quantizable)]
            assert scales
            assert all((scale is None) == (at in left) for scale in scales)


def test_fp8_images_are_close_and_equal_with_saved_scales(
    plain, in_fp8: model.Ensemble, kept_in: Path, caplog: pytest.LogCaptureFixture
):
    image = drawn(in_fp8)
    assert in_fp8.info.precision == in_fp8.info.environment.precision == "fp8"
    assert 18 < 10 * np.log10(255**2 / np.square(image.astype(float) - plain).mean()) < 60
    (kept,) = kept_in.glob("fp8-scales-*.safetensors")
    written = kept.stat().st_mtime_ns
    assert np.array_equal(drawn(load(precision="fp8", compile_cache=kept_in)), image)
    assert kept.stat().st_mtime_ns == written, "what was kept was used"
    kept.unlink()
    (kept / "something").mkdir(parents=True)
    assert np.array_equal(drawn(load(precision="fp8", compile_cache=kept_in)), image), "without them it observes again"
    assert [each for each in caplog.messages if "kept" in each] == [
        f"the scales of fp8 are not kept: {kept_in}: Is a directory"
    ]


@pytest.mark.parametrize("scale", [torch.tensor(torch.nan), torch.tensor(0.0), torch.ones(2), torch.tensor(1)], ids=str)
def test_invalid_saved_scales_are_ignored(scale: torch.Tensor, tmp_path: Path):
    kept = tmp_path / "scales.safetensors"
    quantization.save_scales({"good": torch.tensor(0.5)}, kept)
    assert quantization.load_scales(kept) == {"good": 0.5}
    quantization.save_scales({"good": torch.tensor(0.5), "bad": scale}, kept)
    assert quantization.load_scales(kept) == {}
    kept.write_bytes(b"cut off")
    assert quantization.load_scales(kept) == {}
    assert list(tmp_path.iterdir()) == [kept]


def test_offloaded_networks_make_the_same_bytes(plain):
    assert np.array_equal(drawn(load(offload=True)), plain)


def test_fp8_on_cpu_takes_one_image_per_call():
    with pytest.raises(NoDevice, match="leave --max-batch at 1"):
        load(precision="fp8", max_batch=2)


def test_unfusable_checkpoint_fails_in_fp8_and_runs_eagerly_elsewhere(plain, monkeypatch: pytest.MonkeyPatch):
    def odd(network: nn.Module) -> None:
        raise layers.UnsupportedLayer("UNet2DConditionModel has an unusual Transformer2DModel")

    monkeypatch.setattr(layers, "check_supported", odd)
    with pytest.raises(CompileError, match="unusual Transformer2DModel; leave --compile off, and --precision auto"):
        load(precision="fp8")
    assert np.array_equal(drawn(load()), plain)


@pytest.mark.parametrize("flags", [{"compile": "blocks"}, {"overlap": True}])
def test_offload_neither_compiles_nor_overlaps(flags: dict):
    with pytest.raises(ValidationError, match="--offload moves the networks"):
        Settings(offload=True, **flags)
