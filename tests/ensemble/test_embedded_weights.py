"""The installed releases of diffusers and transformers load every tensor of the embedded weights.

transformers before 5.6 leaves the first text encoder at random values, without an error.
"""

from collections import Counter

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from server.settings import EMBEDDED


def contents(tensors: dict[str, torch.Tensor]) -> Counter[tuple[tuple[int, ...], bytes]]:
    """Count tensors by shape and values: releases name them differently."""
    halves = (each.half() for each in tensors.values() if each.is_floating_point())
    return Counter((tuple(each.shape), each.contiguous().view(torch.uint8).numpy().tobytes()) for each in halves)


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("base/text_encoder", CLIPTextModel),
        ("base/text_encoder_2", CLIPTextModelWithProjection),
        ("base/unet", UNet2DConditionModel),
        ("base/vae", AutoencoderKL),
        ("refiner/unet", UNet2DConditionModel),
    ],
)
def test_every_tensor_of_the_file_is_loaded(part: str, kind: type):
    files = list((EMBEDDED / part).glob("*.fp16*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    network = kind.from_pretrained(EMBEDDED / part, variant="fp16")
    assert tensors
    assert contents(tensors) - contents(network.state_dict()) == Counter()
