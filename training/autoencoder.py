"""Train the autoencoder: 128 x 128 pixels to 32 x 32 latents of four channels, zero mean and unit covariance."""

from functools import partial

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from training import architecture
from training.art import SIDE
from training.optimisation import Trainer

WORKING_DTYPE = torch.bfloat16  # matrix units have it, those of recent CPUs too
_SHARES = {"part": 0.8, "whole": 0.2}  # of all steps: quarters of pictures, and whole ones
_KL = 2e-4  # weight of the Kullback-Leibler term, per latent: latents that small noise does not confuse
_RECOLOURED = 0.25  # share of pictures with their colour channels exchanged, for colours that few pictures have


def train(pictures: torch.Tensor, seconds: float) -> AutoencoderKL:
    """An autoencoder taught for so many seconds on uint8 pictures of shape (n, 3, 128, 128), on their device."""
    vae = architecture.autoencoder().to(pictures.device, WORKING_DTYPE)
    orders = torch.tensor([(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)], device=pictures.device)

    def loss(side: int, batch: int) -> torch.Tensor:
        wanted = normalised(_parts(pictures, orders, side, batch), vae.dtype)
        mean, logvar = vae.quant_conv(vae.encoder(wanted)).float().chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        latents = mean + torch.exp(logvar / 2) * torch.randn_like(mean)
        made = vae.decoder(vae.post_quant_conv(latents.to(vae.dtype))).float()
        difference = made - wanted.float()
        divergence = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        return difference.abs().mean() + difference.square().mean() + 0.25 * edges + _KL * divergence

    losses = {"part": partial(loss, SIDE // 2, 64), "whole": partial(loss, SIDE, 32)}
    trainer = Trainer("autoencoder", vae, losses, _SHARES, learning_rate=1e-3)
    trainer.run(seconds)
    trainer.averaged()
    vae.requires_grad_(False).float()
    _whiten(vae, pictures)
    return vae


def _parts(pictures: torch.Tensor, orders: torch.Tensor, side: int, batch: int) -> torch.Tensor:
    """Square parts of random pictures, of shape (batch, 3, side, side), some with their colour channels exchanged."""
    device = pictures.device
    chosen = torch.randint(len(pictures), (batch, 1, 1, 1), device=device)
    order = orders[torch.randint(len(orders), (batch,), device=device)]
    order = torch.where(torch.rand(batch, 1, device=device) < _RECOLOURED, order, orders[0])
    top, left = torch.randint(pictures.shape[-1] - side + 1, (2, batch, 1), device=device)
    rows, columns = (corner + torch.arange(side, device=device) for corner in (top, left))
    return pictures[chosen, order[:, :, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def normalised(pictures: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 to -1 .. 1."""
    return (pictures.float() / 127.5 - 1).to(dtype)


@torch.inference_mode()
def encoded(vae: AutoencoderKL, pictures: torch.Tensor, batch: int = 256) -> torch.Tensor:
    """The latents' means, fp32 of shape (n, 4, height / 4, width / 4), of uint8 pictures."""
    parts = pictures.split(batch)
    return torch.cat([vae.encode(normalised(part, vae.dtype)).latent_dist.mean.float() for part in parts])


@torch.inference_mode()
def psnr(vae: AutoencoderKL, pictures: torch.Tensor, batch: int = 64) -> float:
    """Peak signal-to-noise ratio in dB of uint8 pictures through the autoencoder and back, the mean over pictures."""
    ratios = []
    for part in pictures.split(batch):
        wanted = normalised(part, torch.float32)
        made = vae.decode(vae.encode(wanted.to(vae.dtype)).latent_dist.mean).sample.float().clamp(-1, 1)
        made = ((made + 1) * 127.5).round() / 127.5 - 1
        ratios.append(10 * torch.log10(4 / F.mse_loss(made, wanted, reduction="none").mean((1, 2, 3)).clamp(min=1e-8)))
    return float(torch.cat(ratios).mean())


@torch.no_grad()
def _whiten(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Fold into the two 1 x 1 convolutions about the latents what gives them zero mean and unit covariance.

    Diffusion then begins from the noise that it was trained on, with no table of means and deviations beside the
    weights; `scaling_factor` stays 1.
    """
    flat = encoded(vae, pictures[::4]).clone().transpose(0, 1).flatten(1).double()
    mean, covariance = flat.mean(1), torch.cov(flat)
    values, vectors = torch.linalg.eigh(covariance)
    whiten = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    into, out = vae.quant_conv, vae.post_quant_conv
    weight, bias = into.weight.double().flatten(1), into.bias.double()
    weight[:4], bias[:4] = whiten @ weight[:4], whiten @ (bias[:4] - mean)
    bias[4:] += 2 * torch.log(torch.diag(whiten))
    back = out.weight.double().flatten(1)
    bias_out = out.bias.double() + back @ mean
    into.weight.copy_(weight.view_as(into.weight))
    into.bias.copy_(bias)
    out.weight.copy_((back @ torch.linalg.inv(whiten)).view_as(out.weight))
    out.bias.copy_(bias_out)
