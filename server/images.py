"""Pixels to coded images and data URIs. Pillow does the coding; this file chooses what to ask of it."""

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

JPEG, PNG, WEBP = "image/jpeg", "image/png", "image/webp"

# Qualities tried, best first, once an image has turned out too large.
_SMALLER = (95, 90, 80, 70, 60, 50, 40, 30, 20, 10)


class ImageTooLarge(Exception):
    """Not even the coarsest coding fits."""


@dataclass(frozen=True)
class CodedImage:
    """A coded image. `quality` is 1 to 100, or 0 for a lossless coding; `smaller` tells that it is not as asked."""

    data: bytes
    media_type: str
    quality: int
    smaller: bool = False

    @property
    def data_uri(self) -> str:
        return f"data:{self.media_type};base64,{base64.b64encode(self.data).decode('ascii')}"


def code(pixels: NDArray[np.uint8], media_type: str, quality: int) -> CodedImage:
    """Code `pixels`, RGB of shape (height, width, 3), as `media_type`; `quality` 1 to 100 counts for JPEG and WebP.

    JPEGs keep RGB instead of YCbCr and so carry Adobe's marker (their base64 begins `/9j/7gAOQWRvY`): no colour is
    subsampled, and Instill's own answers look the same.
    """
    choices: dict[str, dict[str, Any]] = {
        JPEG: {"format": "JPEG", "quality": quality, "keep_rgb": True},
        PNG: {"format": "PNG"},
        WEBP: {"format": "WEBP", "quality": quality},
    }
    return CodedImage(_save(pixels, choices[media_type]), media_type, 0 if media_type == PNG else quality)


def code_within(pixels: NDArray[np.uint8], media_type: str, quality: int, max_bytes: int) -> CodedImage:
    """The best coding of at most `max_bytes`: as asked if that fits, else smaller. Raises ImageTooLarge.

    A PNG first becomes a lossless WebP, which changes no pixel; after that, and from JPEG, the quality falls, with
    JPEG's colour now subsampled as is usual.
    """
    coded = code(pixels, media_type, quality)
    if len(coded.data) <= max_bytes:
        return coded
    if media_type == PNG:
        lossless = CodedImage(_save(pixels, {"format": "WEBP", "lossless": True}), WEBP, 0, smaller=True)
        if len(lossless.data) <= max_bytes:
            return lossless
    lossy = JPEG if media_type == JPEG else WEBP
    for lower in (step for step in _SMALLER if media_type == PNG or step <= quality):
        options = {"format": lossy.removeprefix("image/"), "quality": lower}
        coded = CodedImage(_save(pixels, options), lossy, lower, smaller=True)
        if len(coded.data) <= max_bytes:
            return coded
    raise ImageTooLarge(
        f"an image of {pixels.shape[1]}x{pixels.shape[0]} pixels does not fit into {max_bytes} bytes at any quality; "
        "raise output.maxMessageBytes, ask for fewer images at once, or use StreamGenerate"
    )


def _save(pixels: NDArray[np.uint8], options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **options)
    return buffer.getvalue()
