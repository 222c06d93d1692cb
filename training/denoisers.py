"""Train the two experts on cached latents: the base on the whole noise schedule, the refiner on its low-noise end.

Both predict the noise (Ho et al., 2020). The text encoders and the autoencoder are frozen, so scenes are encoded once,
and so is every caption.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training import architecture, scenes
from training.architecture import NARROW
from training.autoencoder import WORKING_DTYPE, encoded
from training.colours import Traits
from training.optimisation import Trainer, compiled
from training.scenes import Director, Scene

REFINER_TIMESTEPS = 200  # the low-noise share of 1000 that the refiner owns, as the published one does
_DROPPED = 0.1  # share of captions left out, for classifier-free guidance
_SQUARE_SHARE = 0.85  # of all steps; the other aspect ratios share the rest
_LATE = 0.1  # share of the base's training on the timesteps that the refiner will own


@dataclass(frozen=True)
class Captions:
    """Encoded captions: row 0 is the empty one. `hidden` (n, 77, 256) of both encoders, `pooled` (n, 160)."""

    hidden: torch.Tensor
    pooled: torch.Tensor


@dataclass(frozen=True)
class Bucket:
    """Scenes of one size. `table` lists rows, each as often as it is to be drawn."""

    latents: torch.Tensor  # (n, 4, height / 8, width / 8), fp16
    captions: torch.Tensor  # (n, 12), rows of Captions
    ids: torch.Tensor  # (n, 7): original size, crop, target size, aesthetic score
    table: torch.Tensor


@torch.inference_mode()
def prepared(
    director: Director,
    of: Traits,
    pictures: torch.Tensor,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
) -> tuple[dict[str, Bucket], Captions]:
    """All scenes of all aspect ratios, and all that is said of them, encoded. `pictures` are uint8 (n, 4, 256, 256)."""
    rows: dict[str, int] = {"": 0}
    made = {ratio: _bucket(director.scenes(ratio), rows, of, pictures, vae) for ratio in scenes.sizes()}
    return made, _encoded_captions(list(rows), tokenizer, *encoders, pictures.device)


def _bucket(
    some: Sequence[Scene], rows: dict[str, int], of: Traits, pictures: torch.Tensor, vae: AutoencoderKL
) -> Bucket:
    device = pictures.device
    most = max(len(scene.captions) for scene in some)
    captions = [[rows.setdefault(each, len(rows)) for each in scene.captions] for scene in some]
    share = torch.tensor([scene.share for scene in some])
    times = (share / share.median() * 8).round().clamp(min=1).long()
    return Bucket(
        torch.cat([encoded(vae, part).half() for part in scenes.rendered(some, pictures, of)]),
        torch.tensor([(most // len(each)) * each for each in captions], device=device),
        torch.tensor([scene.ids() for scene in some], device=device),
        torch.repeat_interleave(torch.arange(len(some)), times).to(device),
    )


def _encoded_captions(
    texts: list[str],
    tokenizer: CLIPTokenizer,
    narrow: CLIPTextModel,
    wide: CLIPTextModelWithProjection,
    device: torch.device,
) -> Captions:
    narrow, wide = narrow.to(device), wide.to(device)
    hidden, pooled = [], []
    for at in range(0, len(texts), 1024):
        # The published base pads for its second encoder with "!", token 0, and for the first with the end token.
        ids = tokenizer(texts[at : at + 1024], padding="max_length", truncation=True, return_tensors="pt")
        ended = ids["input_ids"] == tokenizer.eos_token_id
        other = torch.where(ended & (ended.cumsum(1) > 1), 0, ids["input_ids"])
        one = narrow(ids["input_ids"].to(device), output_hidden_states=True)
        two = wide(other.to(device), output_hidden_states=True)
        hidden.append(torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1).to(WORKING_DTYPE))
        pooled.append(two.text_embeds.to(WORKING_DTYPE))
    return Captions(torch.cat(hidden), torch.cat(pooled))


def base_trainer(
    unet: UNet2DConditionModel, captions: Captions, data: Mapping[str, Bucket], batch: int, fast: bool
) -> Trainer:
    """What trains a base on batches of so many scenes."""
    alphas = _alphas(captions.hidden.device)
    signal_to_noise = alphas / (1 - alphas)
    weights = signal_to_noise.clamp(max=5) / signal_to_noise  # min-SNR (Hang et al., 2023)

    def loss(network: torch.nn.Module, bucket: Bucket) -> torch.Tensor:
        rows = _draw(bucket, batch)
        hidden, pooled = _captions(captions, bucket, rows)
        kept = (torch.rand(batch, device=rows.device) >= _DROPPED).to(hidden.dtype)
        late = torch.rand(batch, device=rows.device) < _LATE
        begin = torch.where(late, 0, REFINER_TIMESTEPS)
        added = {"text_embeds": pooled * kept[:, None], "time_ids": bucket.ids[rows, :6].to(pooled.dtype)}
        return _loss(network, bucket.latents[rows], hidden * kept[:, None, None], added, alphas, weights, begin)

    return _trainer("base", unet, loss, data, 1e-3 * (batch / 256) ** 0.5, fast)


def refiner_trainer(
    unet: UNet2DConditionModel, captions: Captions, data: Mapping[str, Bucket], batch: int, fast: bool
) -> Trainer:
    """What trains a refiner. What it is told without a caption is the encoded empty one."""
    alphas = _alphas(captions.hidden.device)[:REFINER_TIMESTEPS]
    weights = torch.ones_like(alphas)

    def loss(network: torch.nn.Module, bucket: Bucket) -> torch.Tensor:
        rows = _draw(bucket, batch)
        hidden, pooled = _captions(captions, bucket, rows, _DROPPED)
        ids = torch.cat([bucket.ids[rows, :4], bucket.ids[rows, 6:]], dim=1)
        added = {"text_embeds": pooled, "time_ids": ids.to(pooled.dtype)}
        return _loss(network, bucket.latents[rows], hidden[..., NARROW:], added, alphas, weights)

    return _trainer("refiner", unet, loss, data, 1.5e-3 * (batch / 256) ** 0.5, fast)


def _trainer(  # type: ignore[no-untyped-def]
    name, unet, loss, data: Mapping[str, Bucket], learning_rate: float, fast: bool
) -> Trainer:
    # Squares alone are compiled: it takes longer than the other shapes' share of the steps.
    square = compiled(unet) if fast else unet
    losses = {
        ratio: lambda bucket=bucket, network=square if ratio == "1:1" else unet: loss(network, bucket)
        for ratio, bucket in data.items()
    }
    others = (1 - _SQUARE_SHARE) / max(1, len(data) - 1)
    shares = {ratio: _SQUARE_SHARE if ratio == "1:1" else others for ratio in data}
    return Trainer(name, unet, losses, shares, learning_rate)


def _loss(
    network: torch.nn.Module,
    latents: torch.Tensor,
    hidden: torch.Tensor,
    added: Mapping[str, torch.Tensor],
    alphas: torch.Tensor,
    weights: torch.Tensor,
    begin: torch.Tensor | int = 0,
) -> torch.Tensor:
    """Error of the predicted noise at uniform timesteps from `begin`, of shape (batch,), up to the last of `alphas`."""
    latents = latents.float()
    uniform = torch.rand(len(latents), device=latents.device)
    timesteps = (begin + uniform * (len(alphas) - begin)).long().clamp(max=len(alphas) - 1)
    alpha = alphas[timesteps][:, None, None, None]
    noise = torch.randn_like(latents)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    predicted = network(
        noisy.to(hidden.dtype), timesteps, encoder_hidden_states=hidden, added_cond_kwargs=added, return_dict=False
    )[0]
    each = F.mse_loss(predicted.float(), noise, reduction="none").mean((1, 2, 3))
    return (weights[timesteps] * each).mean()


def _draw(bucket: Bucket, batch: int) -> torch.Tensor:
    return bucket.table[torch.randint(len(bucket.table), (batch,), device=bucket.table.device)]


def _captions(
    captions: Captions, bucket: Bucket, rows: torch.Tensor, dropped: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    column = torch.randint(bucket.captions.shape[1], rows.shape, device=rows.device)
    said = bucket.captions[rows, column]
    if dropped:
        said = torch.where(torch.rand(said.shape, device=said.device) < dropped, 0, said)
    return captions.hidden[said], captions.pooled[said]


def _alphas(device: torch.device) -> torch.Tensor:
    return architecture.scheduler().alphas_cumprod.to(device)
