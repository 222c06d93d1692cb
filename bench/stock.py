"""The baseline of the benchmarks: diffusers' two SDXL pipelines, run and optionally compiled as its documentation says.

This module imports nothing of the service, which sets variables that torch reads on import.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

HIGH_NOISE_FRAC = 0.8  # the base's share of the steps


class Stock:
    """The ensemble of experts in diffusers' documentation."""

    def __init__(self, base: Path, refiner: Path, device: str, dtype: torch.dtype, compiled: bool) -> None:
        files = {"dtype": dtype, "variant": "fp16", "add_watermarker": False}
        self._base = StableDiffusionXLPipeline.from_pretrained(base, **files).to(device)
        shared = {part: getattr(self._base, part) for part in ("vae", "text_encoder_2", "tokenizer_2")}
        self._refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(refiner, **shared, **files).to(device)
        for pipeline in (self._base, self._refiner):
            pipeline.set_progress_bar_config(disable=True)
            if compiled:
                pipeline.unet.to(memory_format=torch.channels_last)
                pipeline.unet = torch.compile(pipeline.unet, mode="reduce-overhead", fullgraph=True)
        if compiled:
            self._base.vae.decode = torch.compile(self._base.vae.decode, mode="reduce-overhead", fullgraph=True)

    @torch.inference_mode()
    def image(self, prompt: str, steps: int, seed: int, **options: Any) -> Any:
        """Return an image. `options` go to both pipelines."""
        options |= {"prompt": prompt, "num_inference_steps": steps}
        generator = torch.Generator().manual_seed(seed)
        noisy = self._base(**options, denoising_end=HIGH_NOISE_FRAC, generator=generator, output_type="latent").images
        return self._refiner(**options, denoising_start=HIGH_NOISE_FRAC, generator=generator, image=noisy).images[0]
