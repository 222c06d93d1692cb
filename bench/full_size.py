"""Write a full-size SDXL ensemble with random weights in the published layout, about 10 GB in fp16.

The configurations are those of stable-diffusion-xl-base-1.0 and -refiner-1.0, the vocabulary is the embedded one. The
speed of the networks does not depend on the weights. The size of the images does: random weights draw noise, a JPEG of
2 MB where a picture has less than 1 MB. With `--contrast 0.1` it has 0.6 MB. Run: python -m bench.full_size FOLDER
"""

import argparse
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

from server.settings import EMBEDDED


def save(folder: Path, contrast: float = 1.0) -> tuple[Path, Path]:
    """Write base and refiner below `folder` as the fp16 variant, with the contrast of images scaled by `contrast`."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        vae = _vae().half()
        vae.decoder.conv_out.weight.data *= contrast
        clip_l = CLIPTextModel(_text_config(768, 3072, 12, 12, "quick_gelu")).half()
        clip_g = CLIPTextModelWithProjection(_text_config(1280, 5120, 32, 20, "gelu")).half()
        base_unet, refiner_unet = _base_unet().half(), _refiner_unet().half()
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "base" / "tokenizer")
    base = StableDiffusionXLPipeline(
        vae, clip_l, clip_g, tokenizer, tokenizer, base_unet, _scheduler(), add_watermarker=False
    )
    refiner = StableDiffusionXLImg2ImgPipeline(
        vae,
        None,
        clip_g,
        None,
        tokenizer,
        refiner_unet,
        _scheduler(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    base.save_pretrained(folder / "base", variant="fp16")
    refiner.save_pretrained(folder / "refiner", variant="fp16")
    return folder / "base", folder / "refiner"


def _base_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )


def _refiner_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(384, 768, 1536, 1536),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=4,
        attention_head_dim=(6, 12, 24, 24),
        cross_attention_dim=1280,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2560,
        use_linear_projection=True,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=1024,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        scaling_factor=0.13025,
        force_upcast=True,
    )


def _text_config(width: int, inner: int, layers: int, heads: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=activation,
        projection_dim=1280 if width == 1280 else 768,
    )


def _scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--contrast", type=float, default=1.0, help="scale of the images' contrast (default: 1)")
    options = parser.parse_args()
    print(*save(options.folder, options.contrast))
