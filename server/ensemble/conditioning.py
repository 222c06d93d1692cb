"""SDXL's micro-conditioning, and the warning for prompts that are too long."""

from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from server.domain import ImageRequest, Notice, Warning

# The refiner is conditioned on an aesthetic score. These values were published with it, for the prompt and for the
# negative prompt.
_AESTHETIC_SCORE, _NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5


def time_ids(pipeline: Any, request: ImageRequest, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return SDXL's micro-conditioning for the prompt and for the negative prompt, of shape (1, 5 or 6).

    Original and target size are the request's, and nothing is cropped. The refiner takes a score instead of a target.
    """
    size = (request.height, request.width)
    width = pipeline.text_encoder_2.config.projection_dim
    if isinstance(pipeline, StableDiffusionXLPipeline):
        ids = pipeline._get_add_time_ids(size, (0, 0), size, dtype=dtype, text_encoder_projection_dim=width)
        return ids, ids
    scores = (_AESTHETIC_SCORE, _NEGATIVE_AESTHETIC_SCORE)
    both: tuple[torch.Tensor, torch.Tensor] = pipeline._get_add_time_ids(
        size, (0, 0), size, *scores, size, (0, 0), size, dtype=dtype, text_encoder_projection_dim=width
    )
    return both


def truncation_warning(field: str, tail: str) -> Warning:
    """Warn that the text encoders drop the tail of the prompt in a field."""
    quoted = tail if len(tail) <= 200 else f"{tail[:120]} ... {tail[-60:]}"
    return Warning(
        Notice.PROMPT_TRUNCATED, field, f'the text encoders read 77 tokens; beyond them and dropped: "{quoted}"'
    )
