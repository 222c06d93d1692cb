"""Decode latents to pixels with SDXL's autoencoder, and encode pixels to latents."""

import copy
from typing import Any

import torch


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode unscaled latents, (1, channels, height, width), to pixels of (1, 3, 8 * height, 8 * width), -1 to 1."""
    pixels: torch.Tensor = vae.decode(latents, return_dict=False)[0]
    return pixels


@torch.no_grad()
def encode(vae: Any, device: torch.device, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pixels of (1, 3, height, width), -1 to 1, to latents in fp32 of the experts' scale."""
    mean, deviation = _statistics(vae, device)
    in_fp32 = copy.deepcopy(vae).to(device, torch.float32)
    distribution = in_fp32.encode(pixels.to(device, torch.float32), return_dict=False)[0]
    latents: torch.Tensor = (distribution.mode() - mean) / deviation * vae.config.scaling_factor
    return latents


def unscale(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Map latents of the experts' scale to the autoencoder's."""
    mean, deviation = _statistics(vae, latents.device)
    unscaled: torch.Tensor = latents / vae.config.scaling_factor * deviation + mean
    return unscaled


def _statistics(vae: Any, device: torch.device) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """Return mean and standard deviation of the latents, per channel if the autoencoder was published with them."""
    if getattr(vae.config, "latents_mean", None) is None or getattr(vae.config, "latents_std", None) is None:
        return 0.0, 1.0
    mean, deviation = (
        torch.tensor(values, device=device).view(1, -1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, deviation
