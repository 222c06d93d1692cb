"""Load the pipelines of both experts from their folders, and describe the model that they make."""

from typing import Any

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from server.domain import ModelInfo
from server.ensemble import checkpoint, provenance
from server.ensemble.checkpoint import Checkpoint, Experts
from server.ensemble.trajectory import SCHEDULERS
from server.errors import MissingPart


def load_pipelines(
    experts: Experts, dtype: torch.dtype
) -> tuple[StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline | None]:
    """Load the base and, if there is one, the refiner. They share the autoencoder, and equal text encoders."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    base = _pipeline(StableDiffusionXLPipeline, experts.base, dtype)
    if experts.refiner is None:
        return base, None
    shared: dict[str, Any] = {"vae": base.vae}
    if experts.share("text_encoder_2"):
        shared |= {"text_encoder_2": base.text_encoder_2, "tokenizer_2": base.tokenizer_2}
    return base, _pipeline(StableDiffusionXLImg2ImgPipeline, experts.refiner, dtype, **shared)


def describe(
    experts: Experts,
    pipeline: StableDiffusionXLPipeline,
    device: str,
    precision: str,
    name: str | None,
    max_batch: int,
) -> ModelInfo:
    """Describe the model that the experts make, after hashing their files."""
    defaults = checkpoint.defaults(experts.base)
    return ModelInfo(
        name=name or defaults.name or experts.base.folder.resolve().name,
        fingerprint=experts.fingerprint(),
        has_refiner=experts.refiner is not None,
        device=device,
        precision=precision,
        schedulers=tuple(SCHEDULERS),
        native_side=pipeline.unet.config.sample_size * pipeline.vae_scale_factor,
        side_multiple=pipeline.vae_scale_factor,
        default_steps=defaults.steps,
        default_guidance_scale=defaults.guidance_scale,
        default_high_noise_frac=defaults.high_noise_frac if experts.refiner is not None else 1.0,
        default_scheduler="euler",
        environment=provenance.environment(device, precision, max_batch),
    )


def _pipeline(kind: Any, files: Checkpoint, dtype: torch.dtype, **parts: Any) -> Any:
    try:
        return kind.from_pretrained(
            files.folder,
            dtype=dtype,
            variant=files.variant,
            use_safetensors=True,
            local_files_only=True,
            add_watermarker=False,
            **parts,
        )
    except ValueError as error:
        reason = str(error).partition(". ")[0]
        raise MissingPart(f"{files.folder} does not fit together ({reason}); fetch the checkpoint again") from error
