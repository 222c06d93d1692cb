"""Convolutions with known answers: PyTorch's in fp64."""

import torch
import torch.nn.functional as F
from torch import nn


def convolution(channels: int, outputs: int, **options) -> nn.Conv2d:
    return nn.Conv2d(channels, outputs, 3, **({"padding": 1, "bias": False} | options))


def images(batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(batch, channels, height, width).to(memory_format=torch.channels_last)


def convolved(
    layer: nn.Conv2d, given: torch.Tensor, bias: torch.Tensor | None, kept: torch.Tensor | None
) -> torch.Tensor:
    """What PyTorch makes of images in fp64, plus a bias, perhaps of each image another, and what is kept."""
    made = F.conv2d(given.double(), layer.weight.double(), padding=1)
    if bias is not None:
        made += bias.double().expand(len(given), -1)[:, :, None, None]
    return made if kept is None else made + kept
