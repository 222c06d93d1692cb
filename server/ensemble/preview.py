"""A small picture of latents that are still on their way, cheap enough to be made beside the steps.

Latents are nearly a small picture already, in colours of their own: a linear map, fitted to whichever autoencoder is
loaded, turns those into red, green and blue, one pixel per latent. A TAESD, where one is given, draws every pixel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from numpy.typing import NDArray

from server.errors import MissingPart

_LEVELS = 4  # of red, of green and of blue: 64 colours, in a chart of 8 x 8 patches
_PATCH = 4  # latents to a patch's side; the encoder sees that far around each


@dataclass(frozen=True)
class LinearPreview:
    """Latents of shape (1, channels, height, width) to RGB of (height, width, 3).

    `colours` has shape (channels, 3), `bias` (3,); RGB is 0 to 1. It is all plain numpy loops: a matrix library, or
    torch on a second thread, would bring threads of its own, which on the CPU get in the way of the networks'.
    """

    colours: NDArray[np.float32]
    bias: NDArray[np.float32]

    def __call__(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        rgb = np.einsum("chw,cr->hwr", latents[0].float().cpu().numpy(), self.colours) + self.bias
        return _bytes(rgb)


@dataclass(frozen=True)
class TinyDecoder:
    """Latents to RGB of the whole image's size, by a tiny autoencoder that was distilled from the real one."""

    autoencoder: Any

    @torch.inference_mode()
    def __call__(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        unscaled = (latents / self.autoencoder.config.scaling_factor).to(self.autoencoder.dtype)
        pixels = self.autoencoder.decode(unscaled, return_dict=False)[0][0].float()
        return _bytes((pixels / 2 + 0.5).permute(1, 2, 0).cpu().numpy())


def fit(encode: Callable[[torch.Tensor], torch.Tensor], shrink: int) -> LinearPreview:
    """The linear map that best gives a chart of colours back from what the autoencoder makes of it, by least squares.

    `encode` takes pixels (1, 3, height, width) in -1 to 1 to latents as the experts see them, `shrink` times smaller.
    There is no chance in it: the chart has every mixture of four levels of red, green and blue, in their order.
    """
    levels = torch.linspace(0, 1, _LEVELS)
    side = _LEVELS * 2
    patches = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, side, side)
    wanted = _enlarged(patches, _PATCH)
    latents = torch.nan_to_num(encode(_enlarged(wanted, shrink) * 2 - 1).float().cpu())
    known = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)
    solution = np.linalg.lstsq(_one_row_per_latent(known), _one_row_per_latent(wanted))[0].astype(np.float32)
    return LinearPreview(solution[:-1], solution[-1])


def load(folder: Path, channels: int, device: torch.device, dtype: torch.dtype) -> TinyDecoder:
    """A TAESD from its folder, which is whole. Raises MissingPart if it is not for latents of so many channels."""
    autoencoder = AutoencoderTiny.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    if autoencoder.config.latent_channels != channels:
        raise MissingPart(
            f"{folder} is for latents of {autoencoder.config.latent_channels} channels and the experts' have "
            f"{channels}; fetch the one that was made for them"
        )
    return TinyDecoder(autoencoder.to(device))


def _enlarged(picture: torch.Tensor, factor: int) -> torch.Tensor:
    return picture.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)


def _one_row_per_latent(picture: torch.Tensor) -> NDArray[np.float64]:
    return picture[0].flatten(1).T.double().numpy()


def _bytes(rgb: NDArray[np.float32]) -> NDArray[np.uint8]:
    """RGB of 0 to 1 in eight bits. What is not finite is black here: it is decoding that fails for it."""
    return (np.nan_to_num(rgb).clip(0, 1) * 255).round().astype(np.uint8)
