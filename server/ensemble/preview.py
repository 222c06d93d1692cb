"""Draw a small picture of unfinished latents, cheaply enough to do it during the steps.

A latent is close to one pixel in other colours. A linear map, fitted to the loaded autoencoder, turns it into red,
green and blue. A TAESD, if one is given, draws the image at full size.
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

_LEVELS = 4  # of red, green and blue each: 64 colours, in a chart of 8 x 8 patches
_PATCH = 4  # latents per side of a patch: the encoder sees that far


@dataclass(frozen=True)
class LinearPreview:
    """Map latents of shape (1, channels, height, width) to RGB of (height, width, 3).

    `colours` has shape (channels, 3), `bias` (3,); RGB is 0 to 1. Plain numpy loops compute it: a matrix library, or
    torch on a second thread, would start threads that compete with the networks' on a CPU.
    """

    colours: NDArray[np.float32]
    bias: NDArray[np.float32]

    def __call__(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        rgb = np.einsum("chw,cr->hwr", latents[0].float().cpu().numpy(), self.colours) + self.bias
        return _bytes(rgb)


@dataclass(frozen=True)
class TinyDecoder:
    """Decode latents to RGB of the image's size by a tiny autoencoder that was distilled from the real one."""

    autoencoder: Any

    @torch.inference_mode()
    def __call__(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        unscaled = (latents / self.autoencoder.config.scaling_factor).to(self.autoencoder.dtype)
        pixels = self.autoencoder.decode(unscaled, return_dict=False)[0][0].float()
        return _bytes((pixels / 2 + 0.5).permute(1, 2, 0).cpu().numpy())


def fit(encode: Callable[[torch.Tensor], torch.Tensor], shrink: int) -> LinearPreview:
    """Fit the linear map from the latents of a colour chart to its colours, by least squares.

    `encode` maps pixels (1, 3, height, width), -1 to 1, to latents of the experts' scale, `shrink` times smaller. The
    chart has every mixture of four levels of red, green and blue in a fixed order, so the map is deterministic.
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
    """Load a TAESD from a checked folder. Raises MissingPart if its latents have another number of channels."""
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
    """Convert RGB of 0 to 1 to eight bits. A value that is not finite becomes black; decoding reports it."""
    return (np.nan_to_num(rgb).clip(0, 1) * 255).round().astype(np.uint8)
