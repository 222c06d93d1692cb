"""Coding of pixels as image files and data URIs, by Pillow."""

import base64
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True, eq=False)
class Coding:
    """A way to code pixels. It decides the bytes, together with a quality where it is not lossless."""

    media_type: str
    lossless: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)  # of Pillow's


# Raise domain.CODING_VERSION when a coding changes, since a request then gets other bytes.
JPEG = Coding("image/jpeg", options={"subsampling": "4:4:4"})  # YCbCr in a JFIF file, which every decoder reads
JPEG_SUBSAMPLED = Coding("image/jpeg", options={"subsampling": "4:2:0"})
# RGB with Adobe's marker, like Instill's own answers, whose base64 begins `/9j/7gAOQWRvY`. Some decoders (jpeg-js, and
# Jimp, which uses it) ignore the marker's transform and show wrong colours, as if it were YCbCr.
JPEG_RGB = Coding("image/jpeg", options={"keep_rgb": True})
PNG = Coding("image/png", lossless=True)
WEBP = Coding("image/webp")
WEBP_LOSSLESS = Coding("image/webp", lossless=True, options={"lossless": True})

CODINGS = {
    "JPEG": JPEG,
    "JPEG_SUBSAMPLED": JPEG_SUBSAMPLED,
    "JPEG_RGB": JPEG_RGB,
    "PNG": PNG,
    "WEBP": WEBP,
    "WEBP_LOSSLESS": WEBP_LOSSLESS,
}
"""The codings by the names of the contract's Format, without the prefix."""

# Qualities that are tried, best first, when an image is too large.
_SMALLER = (95, 90, 80, 70, 60, 50, 40, 30, 20, 10)


class ImageTooLarge(Exception):
    """No coding of the image fits into its message."""


@dataclass(frozen=True)
class CodedImage:
    """An image file. `quality` is 1 to 100, or 0 for a lossless coding; `smaller` if it is not coded as requested."""

    data: bytes
    coding: Coding
    quality: int
    smaller: bool = False

    @property
    def data_uri(self) -> str:
        """The file as a data URI in base64."""
        return f"data:{self.coding.media_type};base64,{base64.b64encode(self.data).decode('ascii')}"


def code(pixels: NDArray[np.uint8], coding: Coding, quality: int, smaller: bool = False) -> CodedImage:
    """Code `pixels`, RGB of shape (height, width, 3), with `quality` of 1 to 100 if the coding is lossy."""
    options = dict(coding.options) if coding.lossless else {**coding.options, "quality": quality}
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, coding.media_type.removeprefix("image/"), **options)
    return CodedImage(buffer.getvalue(), coding, 0 if coding.lossless else quality, smaller)


def code_within(pixels: NDArray[np.uint8], coding: Coding, quality: int, max_bytes: int) -> CodedImage:
    """Code `pixels` in at most `max_bytes`: as requested if that fits, else smaller. Raises ImageTooLarge.

    A PNG first becomes a lossless WebP, which changes no pixel, and an RGB JPEG becomes YCbCr. After that the quality
    decreases, and a JPEG's colour is subsampled.
    """
    for attempt, choice in enumerate([(coding, quality), *_smaller(coding, quality)]):
        coded = code(pixels, *choice, smaller=attempt > 0)
        if len(coded.data) <= max_bytes:
            return coded
    raise ImageTooLarge(
        f"an image of {pixels.shape[1]}x{pixels.shape[0]} pixels does not fit into {max_bytes} bytes at any quality; "
        "raise output.maxMessageBytes, ask for fewer images at once, or use StreamGenerate"
    )


def _smaller(coding: Coding, quality: int) -> Iterator[tuple[Coding, int]]:
    """Yield the codings and qualities to try, best first, when an image is too large as requested."""
    if coding is PNG:
        yield WEBP_LOSSLESS, 0
    if coding is JPEG_RGB:
        yield JPEG, quality
    lossy = JPEG_SUBSAMPLED if coding.media_type == JPEG.media_type else WEBP
    for lower in _SMALLER:
        if coding.lossless or lower <= quality:
            yield lossy, lower
