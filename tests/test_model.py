"""The ensemble equals diffusers' two-pipeline recipe, and is right where that recipe errs."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from server import model
from server.domain import ImageRequest, Notice, Stage, default_request
from server.ensemble import checkpoint
from server.ensemble.trajectory import SCHEDULERS, Trajectory
from server.settings import EMBEDDED

REQUEST = ImageRequest("a cat", "a dog", (1,), 20, 5.0, 0.8, "euler", 32, 32)


@pytest.fixture(scope="module")
def ensemble(folders: tuple[Path, Path], device: str) -> model.Ensemble:
    return model.load(checkpoint.inspect(*folders), device=device, precision="fp32")


def finished(ensemble: model.Ensemble, request: ImageRequest, seed: int = 1) -> Trajectory:
    trajectory = ensemble.plan(request, ensemble.encode(request), seed)
    for _ in trajectory.stages:
        ensemble.step([trajectory])
    return trajectory


class Stock:
    """The recipe of diffusers' documentation: the base up to a share of the noise, then the refiner from there."""

    def __init__(self, base: Path, refiner: Path, device: str) -> None:
        self.base = StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False).to(device)
        self.refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(refiner, add_watermarker=False).to(device)
        for pipeline in (self.base, self.refiner):
            pipeline.set_progress_bar_config(disable=True)

    def latents(self, request: ImageRequest, seed: int = 1, base_calls: int | None = None) -> torch.Tensor:
        """Final latents. `base_calls` stops the base there, and not where its own counting of `denoising_end` would."""
        for pipeline in (self.base, self.refiner):
            pipeline.scheduler = SCHEDULERS[request.scheduler](pipeline.scheduler.config)
        generator = torch.Generator("cpu").manual_seed(seed)
        common = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt or None,
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance_scale,
            "generator": generator,
            "output_type": "latent",
        }
        size = {"height": request.height, "width": request.width}
        share = request.high_noise_frac
        if share == 1:
            return self.base(**common, **size).images
        if base_calls is None:
            noisy = self.base(**common, **size, denoising_end=share).images
            return self.refiner(**common, image=noisy, denoising_start=share).images

        kept: list[torch.Tensor] = []

        def keep(pipeline, index: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]):
            if index == base_calls - 1:
                kept.append(tensors["latents"].clone())
                pipeline._interrupt = True  # skips the calls that are left, and with them their noise
            return {}

        self.base(**common, **size, callback_on_step_end=keep)
        self.refiner.get_timesteps = lambda *_, **__: self._from(base_calls)
        try:
            return self.refiner(**common, image=kept[0], denoising_start=share).images
        finally:
            del self.refiner.get_timesteps

    def _from(self, call: int) -> tuple[torch.Tensor, int]:
        scheduler = self.refiner.scheduler
        scheduler.set_begin_index(call)
        return scheduler.timesteps[call:], len(scheduler.timesteps) - call


@pytest.fixture(scope="module")
def stock(folders: tuple[Path, Path], device: str) -> Stock:
    return Stock(*folders, device)


def relative_error(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("steps", [5, 20, 40])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize(
    "scheduler", ["euler", "euler_karras", "euler_ancestral", "ddim", "dpmpp_2m", "dpmpp_2m_karras"]
)
def test_handoff_equals_the_stock_two_pipeline_recipe(ensemble, stock, scheduler: str, share: float, steps: int):
    request = replace(REQUEST, scheduler=scheduler, high_noise_frac=share, steps=steps)
    mine = finished(ensemble, request)
    if Stage.REFINER in mine.stages or share == 1:
        theirs = stock.latents(request)
    else:
        # Here nothing is left for the refiner, and the stock refiner, asked for the last 0 of its steps, repeats all.
        theirs = stock.latents(replace(request, high_noise_frac=1.0))
        assert [each.notice for each in mine.warnings] == [Notice.EXPERT_IDLE]
    assert len(mine.stages) == steps
    assert relative_error(mine.latents, theirs) < 1e-4


@pytest.mark.parametrize("steps", [5, 20, 40])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("scheduler", ["heun", "heun_karras"])
def test_second_order_step_is_never_split_between_experts(ensemble, stock, scheduler: str, share: float, steps: int):
    # Each step of Heun is two calls, and its table of timesteps has all but the first twice. The stock base counts the
    # table and so stops between the two calls of a step, which the stock refiner then begins again from latents that
    # are half a step further: one call too many, and a wrong one. The reference is stopped between two steps instead.
    request = replace(REQUEST, scheduler=scheduler, high_noise_frac=share, steps=steps)
    mine = finished(ensemble, request)
    calls = mine.stages.count(Stage.BASE)
    assert len(mine.stages) == 2 * steps - 1
    if calls < len(mine.stages):
        assert calls % 2 == 0
        theirs = stock.latents(request, base_calls=calls)
        assert relative_error(mine.latents, stock.latents(request)) > 1e-4, "has diffusers learnt to count?"
    else:
        theirs = stock.latents(replace(request, high_noise_frac=1.0))
    assert relative_error(mine.latents, theirs) < 1e-4


def test_default_schedule_has_32_base_and_8_refiner_steps(ensemble):
    stages = ensemble.plan(replace(REQUEST, steps=40), ensemble.encode(REQUEST), 1).stages
    assert stages == (Stage.BASE,) * 32 + (Stage.REFINER,) * 8


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0},
        {"guidance_scale": 12.5},
        {"negative_prompt": ""},
        {"width": 48, "height": 24},
        {"prompt": "a cat " * 100},
    ],
    ids=lambda changes: ", ".join(f"{name} {str(value)[:12]!r}" for name, value in changes.items()),
)
def test_request_options_equal_the_stock_recipe(ensemble, stock, changes: dict):
    request = replace(REQUEST, **changes)
    assert relative_error(finished(ensemble, request).latents, stock.latents(request)) < 1e-4


def test_pixels_equal_the_stock_pipelines(ensemble, stock):
    mine = ensemble.decode(finished(ensemble, replace(REQUEST, high_noise_frac=1.0)))
    stock.base.scheduler = SCHEDULERS["euler"](stock.base.scheduler.config)
    theirs = stock.base(
        "a cat",
        negative_prompt="a dog",
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(1),
        height=32,
        width=32,
        guidance_scale=5.0,
    )
    assert mine.dtype == np.uint8
    assert np.array_equal(mine, np.asarray(theirs.images[0]))


def test_latent_statistics_decode_like_the_stock_pipeline(ensemble, stock):
    trajectory = finished(ensemble, replace(REQUEST, high_noise_frac=1.0, steps=2))
    plain = ensemble.decode(trajectory)
    for vae in (ensemble._vae, stock.base.vae):
        vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.2, 1.0])
    try:
        mine = ensemble.decode(trajectory)
        stock.base.scheduler = SCHEDULERS["euler"](stock.base.scheduler.config)
        theirs = stock.base(
            "a cat",
            negative_prompt="a dog",
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(1),
            height=32,
            width=32,
            guidance_scale=5.0,
        )
    finally:
        for vae in (ensemble._vae, stock.base.vae):
            vae.register_to_config(latents_mean=None, latents_std=None)
    assert np.array_equal(mine, np.asarray(theirs.images[0]))
    assert not np.array_equal(mine, plain)


@pytest.fixture(scope="module")
def embedded_off() -> model.Ensemble:
    return model.load(checkpoint.inspect(EMBEDDED / "base", EMBEDDED / "refiner"), device="cpu", compile="off")


@pytest.mark.parametrize(
    "changes", [{}, {"guidance_scale": 1.0}, {"width": 200, "height": 264}], ids=["guided", "unguided", "another size"]
)
@pytest.mark.parametrize("stage", [Stage.BASE, Stage.REFINER])
@torch.inference_mode()
def test_compile_off_equals_stock_diffusers_bit_for_bit_on_cpu(embedded_off, stage: Stage, changes: dict):
    options = {"variant": "fp16", "dtype": torch.float32}
    unet = UNet2DConditionModel.from_pretrained(EMBEDDED / stage.name.lower() / "unet", **options)
    vae = AutoencoderKL.from_pretrained(EMBEDDED / "base" / "vae", **options)
    request = replace(default_request(embedded_off.info, "cat napping", seed=1), steps=5, **changes)
    trajectory = embedded_off.plan(request, embedded_off.encode(request), 1)
    trajectory.position = trajectory.stages.index(stage)
    added, hidden = trajectory.conditioning.added[stage], trajectory.conditioning.hidden[stage]
    rows, timestep = trajectory.network_input(), trajectory.timesteps[trajectory.position]
    (mine,) = embedded_off._predicted([trajectory], [rows])
    theirs = unet(rows, timestep, encoder_hidden_states=hidden, added_cond_kwargs=dict(added)).sample
    assert torch.equal(mine, theirs)
    scaled = trajectory.denoised / vae.config.scaling_factor
    assert torch.equal(embedded_off._decoded(trajectory.denoised, torch.float32), vae.decode(scaled).sample)


def test_ddim_equals_euler_approximately():
    # Without noise of its own DDIM is Euler's method in other words (Song et al., 2021, section 4.3).
    embedded = model.load(checkpoint.inspect(EMBEDDED / "base", EMBEDDED / "refiner"), device="cpu")
    request = replace(default_request(embedded.info, "cat napping"), steps=10)
    euler, ddim = (finished(embedded, replace(request, scheduler=name)).latents for name in ("euler", "ddim"))
    assert relative_error(ddim, euler) < 0.1


def test_same_seed_gives_same_bytes_and_another_seed_other_bytes(ensemble):
    request = replace(REQUEST, scheduler="euler_ancestral", steps=6)
    one, again = (ensemble.decode(finished(ensemble, request)) for _ in range(2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, ensemble.decode(finished(ensemble, request, seed=2)))


def test_interleaved_images_equal_images_made_alone(ensemble):
    requests = [replace(REQUEST, scheduler=name, steps=6) for name in ("dpmpp_2m", "euler_ancestral")]
    alone = [finished(ensemble, request).latents for request in requests]
    together = [ensemble.plan(request, ensemble.encode(request), 1) for request in requests]
    for _ in range(6):
        for trajectory in together:
            ensemble.step([trajectory])
    assert all(torch.equal(one.latents, other) for one, other in zip(together, alone, strict=True))


def test_launched_step_of_a_cpu_runs_in_wait(ensemble):
    trajectory = ensemble.plan(REQUEST, ensemble.encode(REQUEST), 1)
    launched = ensemble.launch([trajectory])
    assert trajectory.position == 0
    launched.wait()
    assert trajectory.position == 1


@pytest.mark.parametrize("scheduler", ["euler", "euler_ancestral", "heun"])
def test_lookahead_changes_no_bytes(ensemble, scheduler: str, monkeypatch):
    request = replace(REQUEST, scheduler=scheduler)
    expected = [finished(ensemble, request, seed) for seed in (1, 2)]
    monkeypatch.setattr(ensemble, "_looks_ahead", True)
    calls: list[Stage] = []
    for stage, network in ensemble._predictors.items():
        monkeypatch.setitem(
            ensemble._predictors, stage, lambda *inputs, its=network, of=stage: calls.append(of) or its(*inputs)
        )
    conditioning = replace(ensemble.encode(request), compiled=True)  # as if the calls were CUDA graphs
    one, other = (ensemble.plan(request, conditioning, seed) for seed in (1, 2))
    in_a_row = 5
    for _ in range(in_a_row):
        ensemble.step([one])
    assert len(calls) == in_a_row + 1
    ensemble.step([other])  # the look-ahead to the sixth call of `one` is discarded
    ensemble.step([one])
    assert len(calls) == in_a_row + 3
    for trajectory in (one, other):
        while trajectory.position < len(trajectory.stages):
            ensemble.step([trajectory])
    assert len(calls) == 1 + len(one.stages) + len(other.stages), "one look-ahead was discarded"
    for trajectory, once in zip((one, other), expected, strict=True):
        assert torch.equal(trajectory.latents, once.latents)
        assert torch.equal(trajectory.denoised, once.denoised)


def test_last_texts_are_encoded_once(ensemble):
    read: list[torch.nn.Module] = []
    for encoder in ensemble._networks.text_encoders:
        layer = next(each for each in encoder.modules() if isinstance(each, torch.nn.Embedding))
        layer.register_forward_hook(lambda layer, *_: read.append(layer))
    request = replace(REQUEST, negative_prompt="a hog")  # of which no other test has spoken
    first = ensemble.encode(replace(request, prompt="a hen"))
    assert len(read) == 2 * len(ensemble._networks.text_encoders), "once for each text, for both experts"
    again = ensemble.encode(replace(request, prompt="a hat"))
    assert len(read) == 3 * len(ensemble._networks.text_encoders), "the negative prompt is the same"
    for stage in (Stage.BASE, Stage.REFINER):
        assert torch.equal(first.hidden[stage][0], again.hidden[stage][0])
        assert not torch.equal(first.hidden[stage][1], again.hidden[stage][1])


def test_guidance_of_one_or_less_runs_one_row(ensemble):
    assert ensemble.encode(replace(REQUEST, guidance_scale=1.0)).hidden[Stage.BASE].shape[0] == 1
    assert ensemble.encode(REQUEST).hidden[Stage.BASE].shape[0] == 2


def test_base_works_without_refiner(folders):
    alone = model.load(checkpoint.inspect(folders[0], None), device="cpu")
    assert not alone.info.has_refiner
    assert alone.info.default_high_noise_frac == 1.0
    assert set(finished(alone, replace(REQUEST, high_noise_frac=1.0, steps=4)).stages) == {Stage.BASE}


@pytest.mark.parametrize(
    ("share", "message"), [(0.999, "the refiner has none"), (0.001, "the base made the first step")]
)
def test_expert_without_a_step_is_a_warning(ensemble, share: float, message: str):
    trajectory = ensemble.plan(replace(REQUEST, high_noise_frac=share), ensemble.encode(REQUEST), 1)
    assert message in trajectory.warnings[0].message
    assert trajectory.stages[0] is Stage.BASE


def test_dropped_tail_of_a_prompt_is_quoted(ensemble):
    fits, tail = "0123456789" * 7 + "01234", "Ünïcode 😺 tail"
    dropped = ensemble.encode(replace(REQUEST, prompt=fits + " " + tail, negative_prompt=fits))
    (warning,) = dropped.warnings
    assert (warning.notice, warning.field) == (Notice.PROMPT_TRUNCATED, "data.prompt")
    assert f'"{tail}"' in warning.message
    both = ensemble.encode(replace(REQUEST, prompt=fits + "x" * 10_000, negative_prompt=fits + "y" * 10_000))
    assert [each.field for each in both.warnings] == ["data.prompt", "parameter.negative-prompt"]
    assert all(len(each.message) < 300 for each in both.warnings)


def test_overflow_is_an_error_and_never_a_black_image(ensemble):
    trajectory = finished(ensemble, replace(REQUEST, steps=2))
    trajectory.latents = trajectory.latents * float("nan")
    with pytest.raises(model.NonFiniteImage, match="not finite"):
        ensemble.decode(trajectory)
    trajectory.latents = torch.full_like(trajectory.latents, 3e38)
    with pytest.raises(model.NonFiniteImage, match="even in fp32"):
        ensemble.decode(trajectory)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close_to_fp32(folders, ensemble, device: str, precision: str):
    half = model.load(checkpoint.inspect(*folders), device=device, precision=precision)
    request = replace(REQUEST, steps=4)
    mine = finished(half, request)
    assert mine.latents.dtype == torch.float32
    assert relative_error(mine.latents, finished(ensemble, request).latents) < 0.05
    difference = half.decode(mine).astype(int) - ensemble.decode(finished(ensemble, request))
    assert np.abs(difference).mean() < 4
    assert half.info.precision == precision


def test_autoencoder_that_overflows_in_fp16_decodes_in_fp32(folders, device: str):
    half = model.load(checkpoint.inspect(*folders), device=device, precision="fp16")
    half._vae.register_to_config(force_upcast=False)
    with torch.no_grad():  # what flows between these two now exceeds 65504, the largest fp16
        half._vae.post_quant_conv.weight.mul_(1e3)
        half._vae.decoder.conv_in.weight.mul_(1e3)
    trajectory = finished(half, replace(REQUEST, steps=2))
    assert not torch.isfinite(half._decoded(trajectory.latents, torch.float16)).all()
    assert half.decode(trajectory).std() > 0
    assert half._vae.dtype == torch.float16


def test_loading_prints_nothing(folders, capfd: pytest.CaptureFixture[str]):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load(checkpoint.inspect(*folders), device="cpu")
    assert capfd.readouterr() == ("", "")
