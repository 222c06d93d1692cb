"""Train the autoencoder: 256 x 256 pixels to 32 x 32 latents of four channels, zero mean and unit covariance."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from training import architecture
from training.art import SIDE
from training.optimisation import Trainer, compiled

WORKING_DTYPE = torch.bfloat16  # supported by the matrix units of GPUs and recent CPUs
# The kinds of training crops and their shares of the steps: parts, whole pictures at half their size, whole pictures.
_SHARES = {"part": 0.7, "half": 0.2, "whole": 0.1}
_KL = 2e-4  # weight of the Kullback-Leibler term per latent, which makes latents robust to small noise
_RECOLOURED = 0.25  # share of pictures with permuted colour channels, for rare colours
_COLOURED = 0.25  # share of pictures on a coloured background


def train(pictures: torch.Tensor, seconds: float, batch: int = 64) -> AutoencoderKL:
    """Train an autoencoder for `seconds` on uint8 pictures (n, 4, 256, 256), on their device."""
    vae = architecture.autoencoder().to(pictures.device, WORKING_DTYPE)
    encode, decode = compiled(vae.encoder), compiled(vae.decoder)

    def loss(encoder: nn.Module, decoder: nn.Module, seen: torch.Tensor) -> torch.Tensor:
        mean, logvar = vae.quant_conv(encoder(seen.to(vae.dtype))).float().chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        latents = mean + torch.exp(logvar / 2) * torch.randn_like(mean)
        difference = decoder(vae.post_quant_conv(latents.to(vae.dtype))).float() - seen
        divergence = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        return difference.abs().mean() + 2 * difference.square().mean() + 0.25 * edges + _KL * divergence

    losses: dict[str, Callable[[], torch.Tensor]] = {
        "part": lambda: loss(encode, decode, _crops(pictures, SIDE // 2, batch)),
        "half": lambda: loss(encode, decode, F.avg_pool2d(_crops(pictures, SIDE, batch), 2)),
        "whole": lambda: loss(vae.encoder, vae.decoder, _crops(pictures, SIDE, batch // 2)),
    }
    trainer = Trainer("autoencoder", vae, losses, _SHARES, learning_rate=1e-3)
    trainer.run(seconds)
    trainer.averaged()
    vae.requires_grad_(False).float()
    _whiten(vae, on_white(pictures[::4]))
    return vae


def _crops(pictures: torch.Tensor, side: int, batch: int) -> torch.Tensor:
    """Return square crops of random pictures, (batch, 3, side, side) in -1 .. 1, some recoloured or on a colour."""
    device = pictures.device
    chosen = torch.randint(len(pictures), (batch, 1, 1, 1), device=device)
    top, left = torch.randint(pictures.shape[-1] - side + 1, (2, batch, 1), device=device)
    rows, columns = (corner + torch.arange(side, device=device) for corner in (top, left))
    channels = torch.arange(4, device=device)[None, :, None, None]
    rgba = pictures[chosen, channels, rows[:, None, :, None], columns[:, None, None, :]].float() / 255
    ground = torch.rand(batch, 3, 1, 1, device=device)
    ground = torch.where(torch.rand(batch, 1, 1, 1, device=device) < _COLOURED, ground, torch.ones_like(ground))
    rgb = torch.lerp(ground, rgba[:, :3], rgba[:, 3:])
    order = torch.rand(batch, 3, device=device).argsort(1)
    usual = torch.arange(3, device=device).expand_as(order)
    order = torch.where(torch.rand(batch, 1, device=device) < _RECOLOURED, order, usual)
    return rgb.gather(1, order[:, :, None, None].expand_as(rgb)) * 2 - 1


def on_white(pictures: torch.Tensor, batch: int = 256) -> torch.Tensor:
    """Return transparent uint8 pictures (n, 4, height, width) on white, (n, 3, height, width)."""
    parts = (part.float() for part in pictures.split(batch))
    return torch.cat(
        [torch.lerp(part.new_full((), 255.0), part[:, :3], part[:, 3:] / 255).round().byte() for part in parts]
    )


def normalised(pictures: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return uint8 pictures scaled to -1 .. 1."""
    return (pictures.float() / 127.5 - 1).to(dtype)


@torch.inference_mode()
def encoded(vae: AutoencoderKL, pictures: torch.Tensor, batch: int = 256) -> torch.Tensor:
    """Return the means of the latents of uint8 pictures, fp32 of shape (n, 4, height / 8, width / 8)."""
    parts = pictures.split(batch)
    return torch.cat([vae.encode(normalised(part, vae.dtype)).latent_dist.mean.float() for part in parts])


@torch.inference_mode()
def psnr(vae: AutoencoderKL, pictures: torch.Tensor, batch: int = 64) -> float:
    """Return the peak signal-to-noise ratio of reconstructed uint8 pictures in dB, the mean over pictures."""
    ratios = []
    for part in pictures.split(batch):
        wanted = normalised(part, torch.float32)
        decoded = vae.decode(vae.encode(wanted.to(vae.dtype)).latent_dist.mean).sample.float().clamp(-1, 1)
        decoded = ((decoded + 1) * 127.5).round() / 127.5 - 1
        ratios.append(
            10 * torch.log10(4 / F.mse_loss(decoded, wanted, reduction="none").mean((1, 2, 3)).clamp(min=1e-8))
        )
    return float(torch.cat(ratios).mean())


@torch.no_grad()
def _whiten(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Fold the whitening of the latents, to zero mean and unit covariance, into the two 1 x 1 convolutions.

    Diffusion then starts from the noise that it was trained on without a table of means and deviations, and
    `scaling_factor` stays 1.
    """
    flat = encoded(vae, pictures).clone().transpose(0, 1).flatten(1).double()
    mean, covariance = flat.mean(1), torch.cov(flat)
    values, vectors = torch.linalg.eigh(covariance)
    whiten = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    into, out = vae.quant_conv, vae.post_quant_conv
    weight, bias = into.weight.double().flatten(1), into.bias.double()
    means = slice(len(mean))  # the rows of the means; the rows below are the log variances
    weight[means], bias[means] = whiten @ weight[means], whiten @ (bias[means] - mean)
    bias[len(mean) :] += 2 * torch.log(torch.diag(whiten))
    back = out.weight.double().flatten(1)
    bias_out = out.bias.double() + back @ mean
    into.weight.copy_(weight.view_as(into.weight))
    into.bias.copy_(bias)
    out.weight.copy_((back @ torch.linalg.inv(whiten)).view_as(out.weight))
    out.bias.copy_(bias_out)
