"""Train the two experts on cached latents: the base on the whole noise schedule, the refiner on its low-noise end.

Both predict the noise (Ho et al., 2020). The text encoders and the autoencoder are frozen, so pictures are encoded
once, and so is every caption. Micro-conditioning is SDXL's (Podell et al., 2023): what is enlarged from few pixels says
so in its original size, what is cut off in its crop, and the refiner hears a low aesthetic score for what is blurred.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training import architecture
from training.architecture import NARROW
from training.art import SIDE, Art
from training.autoencoder import WORKING_DTYPE, encoded
from training.captions import Captioner
from training.optimisation import Trainer

REFINER_TIMESTEPS = 200  # the low-noise share of 1000 that the refiner owns, as the published one does
SHARP, BLURRED = 6.0, 2.5  # aesthetic scores: those that pipelines give for the prompt and the negative prompt
_DROPPED = 0.1  # share of captions left out, for classifier-free guidance
_CAPTIONS = 12  # per picture
_SQUARE_SHARE = 0.8  # of all steps; the other aspect ratios share the rest
_LATE = 0.1  # share of the base's training on the timesteps that the refiner will own
# How often a picture is drawn: the art has very many people, and plain drawings are what a small network draws best.
_GROUPS = {"people-body": 0.15}
_STYLES = {"fluent-emoji": 0.25, "noto-v1": 0.35}

# SDXL's buckets for these aspect ratios, at an eighth: height, width in pixels.
SIZES = {
    "1:1": (128, 128), "16:9": (96, 168), "9:16": (168, 96), "3:2": (96, 144), "2:3": (144, 96),
    "5:4": (112, 144), "4:5": (144, 112), "21:9": (84, 200), "9:21": (200, 84),
}  # fmt: skip


@dataclass(frozen=True)
class Captions:
    """Encoded captions: row 0 is the empty one. `hidden` (n, 77, 256) of both encoders, `pooled` (n, 160)."""

    hidden: torch.Tensor
    pooled: torch.Tensor
    of_picture: torch.Tensor  # (pictures, 12), rows of the above


@dataclass(frozen=True)
class Bucket:
    """Pictures of one size. `table` lists rows, each as often as it is to be drawn."""

    latents: torch.Tensor  # (n, 4, height / 4, width / 4), fp16
    picture: torch.Tensor  # (n,)
    base_ids: torch.Tensor  # (n, 6): original size, crop, target size
    refiner_ids: torch.Tensor  # (n, 5): original size, crop, aesthetic score
    table: torch.Tensor


@torch.inference_mode()
def encode_captions(
    art: Art,
    tokenizer: CLIPTokenizer,
    narrow: CLIPTextModel,
    wide: CLIPTextModelWithProjection,
    device: torch.device,
    seed: int = 0,
) -> Captions:
    captioner = Captioner(art, seed)
    rows: dict[str, int] = {"": 0}
    of_picture = [
        [rows.setdefault(captioner.caption(each.concept, each.style), len(rows)) for _ in range(_CAPTIONS)]
        for each in art.pictures
    ]
    narrow, wide = narrow.to(device), wide.to(device)
    hidden, pooled = [], []
    texts = list(rows)
    for at in range(0, len(texts), 1024):
        # The published base pads for its second encoder with "!", token 0, and for the first with the end token.
        ids = tokenizer(texts[at : at + 1024], padding="max_length", truncation=True, return_tensors="pt")
        ended = ids["input_ids"] == tokenizer.eos_token_id
        other = torch.where(ended & (ended.cumsum(1) > 1), 0, ids["input_ids"])
        one = narrow(ids["input_ids"].to(device), output_hidden_states=True)
        two = wide(other.to(device), output_hidden_states=True)
        hidden.append(torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1).to(WORKING_DTYPE))
        pooled.append(two.text_embeds.to(WORKING_DTYPE))
    return Captions(torch.cat(hidden), torch.cat(pooled), torch.tensor(of_picture, device=device))


@torch.inference_mode()
def buckets(
    art: Art, vae: AutoencoderKL, pictures: torch.Tensor, kept: torch.Tensor, plain: bool = False
) -> dict[str, Bucket]:
    """The latents of all sizes. `pictures` are uint8 (n, 3, 128, 128), `kept` the rows to train on.

    `plain` leaves out the other aspect ratios and the parts of larger pictures, for little time.
    """
    groups = [_GROUPS.get(each.group, 1.0) for each in art.concepts]
    weight = torch.tensor([groups[each.concept] * _STYLES.get(each.style, 1.0) for each in art.pictures])
    made = {}
    generator = torch.Generator().manual_seed(0)
    for name, (height, width) in list(SIZES.items())[:1] if plain else SIZES.items():
        if name == "1:1":
            chosen = kept
            images, ids, scores, factors = [pictures[chosen]], [_ids(len(chosen))], [SHARP], [1.0]
            for side in (72,) if plain else (48, 72):  # enlarged from few pixels
                images.append(_resized(_resized(pictures[chosen], side), SIDE))
                ids.append(_ids(len(chosen), original=(side, side)))
                scores.append(BLURRED)
                factors.append(0.12)
            for side in () if plain else (160, 192):  # parts of a larger picture
                top, left = (int(torch.randint(side - SIDE + 1, (), generator=generator)) for _ in range(2))
                images.append(_resized(pictures[chosen], side)[:, :, top : top + SIDE, left : left + SIDE])
                ids.append(_ids(len(chosen), original=(side, side), crop=(top, left)))
                scores.append(SHARP)
                factors.append(0.12)
        else:
            chosen = kept[torch.randperm(len(kept), generator=generator)[: len(kept) // 3]]
            images = [_on_canvas(pictures[chosen], height, width)]
            ids = [_ids(len(chosen), original=(height, width), target=(height, width))]
            scores, factors = [SHARP], [1.0]
        picture = chosen.repeat(len(images))
        draws = torch.cat([weight[chosen.cpu()] * factor for factor in factors])
        table = torch.repeat_interleave(torch.arange(len(draws)), (draws * 25).round().long())
        base_ids = torch.cat(ids)
        score = torch.tensor(scores).repeat_interleave(len(chosen))[:, None]
        made[name] = Bucket(
            torch.cat([encoded(vae, part) for part in images]).half(),
            picture,
            base_ids.to(pictures.device),
            torch.cat([base_ids[:, :4], score], dim=1).to(pictures.device),
            table.to(pictures.device),
        )
    return made


def base_trainer(unet: UNet2DConditionModel, captions: Captions, data: Mapping[str, Bucket], batch: int) -> Trainer:
    """What trains a base on batches of so many pictures."""
    alphas = _alphas(captions.hidden.device)
    signal_to_noise = alphas / (1 - alphas)
    weights = signal_to_noise.clamp(max=5) / signal_to_noise  # min-SNR (Hang et al., 2023)

    def loss(bucket: Bucket) -> torch.Tensor:
        rows = _draw(bucket, batch)
        hidden, pooled = _captions(captions, bucket.picture[rows])
        kept = (torch.rand(batch, device=rows.device) >= _DROPPED).to(hidden.dtype)
        late = torch.rand(batch, device=rows.device) < _LATE
        begin = torch.where(late, 0, REFINER_TIMESTEPS)
        added = {"text_embeds": pooled * kept[:, None], "time_ids": bucket.base_ids[rows].to(pooled.dtype)}
        return _loss(unet, bucket.latents[rows], hidden * kept[:, None, None], added, alphas, weights, begin)

    return _trainer("base", unet, loss, data, 1e-3 * (batch / 256) ** 0.5)


def refiner_trainer(unet: UNet2DConditionModel, captions: Captions, data: Mapping[str, Bucket], batch: int) -> Trainer:
    """What trains a refiner. What it is told without a caption is the encoded empty one."""
    alphas = _alphas(captions.hidden.device)[:REFINER_TIMESTEPS]

    def loss(bucket: Bucket) -> torch.Tensor:
        rows = _draw(bucket, batch)
        hidden, pooled = _captions(captions, bucket.picture[rows], _DROPPED)
        added = {"text_embeds": pooled, "time_ids": bucket.refiner_ids[rows].to(pooled.dtype)}
        return _loss(unet, bucket.latents[rows], hidden[..., NARROW:], added, alphas, torch.ones_like(alphas))

    return _trainer("refiner", unet, loss, data, 1.5e-3 * (batch / 256) ** 0.5)


def _trainer(name, unet, loss, data: Mapping[str, Bucket], learning_rate: float) -> Trainer:  # type: ignore[no-untyped-def]
    losses = {size: lambda bucket=bucket: loss(bucket) for size, bucket in data.items()}
    others = (1 - _SQUARE_SHARE) / max(1, len(data) - 1)
    shares = {size: _SQUARE_SHARE if size == "1:1" else others for size in data}
    return Trainer(name, unet, losses, shares, learning_rate)


def _loss(
    unet: UNet2DConditionModel,
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
    predicted = unet(
        noisy.to(hidden.dtype), timesteps, encoder_hidden_states=hidden, added_cond_kwargs=added, return_dict=False
    )[0]
    each = F.mse_loss(predicted.float(), noise, reduction="none").mean((1, 2, 3))
    return (weights[timesteps] * each).mean()


def _draw(bucket: Bucket, batch: int) -> torch.Tensor:
    return bucket.table[torch.randint(len(bucket.table), (batch,), device=bucket.table.device)]


def _captions(captions: Captions, pictures: torch.Tensor, dropped: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    column = torch.randint(_CAPTIONS, pictures.shape, device=pictures.device)
    rows = captions.of_picture[pictures, column]
    if dropped:
        rows = torch.where(torch.rand(rows.shape, device=rows.device) < dropped, 0, rows)
    return captions.hidden[rows], captions.pooled[rows]


def _alphas(device: torch.device) -> torch.Tensor:
    return architecture.scheduler().alphas_cumprod.to(device)


def _ids(
    count: int,
    original: tuple[int, int] = (SIDE, SIDE),
    crop: tuple[int, int] = (0, 0),
    target: tuple[int, int] = (SIDE, SIDE),
) -> torch.Tensor:
    return torch.tensor([*original, *crop, *target], dtype=torch.float32).expand(count, 6)


def _resized(pictures: torch.Tensor, side: int, batch: int = 512) -> torch.Tensor:
    return torch.cat([
        F.interpolate(part.float(), (side, side), mode="bicubic", antialias=True).round().clamp(0, 255).byte()
        for part in pictures.split(batch)
    ])  # fmt: skip


def _on_canvas(pictures: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The pictures, as large as fits, in the middle of a white canvas."""
    side = min(height, width)
    canvas = pictures.new_full((len(pictures), 3, height, width), 255)
    top, left = math.floor((height - side) / 2), math.floor((width - side) / 2)
    canvas[:, :, top : top + side, left : left + side] = _resized(pictures, side)
    return canvas
