"""Previews look like the final image, change no bytes, and may be drawn by any thread."""

import json
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch.nn.functional import avg_pool2d

from server import model, runtime
from server.domain import ImageRequest, default_request
from server.ensemble import autoencoder, checkpoint, devices, preview
from server.ensemble.trajectory import SCHEDULERS, Trajectory
from server.errors import CheckpointError, GitLfsPointer, MissingPart, TruncatedFile
from server.settings import EMBEDDED, Settings


@pytest.fixture(scope="module")
def tiny(folders: tuple[Path, Path]) -> model.Ensemble:
    return model.load(checkpoint.inspect(*folders), device="cpu")


@pytest.fixture(scope="module")
def embedded() -> model.Ensemble:
    return model.load(checkpoint.inspect(EMBEDDED / "base", EMBEDDED / "refiner"), device="cpu")


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    small = {"encoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1)}
    small |= {"decoder_block_out_channels": (8, 8), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(**small).save_pretrained(tmp_path / "taesd")
    return tmp_path / "taesd"


def planned(ensemble: model.Ensemble, request: ImageRequest) -> Trajectory:
    return ensemble.plan(request, ensemble.encode(request), seed=1)


def tiny_request(scheduler: str = "euler") -> ImageRequest:
    return ImageRequest("a cat", "a dog", (1,), 6, 5.0, 0.6, scheduler, 32, 48)


def shrunken(pixels: np.ndarray) -> np.ndarray:
    """The image at the size of a preview, each pixel the mean of 8 x 8."""
    return avg_pool2d(torch.from_numpy(pixels).permute(2, 0, 1)[None].float(), 8)[0].permute(1, 2, 0).numpy()


def decibels(shown: np.ndarray, true: np.ndarray) -> float:
    """Peak signal-to-noise ratio."""
    return float(10 * np.log10(255**2 / np.square(shown - true).mean()))


@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_previews_approach_the_image(embedded, scheduler: str):
    request = replace(default_request(embedded.info, "cat napping"), scheduler=scheduler, steps=12, width=336)
    trajectory = planned(embedded, request)
    shown, noisy = [], []
    for _ in trajectory.stages:
        embedded.step([trajectory])
        shown.append(embedded.preview(trajectory))
        noisy.append(embedded._previewer(trajectory.latents))
    true = shrunken(embedded.decode(trajectory))
    assert shown[0].dtype == np.uint8
    assert shown[0].shape == true.shape == (32, 42, 3)
    early, half, late, last = (decibels(shown[len(shown) * part // 4 - 1], true) for part in (1, 2, 3, 4))
    assert early < half < late
    assert last > 20
    assert np.corrcoef(shown[-1].ravel(), true.ravel())[0, 1] > 0.95
    assert half > decibels(noisy[len(noisy) // 2 - 1], true) + 1, "what the step foresees, not the noisy latents"


def test_preview_before_the_first_step_is_noise(embedded):
    trajectory = planned(embedded, default_request(embedded.info, "cat napping"))
    assert embedded.preview(trajectory).std() > 50


def test_linear_preview_is_deterministic(tiny):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = preview.fit(encoded(tiny), tiny.info.side_multiple)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(again.colours, tiny._previewer.colours)
    assert np.array_equal(again.bias, tiny._previewer.bias)


def encoded(ensemble: model.Ensemble) -> Callable[[torch.Tensor], torch.Tensor]:
    return partial(autoencoder.encode, ensemble._vae, torch.device("cpu"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fitting_leaves_the_weights_unchanged(folders, tiny, precision: str):
    half = model.load(checkpoint.inspect(*folders), device="cpu", precision=precision)
    untouched = AutoencoderKL.from_pretrained(folders[0] / "vae", torch_dtype=devices.PRECISIONS[precision])
    weights = half._vae.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in untouched.state_dict().items())
    assert all(weights[name].dtype == tensor.dtype for name, tensor in untouched.state_dict().items())
    assert np.allclose(half._previewer.colours, tiny._previewer.colours, rtol=0.05, atol=0.05)


def test_encoding_inverts_decoding_with_latent_statistics_too(tiny):
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    plain = tiny._decoded(encoded(tiny)(pixels), torch.float32)
    tiny._vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.2, 1.0])
    try:
        assert torch.allclose(tiny._decoded(encoded(tiny)(pixels), torch.float32), plain, atol=1e-4)
    finally:
        tiny._vae.register_to_config(latents_mean=None, latents_std=None)


@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_step_never_writes_into_tensors_of_another_thread(tiny, scheduler: str):
    trajectory = planned(tiny, tiny_request(scheduler))
    for _ in trajectory.stages:
        held = trajectory.latents, trajectory.denoised
        copies = [each.clone() for each in held]
        tiny.step([trajectory])
        assert trajectory.latents is not held[0]
        assert trajectory.denoised is not held[1]
        assert all(torch.equal(each, copy) for each, copy in zip(held, copies, strict=True))


def test_previews_in_another_thread_show_whole_steps_and_change_no_bytes(tiny):
    alone = planned(tiny, tiny_request())
    states = [tiny.preview(alone)]
    for _ in alone.stages:
        tiny.step([alone])
        states.append(tiny.preview(alone))

    watched = planned(tiny, tiny_request())
    seen: list[np.ndarray] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            seen.append(tiny.preview(watched))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in watched.stages:
        tiny.step([watched])
    ended.set()
    watcher.join()
    assert seen
    assert all(any(np.array_equal(each, state) for state in states) for each in seen)
    assert torch.equal(watched.latents, alone.latents)


def test_latents_that_are_not_finite_have_a_preview_without_warnings(tiny):
    trajectory = planned(tiny, tiny_request())
    trajectory.denoised = trajectory.denoised * float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiny.preview(trajectory).max() == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_taesd_draws_the_previews_if_given(folders, decoder: Path, precision: str):
    ensemble = model.load(checkpoint.inspect(*folders), device="cpu", precision=precision, preview_decoder=decoder)
    trajectory = planned(ensemble, tiny_request())
    ensemble.step([trajectory])
    shown = ensemble.preview(trajectory)
    with torch.no_grad():
        true = AutoencoderTiny.from_pretrained(decoder).decode(trajectory.denoised.clone()).sample[0]
    true = ((true / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
    assert shown.shape == (48, 32, 3)
    assert np.abs(shown - true).max() <= (0.6 if precision == "fp32" else 8)


def test_preview_decoder_flag_loads_the_taesd(decoder: Path):
    ensemble = runtime.load(Settings(preview_decoder=decoder, device="cpu"))
    trajectory = planned(ensemble, default_request(ensemble.info, "cat napping"))
    assert ensemble.preview(trajectory).shape == (64, 64, 3)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content)


def for_more_channels(folder: Path) -> None:
    AutoencoderTiny(latent_channels=16).save_pretrained(folder)


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("break_it", "error", "words"),
    [
        (remove("config.json"), MissingPart, "config.json is missing"),
        (write("config.json", json.dumps({"_class_name": "AutoencoderKL"})), MissingPart, "holds AutoencoderKL where"),
        (write("config.json", "{}"), MissingPart, "where an AutoencoderTiny belongs"),
        (remove(WEIGHTS), MissingPart, "has no safetensors weights"),
        (write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), GitLfsPointer, "`git lfs pull` in {folder}"),
        (write(WEIGHTS, "x"), TruncatedFile, "is not whole"),
        (for_more_channels, MissingPart, "for latents of 16 channels and the experts' have 4"),
    ],
)
def test_broken_taesd_is_reported_in_one_sentence(
    folders, decoder: Path, break_it, error: type[CheckpointError], words: str
):
    break_it(decoder)
    with pytest.raises(error) as caught:
        model.load(checkpoint.inspect(*folders), device="cpu", preview_decoder=decoder)
    assert words.format(folder=decoder) in str(caught.value)
    assert "\n" not in str(caught.value)
