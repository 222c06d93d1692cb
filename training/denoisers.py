"""Train the two experts on cached latents: the base on the whole noise schedule, the refiner on its low-noise end.

Both predict the noise (Ho et al., 2020). The autoencoder is frozen, so scenes are encoded once. The text encoders train
with the base and stay close to their earlier sentence embeddings. The refiner takes them from the base, frozen.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training import architecture, scenes
from training.autoencoder import WORKING_DTYPE, encoded
from training.colours import Traits
from training.optimisation import Trainer, compiled
from training.scenes import Director, Scene
from training.vocabulary import CONTEXT

REFINER_TIMESTEPS = 200  # the refiner's timesteps of 1000, as in the published one
_DROPPED = 0.1  # share of dropped captions, for classifier-free guidance
_SQUARE_SHARE = 0.85  # of all steps; the other aspect ratios have the rest
_LATE = 0.1  # share of the base's training on the refiner's timesteps
_HELD = 0.1  # weight of the distance between a sentence's embedding and its target


class Encoders(nn.Module):
    """Both text encoders, read as the published base reads them."""

    def __init__(self, narrow: CLIPTextModel, wide: CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.narrow, self.wide = narrow, wide

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states (n, 77, 256) of both encoders and the pooled output (n, 160) of ids (n, 77)."""
        hidden, pooled = self.read(ids)
        return torch.cat([_read(self.narrow, ids)[0], hidden], dim=-1), pooled

    def read(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the refiner's input: hidden states (n, 77, 160) and pooled output of the second encoder."""
        # The published base pads for its second encoder with "!", token 0, and for the first with the end token.
        ended = ids == self.wide.config.eos_token_id
        hidden, pooled = _read(self.wide.text_model, torch.where(ended & (ended.cumsum(1) > 1), 0, ids))
        return hidden, self.wide.text_projection(pooled)

    def meanings(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the pooled outputs of both encoders, (n, 96) and (n, 160), of ids (n, any length)."""
        return _read(self.narrow, ids)[1], self.wide.text_projection(_read(self.wide.text_model, ids)[1])


def _read(encoder: CLIPTextModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the penultimate hidden states and the pooled output, as CLIP's forward, which does not compile."""
    hidden = encoder.embeddings(input_ids=ids)
    for layer in encoder.encoder.layers:
        before, hidden = hidden, layer(hidden, None, is_causal=True)
    end = (ids == encoder.config.eos_token_id).int().argmax(-1)
    return before, encoder.final_layer_norm(hidden)[torch.arange(len(ids), device=ids.device), end]


class Base(nn.Module):
    """The base U-Net and the text encoders, which train together."""

    def __init__(self, unet: UNet2DConditionModel, encoders: Encoders) -> None:
        super().__init__()
        self.unet, self.encoders = unet, encoders

    def forward(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        captions: torch.Tensor,
        kept: torch.Tensor,
        ids: torch.Tensor,
    ) -> torch.Tensor:
        """Return the predicted noise. The embeddings of captions, (n, 77), whose `kept` is 0 are zeroed."""
        hidden, pooled = self.encoders(captions)
        added = {"text_embeds": pooled * kept[:, None], "time_ids": ids}
        return _predicted(self.unet, noisy, timesteps, hidden * kept[:, None, None], added)


@dataclass(frozen=True)
class Bucket:
    """Scenes of one size. `table` lists rows, each as often as its sampling weight."""

    latents: torch.Tensor  # (n, 4, height / 8, width / 8), fp16
    captions: torch.Tensor  # (n, 12), rows of the captions' token ids
    ids: torch.Tensor  # (n, 7): original size, crop, target size, aesthetic score
    table: torch.Tensor


@torch.inference_mode()
def prepared(
    director: Director, of: Traits, pictures: torch.Tensor, vae: AutoencoderKL, tokenizer: CLIPTokenizer
) -> tuple[dict[str, Bucket], torch.Tensor]:
    """Return all encoded scenes by aspect ratio, and the token ids of all captions, (n, 77), "" first.

    `pictures` are uint8 (n, 4, 256, 256).
    """
    rows: dict[str, int] = {"": 0}
    buckets = {ratio: _bucket(director.scenes(ratio), rows, of, pictures, vae) for ratio in scenes.sizes()}
    return buckets, tokens(tokenizer, list(rows)).to(pictures.device)


def tokens(tokenizer: CLIPTokenizer, texts: list[str], length: int = CONTEXT) -> torch.Tensor:
    """Return the token ids of texts, (n, length)."""
    ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return ids["input_ids"]


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


def base_trainer(
    unet: UNet2DConditionModel,
    encoders: Encoders,
    texts: torch.Tensor,
    targets: torch.Tensor,
    captions: torch.Tensor,
    data: Mapping[str, Bucket],
    batch: int,
    fast: bool,
) -> Trainer:
    """Return the trainer of a base and the text encoders, on batches of `batch` scenes.

    `texts` and `targets` are token ids, (n, any length). The embedding of each text is held near the present embedding
    of its target: the text itself, or the same text with a concept's name in place of another word for it.
    """
    alphas = _alphas(captions.device)
    signal_to_noise = alphas / (1 - alphas)
    weights = signal_to_noise.clamp(max=5) / signal_to_noise  # min-SNR (Hang et al., 2023)
    before = copy.deepcopy(encoders).requires_grad_(False)

    def loss(network: nn.Module, bucket: Bucket) -> torch.Tensor:
        rows = _draw(bucket, batch)
        kept = (torch.rand(batch, device=rows.device) >= _DROPPED).to(WORKING_DTYPE)
        late = torch.rand(batch, device=rows.device) < _LATE
        timesteps = _uniform(torch.where(late, 0, REFINER_TIMESTEPS), len(alphas), batch)
        noise, noisy = _noised(bucket.latents[rows], alphas[timesteps])
        predicted = network(
            noisy, timesteps, captions[_caption(bucket, rows)], kept, bucket.ids[rows, :6].to(WORKING_DTYPE)
        )
        some = torch.randint(len(texts), (batch,), device=texts.device)
        moved = sum(
            (1 - F.cosine_similarity(now.float(), then.float())).mean()
            for now, then in zip(encoders.meanings(texts[some]), before.meanings(targets[some]), strict=True)
        )
        return _error(predicted, noise, weights[timesteps]) + _HELD * moved

    return _trainer("base", Base(unet, encoders), loss, data, 7e-4, fast)


def refiner_trainer(
    unet: UNet2DConditionModel,
    encoders: Encoders,
    captions: torch.Tensor,
    data: Mapping[str, Bucket],
    batch: int,
    fast: bool,
) -> Trainer:
    """Return the trainer of a refiner. A dropped caption is the encoded empty one."""
    alphas = _alphas(captions.device)[:REFINER_TIMESTEPS]
    encoders = encoders.requires_grad_(False)

    def loss(network: nn.Module, bucket: Bucket) -> torch.Tensor:
        rows = _draw(bucket, batch)
        dropped = torch.rand(batch, device=rows.device) < _DROPPED
        hidden, pooled = encoders.read(captions[torch.where(dropped, 0, _caption(bucket, rows))])
        ids = torch.cat([bucket.ids[rows, :4], bucket.ids[rows, 6:]], dim=1)
        timesteps = _uniform(torch.zeros_like(rows), len(alphas), batch)
        noise, noisy = _noised(bucket.latents[rows], alphas[timesteps])
        added = {"text_embeds": pooled, "time_ids": ids.to(pooled.dtype)}
        return _error(_predicted(network, noisy, timesteps, hidden, added), noise)

    return _trainer("refiner", unet, loss, data, 1e-3, fast)


def _trainer(  # type: ignore[no-untyped-def]
    name, network: nn.Module, loss, data: Mapping[str, Bucket], learning_rate: float, fast: bool
) -> Trainer:
    # Only squares are compiled: compiling another shape takes longer than its share of the steps.
    square = compiled(network) if fast else network
    losses = {
        ratio: lambda bucket=bucket, its=square if ratio == "1:1" else network: loss(its, bucket)
        for ratio, bucket in data.items()
    }
    others = (1 - _SQUARE_SHARE) / max(1, len(data) - 1)
    shares = {ratio: _SQUARE_SHARE if ratio == "1:1" else others for ratio in data}
    return Trainer(name, network, losses, shares, learning_rate)


def _predicted(
    unet: nn.Module,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    hidden: torch.Tensor,
    added: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    predicted: torch.Tensor = unet(
        noisy, timesteps, encoder_hidden_states=hidden, added_cond_kwargs=added, return_dict=False
    )[0]
    return predicted


def _uniform(begin: torch.Tensor, end: int, batch: int) -> torch.Tensor:
    """Return timesteps, (batch,), uniform in begin .. end - 1."""
    return (begin + torch.rand(batch, device=begin.device) * (end - begin)).long().clamp(max=end - 1)


def _noised(latents: torch.Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return fp32 noise, and latents noised to the cumulative alphas `alpha`, (n,)."""
    latents, alpha = latents.float(), alpha[:, None, None, None]
    noise = torch.randn_like(latents)
    return noise, (alpha.sqrt() * latents + (1 - alpha).sqrt() * noise).to(WORKING_DTYPE)


def _error(predicted: torch.Tensor, noise: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    each = F.mse_loss(predicted.float(), noise, reduction="none").mean((1, 2, 3))
    return each.mean() if weights is None else (weights * each).mean()


def _draw(bucket: Bucket, batch: int) -> torch.Tensor:
    return bucket.table[torch.randint(len(bucket.table), (batch,), device=bucket.table.device)]


def _caption(bucket: Bucket, rows: torch.Tensor) -> torch.Tensor:
    """Return a random caption of each scene, as a row of the captions."""
    column = torch.randint(bucket.captions.shape[1], rows.shape, device=rows.device)
    return bucket.captions[rows, column]


def _alphas(device: torch.device) -> torch.Tensor:
    return architecture.scheduler().alphas_cumprod.to(device)
