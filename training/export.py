"""Write the trained networks as the two folders that the service loads, in the layout of the published checkpoints."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training import architecture

_SHARD = "15MB"
DEFAULTS = {"name": "mini-sdxl-emoji", "steps": 20, "guidance_scale": 5.0, "high_noise_frac": 0.8}


def save(
    folder: Path,
    tokenizer: CLIPTokenizer,
    narrow: CLIPTextModel,
    wide: CLIPTextModelWithProjection,
    vae: AutoencoderKL,
    base: UNet2DConditionModel,
    refiner: UNet2DConditionModel,
) -> None:
    """Write base and refiner below `folder`, in fp16, in shards below 16 MB.

    The refiner's folder does not contain the parts that it shares with the base: the second text encoder and the
    autoencoder.
    """
    for part in (narrow, wide, vae, base, refiner):
        part.to(torch.float16)
    # The published base pads for its second encoder with "!", token 0, and for the first with the end token.
    tokenizer_2 = CLIPTokenizer.from_pretrained(tokenizer.name_or_path, pad_token="!")
    StableDiffusionXLPipeline(
        vae, narrow, wide, tokenizer, tokenizer_2, base, architecture.scheduler(), add_watermarker=False
    ).save_pretrained(folder / "base", variant="fp16", max_shard_size=_SHARD)
    StableDiffusionXLImg2ImgPipeline(
        vae,
        None,
        wide,
        None,
        tokenizer_2,
        refiner,
        architecture.scheduler(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    ).save_pretrained(folder / "refiner", variant="fp16", max_shard_size=_SHARD)
    for part in ("text_encoder_2", "tokenizer_2", "vae"):
        shutil.rmtree(folder / "refiner" / part)
    for file in folder.glob("*/*/tokenizer.json"):  # an indented file is three times as large
        file.write_text(json.dumps(json.loads(file.read_text()), ensure_ascii=False, separators=(",", ":")) + "\n")
    for file in folder.glob("*/*/config.json"):  # remove the path from which a part was loaded
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n")
    (folder / "base" / "defaults.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n")
