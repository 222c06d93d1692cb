"""The networks of the embedded ensemble: SDXL's architecture and conditioning, at a three-hundredth of its size."""

from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training.art import SIDE

SHRINK = 8  # pixels of a side per latent
NARROW, WIDE = 96, 160  # widths of the two text encoders
_TIME_ID = 32  # width of the embedding of each size, crop coordinate and score


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=SIDE,
        block_out_channels=(32, 64, 96, 128),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=16,
        latent_channels=4,
        scaling_factor=1.0,  # whitening of the latents is folded into the weights
        force_upcast=False,
    )


def base_unet() -> UNet2DConditionModel:
    return _unet((96, 160, 192), context=NARROW + WIDE, ids=6)


def refiner_unet() -> UNet2DConditionModel:
    return _unet((64, 128, 160), context=WIDE, ids=5)


def _unet(widths: tuple[int, ...], context: int, ids: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE // SHRINK,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=tuple(width // 32 for width in widths),  # diffusers' name for the number of heads
        cross_attention_dim=context,
        addition_embed_type="text_time",
        addition_time_embed_dim=_TIME_ID,
        projection_class_embeddings_input_dim=WIDE + ids * _TIME_ID,
        use_linear_projection=True,
        norm_num_groups=16,
    )


def text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    return (
        CLIPTextModel(_text_config(tokenizer, NARROW, "quick_gelu")),
        CLIPTextModelWithProjection(_text_config(tokenizer, WIDE, "gelu")),
    )


def _text_config(tokenizer: CLIPTokenizer, width: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=4,
        num_attention_heads=width // 32,
        projection_dim=width,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def scheduler() -> EulerDiscreteScheduler:
    """Return SDXL's noise schedule, with trailing spacing, which starts at the last timestep (Lin et al., 2023)."""
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing", steps_offset=1
    )
