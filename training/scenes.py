"""Compose training scenes: whole pictures, painted ones, pairs, backgrounds, small, cropped and blurred pictures.

The micro-conditioning is SDXL's (Podell et al., 2023). A picture enlarged from few pixels has its original size, a
cropped one its crop, and the refiner gets a low aesthetic score for a blurred one.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from server.domain import ASPECT_RATIOS, size_of
from training import colours
from training.architecture import SHRINK
from training.art import OUTLINE, SIDE, Art
from training.captions import Captioner, Named
from training.colours import PAINTS, Traits

SHARP, BLURRED = 6.0, 2.5  # aesthetic scores: the pipelines' defaults for prompt and negative prompt
# Sampling weights of pictures: the art has very many people, and a small network draws plain styles best.
_GROUPS = {"people-body": 0.2}
_STYLES = {"fluent-emoji": 0.8, "noto-v1": 0.7, OUTLINE: 0.35}
_CAPTIONS = 12  # of a whole picture; the other scenes have two
# Square scenes in addition to whole pictures: their number, and their share of the samples.
_SQUARE = {
    "moved": (3000, 0.05),
    "painted": (10_000, 0.15),
    "pair": (24_000, 0.28),
    "background": (2000, 0.04),
    "small": (1000, 0.02),
    "blurred": (1500, 0.03),
    "cut": (2000, 0.03),
}
_OTHER = {"moved": (700, 0.45), "pair": (900, 0.45), "painted": (200, 0.1)}  # and scenes of each other aspect ratio


@dataclass(frozen=True)
class Thing:
    """A picture in a scene, with its centre and its side in pixels."""

    picture: int
    x: float
    y: float
    side: float
    paint: str = ""
    mirrored: bool = False


@dataclass(frozen=True)
class Scene:
    """A scene with its captions and its sampling weight."""

    size: tuple[int, int]  # height, width in pixels
    things: tuple[Thing, ...]
    captions: tuple[str, ...]
    share: float
    background: str = "white"
    pixels: int = 0  # smaller side from which a blurred scene was enlarged, 0 for a sharp one
    crop: tuple[int, int, int] | None = None  # of a cropped scene: the side of the whole, top and left

    def ids(self) -> tuple[float, ...]:
        """Return original size, crop, target size and aesthetic score: the conditioning of both experts."""
        original = self.size if not self.pixels else (self.pixels, self.pixels * self.size[1] // self.size[0])
        whole, top, left = self.crop or (0, 0, 0)
        score = BLURRED if self.pixels else SHARP
        return (*((whole, whole) if self.crop else original), top, left, *self.size, score)


def sizes() -> dict[str, tuple[int, int]]:
    """Return height and width by aspect ratio."""
    return {ratio: size_of(ratio, SIDE, SHRINK)[::-1] for ratio in ASPECT_RATIOS}


class Director:
    """Compose scenes from the pictures in `kept`, with captions by `captioner`."""

    def __init__(self, art: Art, captioner: Captioner, of: Traits, kept: Sequence[int], seed: int) -> None:
        self._art, self._kept, self._random = art, list(kept), random.Random(seed)
        self._captioner = captioner
        share = of.share.tolist()
        groups = [concept.group for concept in art.concepts]
        weight = [_GROUPS.get(groups[each.concept], 1.0) * _STYLES.get(each.style, 1.0) for each in art.pictures]
        self._weights = [weight[at] for at in self._kept]
        people = {at for at in self._kept if groups[art.pictures[at].concept] == "people-body"}
        outlines = {at for at in self._kept if art.pictures[at].style == OUTLINE}
        nameless = people | outlines
        self._colours = ["" if at in nameless else name for at, name in enumerate(of.names())]
        self._paintable = [at for at in self._kept if share[at] > 0.3 and at not in people]
        self._paintable_weights = [weight[at] for at in self._paintable]
        self._can_be_painted = set(self._paintable)
        self._of_style: dict[str, list[int]] = {}
        for at in self._kept:
            self._of_style.setdefault(art.pictures[at].style, []).append(at)
        self._style_weights = {name: [weight[at] for at in rows] for name, rows in self._of_style.items()}

    def scenes(self, ratio: str) -> list[Scene]:
        """Return all scenes of an aspect ratio."""
        size = sizes()[ratio]
        made = []
        left = 1.0
        for kind, (count, share) in (_SQUARE if ratio == "1:1" else _OTHER).items():
            make = getattr(self, f"_{kind}")
            made += [make(size, share / count) for _ in range(count)]
            left -= share
        if ratio == "1:1":
            each = left / sum(self._weights)
            made += [self._whole(size, at, each * weight) for at, weight in zip(self._kept, self._weights, strict=True)]
        return made

    def _whole(self, size: tuple[int, int], at: int, share: float) -> Scene:
        captions = (self._caption(at) for _ in range(_CAPTIONS))
        return Scene(size, (_middle(size, at),), tuple(captions), share)

    def _moved(self, size: tuple[int, int], share: float) -> Scene:
        at = self._any()
        thing = self._placed(size, at, self._random.uniform(0.8, 1.0))
        return Scene(size, (thing,), self._twice(lambda: self._caption(at)), share)

    def _painted(self, size: tuple[int, int], share: float) -> Scene:
        at = self._random.choices(self._paintable, self._paintable_weights)[0]
        thing = self._placed(size, at, self._random.uniform(0.85, 1.0), self._paint(at))
        named, style = self._named(thing), self._art.pictures[at].style
        return Scene(size, (thing,), self._twice(lambda: self._captioner.painted(named, style)), share)

    def _pair(self, size: tuple[int, int], share: float) -> Scene:
        choose = self._random
        style = self._art.pictures[self._any()].style
        rows, weights = self._of_style[style], self._style_weights[style]
        height, width = size
        across = width >= height
        side = min(size) if max(size) >= 2 * min(size) else max(size) / 2
        things = []
        for number, at in enumerate(choose.choices(rows, weights, k=2)):
            along, free = (0.25 + 0.5 * number) * max(size), min(size) - side
            other = min(size) / 2 + choose.uniform(-0.4, 0.4) * free
            x, y = (along, other) if across else (other, along)
            paint = self._paint(at) if at in self._can_be_painted and choose.random() < 0.4 else ""
            things.append(Thing(at, x, y, side * choose.uniform(0.9, 1.02), paint, choose.random() < 0.5))
        one, other_one = (self._named(thing) for thing in things)
        return Scene(size, tuple(things), self._twice(lambda: self._captioner.pair(one, other_one, style)), share)

    def _background(self, size: tuple[int, int], share: float) -> Scene:
        at, colour = self._any(), self._random.choice([name for name in PAINTS if name != "white"])
        thing = self._placed(size, at, self._random.uniform(0.75, 0.95))
        named, style = self._named(thing), self._art.pictures[at].style
        captions = self._twice(lambda: self._captioner.on_background(named, style, colour))
        return Scene(size, (thing,), captions, share, background=colour)

    def _small(self, size: tuple[int, int], share: float) -> Scene:
        at = self._any()
        thing = self._placed(size, at, self._random.uniform(0.35, 0.55))
        named, style = self._named(thing), self._art.pictures[at].style
        return Scene(size, (thing,), self._twice(lambda: self._captioner.small(named, style)), share)

    def _blurred(self, size: tuple[int, int], share: float) -> Scene:
        at = self._any()
        pixels = self._random.choice((SIDE * 3 // 8, SIDE * 9 // 16))
        return Scene(size, (_middle(size, at),), self._twice(lambda: self._caption(at)), share, pixels=pixels)

    def _cut(self, size: tuple[int, int], share: float) -> Scene:
        at = self._any()
        whole = self._random.choice((SIDE * 5 // 4, SIDE * 3 // 2))
        top, left = (self._random.randint(0, whole - SIDE) for _ in range(2))
        thing = Thing(at, whole / 2 - left, whole / 2 - top, whole)
        return Scene(size, (thing,), self._twice(lambda: self._caption(at)), share, crop=(whole, top, left))

    def _any(self) -> int:
        return self._random.choices(self._kept, self._weights)[0]

    def _paint(self, at: int) -> str:
        return self._random.choice([name for name in PAINTS if name != self._colours[at]])

    def _placed(self, size: tuple[int, int], at: int, scale: float, paint: str = "") -> Thing:
        """Return a picture of the given scale, placed randomly near the middle without cropping it."""
        side = min(size) * scale
        y, x = (each / 2 + self._random.uniform(-0.5, 0.5) * min(each - side, side / 4) for each in size)
        return Thing(at, x, y, side, paint, self._random.random() < 0.5)

    def _caption(self, at: int) -> str:
        picture = self._art.pictures[at]
        return self._captioner.caption(picture.concept, picture.style, self._colours[at])

    def _named(self, thing: Thing) -> Named:
        return Named(self._art.pictures[thing.picture].concept, thing.paint)

    def _twice(self, caption: Callable[[], str]) -> tuple[str, ...]:
        return (caption(), caption())


def _middle(size: tuple[int, int], at: int) -> Thing:
    return Thing(at, size[1] / 2, size[0] / 2, min(size))


@torch.inference_mode()
def rendered(scenes: Sequence[Scene], pictures: torch.Tensor, of: Traits, batch: int = 128) -> Iterator[torch.Tensor]:
    """Yield scenes of one size in batches of uint8 (n, 3, height, width), from pictures (n, 4, 256, 256)."""
    for at in range(0, len(scenes), batch):
        some = scenes[at : at + batch]
        canvas = _backgrounds(some, pictures.device)
        for layer in range(max(len(scene.things) for scene in some)):
            rows = [row for row, scene in enumerate(some) if layer < len(scene.things)]
            _put(canvas, rows, [some[row].things[layer] for row in rows], pictures, of)
        made = (canvas.clamp(0, 1) * 255).round().byte()
        for row, scene in enumerate(some):
            if scene.pixels:
                made[row] = _blurred(made[row : row + 1], scene.pixels)[0]
        yield made


def _put(canvas: torch.Tensor, rows: list[int], things: list[Thing], pictures: torch.Tensor, of: Traits) -> None:
    """Draw one picture onto each given row of a canvas (n, 3, height, width)."""
    device = pictures.device
    chosen = torch.tensor([thing.picture for thing in things], device=device)
    paint = torch.tensor([PAINTS.index(thing.paint) if thing.paint else -1 for thing in things], device=device)
    rgba = pictures[chosen].float() / 255
    opacity = rgba[:, 3:]
    its = Traits(*(part[chosen] for part in vars(of).values()))
    drawn = torch.cat([colours.painted(rgba[:, :3], its, paint) * opacity, opacity], dim=1)
    height, width = canvas.shape[-2:]
    place = torch.tensor([_place(thing, height, width) for thing in things], device=device)
    grid = F.affine_grid(place, [len(things), 4, height, width], align_corners=False)
    laid = F.grid_sample(drawn, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    canvas[rows] = canvas[rows] * (1 - laid[:, 3:]) + laid[:, :3]


def _place(thing: Thing, height: int, width: int) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return the affine map from a canvas's coordinates, in -1 .. 1, to those of the picture on it."""
    sign = -1 if thing.mirrored else 1
    return (
        (sign * width / thing.side, 0.0, sign * (width - 2 * thing.x) / thing.side),
        (0.0, height / thing.side, (height - 2 * thing.y) / thing.side),
    )


def _backgrounds(scenes: Sequence[Scene], device: torch.device) -> torch.Tensor:
    shades = torch.tensor([colours.flat(scene.background) for scene in scenes], device=device)
    return shades[:, :, None, None].expand(-1, -1, *scenes[0].size).contiguous()


def _blurred(pictures: torch.Tensor, pixels: int) -> torch.Tensor:
    """Scale pictures down to a smaller side of `pixels`, and up again."""
    height, width = pictures.shape[-2:]
    factor = pixels / min(height, width)
    small = F.interpolate(
        pictures.float(), (round(height * factor), round(width * factor)), mode="bicubic", antialias=True
    )
    return F.interpolate(small, (height, width), mode="bicubic").round().clamp(0, 255).byte()
