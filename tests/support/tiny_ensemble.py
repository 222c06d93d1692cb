"""A random SDXL ensemble of a few hundred kilobytes in the published layout, for tests of arithmetic and of folders.

Same architecture and files as stable-diffusion-xl-base-1.0 and -refiner-1.0: two text encoders of which the refiner has
the second alone, micro-conditioning by size and crop, or by aesthetic score. The scheduler is the published one.
"""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

_TIME_EMBEDDING = 8
_NARROW, _WIDE = 16, 32  # widths of the two text encoders


def save(folder: Path, seed: int = 0, **options: object) -> tuple[Path, Path]:
    """Write base and refiner below `folder`, fp32; `options` go to save_pretrained, `variant="fp16"` for example."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer(folder / "vocabulary")
    narrow = CLIPTextModel(_text_config(_NARROW))
    wide = CLIPTextModelWithProjection(_text_config(_WIDE))
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=32,
        scaling_factor=0.13025,
    )
    base = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=narrow,
        text_encoder_2=wide,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=_unet(context=_NARROW + _WIDE, ids=6),
        scheduler=_scheduler(),
        add_watermarker=False,
    )
    refiner = StableDiffusionXLImg2ImgPipeline(
        vae=vae,
        text_encoder=None,
        text_encoder_2=wide,
        tokenizer=None,
        tokenizer_2=tokenizer,
        unet=_unet(context=_WIDE, ids=5),
        scheduler=_scheduler(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    for name, pipeline in (("base", base), ("refiner", refiner)):
        pipeline.save_pretrained(folder / name, **options)
    return folder / "base", folder / "refiner"


def _scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )


def _unet(context: int, ids: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        cross_attention_dim=context,
        addition_embed_type="text_time",
        addition_time_embed_dim=_TIME_EMBEDDING,
        projection_class_embeddings_input_dim=_WIDE + ids * _TIME_EMBEDDING,
        use_linear_projection=True,
        norm_num_groups=8,
    )


def _text_config(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """One token per byte, so that any text at all can be a prompt."""
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
