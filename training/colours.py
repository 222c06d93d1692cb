"""Name the colour of a picture, and paint it in another colour."""

from dataclasses import dataclass

import torch

# Hue in degrees, saturation and value at the middle of each colour's range.
_PAINTS = {
    "red": (1, 0.82, 0.90),
    "orange": (28, 0.88, 0.98),
    "yellow": (49, 0.78, 1.0),
    "green": (125, 0.65, 0.70),
    "blue": (212, 0.75, 0.92),
    "purple": (274, 0.60, 0.76),
    "pink": (334, 0.42, 0.98),
    "brown": (22, 0.58, 0.52),
    "black": (0, 0.05, 0.20),
    "white": (0, 0.03, 0.95),
    "grey": (0, 0.03, 0.60),
}
PAINTS = tuple(_PAINTS)
_UPPER_HUES = (
    (14, "red"),
    (37, "orange"),
    (68, "yellow"),
    (168, "green"),
    (252, "blue"),
    (305, "purple"),
    (346, "pink"),
)
_BIN = 10.0  # degrees of a bin of the hue histogram
_REACH = 38.0  # degrees from the dominant hue up to which a pixel is painted


@dataclass(frozen=True)
class Traits:
    """The dominant hue of each picture in degrees, its mean saturation and value, and its share of drawn pixels."""

    hue: torch.Tensor
    saturation: torch.Tensor
    value: torch.Tensor
    share: torch.Tensor

    def names(self) -> list[str]:
        """Return the colour word of each picture, "" if none fits."""
        return [_name(*each) for each in zip(*(part.tolist() for part in vars(self).values()), strict=True)]


def traits(pictures: torch.Tensor, batch: int = 256) -> Traits:
    """Return the traits of uint8 pictures (n, 4, height, width), computed from a quarter of their pixels."""
    parts = [_traits(part[:, :, ::2, ::2].float() / 255) for part in pictures.split(batch)]
    return Traits(*(torch.cat(column) for column in zip(*parts, strict=True)))


def painted(rgb: torch.Tensor, of: Traits, paint: torch.Tensor) -> torch.Tensor:
    """Paint the dominant hue of pictures (n, 3, height, width) in 0 .. 1 in one of PAINTS each; -1 for none.

    A pixel keeps its deviation from the mean, so shading is preserved.
    """
    hue, saturation, value = to_hsv(rgb)
    table = torch.tensor(list(_PAINTS.values()), dtype=rgb.dtype, device=rgb.device)
    to_hue, to_saturation, to_value = (column[:, None, None] for column in table[paint.clamp(min=0)].unbind(1))
    from_hue, from_saturation, from_value = (
        part[:, None, None] for part in (of.hue, of.saturation.clamp(min=0.05), of.value.clamp(min=0.05))
    )
    away = difference(hue, from_hue)
    mask = ((_REACH + 8 - away.abs()) / 8).clamp(0, 1) * ((saturation - 0.12) / 0.1).clamp(0, 1)
    mask = mask * (paint >= 0)[:, None, None]
    new = from_hsv(
        (to_hue + 0.4 * away) % 360,
        (saturation * to_saturation / from_saturation).clamp(0, 1),
        (value * to_value / from_value).clamp(0, 1),
    )
    return torch.lerp(rgb, new, mask[:, None])


def flat(colour: str) -> list[float]:
    """Return red, green and blue in 0 .. 1 of a background. White is pure white, unlike a thing painted white."""
    if colour == "white":
        return [1.0, 1.0, 1.0]
    hue, saturation, value = (torch.tensor([[[each]]], dtype=torch.float32) for each in _PAINTS[colour])
    return from_hsv(hue, saturation, value).flatten().tolist()


def to_hsv(rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hue in degrees, saturation and value, each (n, height, width), of (n, 3, height, width) in 0 .. 1."""
    red, green, blue = rgb.unbind(1)
    value, low = rgb.amax(1), rgb.amin(1)
    span = value - low
    safe = span.clamp(min=1e-6)
    hue = torch.where(
        value == red,
        (green - blue) / safe % 6,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    return hue * 60, span / value.clamp(min=1e-6), value


def from_hsv(hue: torch.Tensor, saturation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return the inverse of to_hsv."""

    def channel(offset: int) -> torch.Tensor:
        sector = (offset + hue / 60) % 6
        return value - value * saturation * torch.minimum(sector, 4 - sector).clamp(0, 1)

    return torch.stack([channel(5), channel(3), channel(1)], dim=1)


def coloured(saturation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return where a pixel has enough colour for a hue."""
    return (saturation > 0.25) & (value > 0.2)


def difference(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the degrees from `other` to `one` on the circle, in -180 .. 180."""
    return (one - other + 180) % 360 - 180


def _traits(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    hue, saturation, value = to_hsv(pixels[:, :3])
    drawn = pixels[:, 3]
    has_hue = drawn * coloured(saturation, value)
    bins = int(360 / _BIN)
    at = (hue / _BIN).long().clamp(max=bins - 1).flatten(1)
    histogram = torch.zeros(len(pixels), bins, device=pixels.device).scatter_add_(1, at, has_hue.flatten(1))
    smooth = histogram + 0.5 * (histogram.roll(1, 1) + histogram.roll(-1, 1))
    peak = smooth.argmax(1) * _BIN + _BIN / 2
    away = difference(hue, peak[:, None, None])
    near = has_hue * (away.abs() < _REACH)
    weight = near.sum((1, 2)).clamp(min=1e-3)
    share = weight / drawn.sum((1, 2)).clamp(min=1e-3)
    mean_hue = (peak + (away * near).sum((1, 2)) / weight) % 360
    grey = share < 0.2  # then the means are over all drawn pixels
    counted = torch.where(grey[:, None, None], drawn, near)
    total = counted.sum((1, 2)).clamp(min=1e-3)
    return mean_hue, (saturation * counted).sum((1, 2)) / total, (value * counted).sum((1, 2)) / total, share


def _name(hue: float, saturation: float, value: float, share: float) -> str:
    if share < 0.2:
        shades = ((0.33, "black"), (0.75, "grey"), (2.0, "white"))
        return next(name for upper, name in shades if value < upper) if saturation < 0.2 else ""
    if share < 0.4:
        return ""
    if 8 <= hue < 41 and value < 0.68:
        return "brown"
    if (hue >= 300 or hue < 14) and saturation < 0.55 and value > 0.8:
        return "pink"
    return next((name for upper, name in _UPPER_HUES if hue < upper), "red")
