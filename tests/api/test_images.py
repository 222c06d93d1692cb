"""Images: the requested coding if it fits, a smaller one that is reported if not."""

import io

import numpy as np
import pytest
from PIL import Image

from server.api import images
from server.domain import CODING_VERSION

NOISE = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
RAMP = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3)).copy()


def decoded(image: images.CodedImage) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image.data)).convert("RGB"))


CODINGS = {
    "jpeg": images.JPEG,
    "jpeg rgb": images.JPEG_RGB,
    "jpeg subsampled": images.JPEG_SUBSAMPLED,
    "png": images.PNG,
    "webp": images.WEBP,
    "webp lossless": images.WEBP_LOSSLESS,
}


@pytest.mark.parametrize("coding", CODINGS.values(), ids=CODINGS)
def test_each_format_decodes_with_its_type_and_size(coding: images.Coding):
    image = images.code(RAMP, coding, 95)
    assert Image.open(io.BytesIO(image.data)).get_format_mimetype() == coding.media_type
    assert decoded(image).shape == RAMP.shape
    assert np.abs(decoded(image).astype(int) - RAMP).max() <= (0 if coding.lossless else 8)


def test_a_jpeg_is_ycbcr_4_4_4_in_a_jfif_file():
    image = images.code(RAMP, images.JPEG, 95)
    assert image.data_uri.startswith("data:image/jpeg;base64,/9j/4AAQSkZJRg")
    assert b"Adobe" not in image.data
    assert {component[1:3] for component in Image.open(io.BytesIO(image.data)).layer} == {(1, 1)}


def test_an_rgb_jpeg_has_adobes_marker_like_instills():
    assert images.code(RAMP, images.JPEG_RGB, 95).data_uri.startswith("data:image/jpeg;base64,/9j/7gAOQWRvY")


def test_the_coding_version_changes_with_the_codings():
    """Raise the version after a change, for `t2i generate --like` to name the cause of different bytes."""
    codings = {name: dict(coding.options) for name, coding in CODINGS.items()}
    assert (CODING_VERSION, codings) == (
        "2",
        {
            "jpeg": {"subsampling": "4:4:4"},
            "jpeg rgb": {"keep_rgb": True},
            "jpeg subsampled": {"subsampling": "4:2:0"},
            "png": {},
            "webp": {},
            "webp lossless": {"lossless": True},
        },
    )


def test_an_image_that_fits_is_coded_as_requested():
    assert images.code_within(RAMP, images.PNG, 95, 10**6) == images.code(RAMP, images.PNG, 95)


def test_a_png_that_does_not_fit_becomes_a_lossless_webp_first():
    smooth = np.add.outer(np.arange(512), np.arange(512)).astype(np.uint8)[..., None].repeat(3, axis=2)
    png = images.code(smooth, images.PNG, 95)
    image = images.code_within(smooth, images.PNG, 95, len(png.data) - 1)
    assert (image.coding, image.smaller) == (images.WEBP_LOSSLESS, True)
    assert np.array_equal(decoded(image), smooth)


@pytest.mark.parametrize("coding", CODINGS.values(), ids=CODINGS)
def test_pure_noise_at_1024_pixels_still_fits_below_three_megabytes(coding: images.Coding):
    image = images.code_within(NOISE, coding, 95, 3_000_000)
    assert len(image.data) <= 3_000_000
    assert image.smaller == (len(images.code(NOISE, coding, 95).data) > 3_000_000)
    assert decoded(image).shape == NOISE.shape


@pytest.mark.parametrize("max_bytes", [3_000_000, 1_500_000, 500_000])
@pytest.mark.parametrize("coding", CODINGS.values(), ids=CODINGS)
def test_coding_and_quality_reproduce_an_image_file(coding: images.Coding, max_bytes: int):
    image = images.code_within(NOISE, coding, 95, max_bytes)
    assert images.code(NOISE, image.coding, image.quality).data == image.data


def test_an_rgb_jpeg_that_does_not_fit_becomes_ycbcr_before_its_quality_falls():
    asked = images.code(NOISE, images.JPEG_RGB, 90)
    image = images.code_within(NOISE, images.JPEG_RGB, 90, len(asked.data) - 1)
    assert (image.coding, image.quality, image.smaller) == (images.JPEG, 90, True)


def test_quality_never_exceeds_the_requested_one():
    asked = images.code(NOISE, images.JPEG, 35)
    image = images.code_within(NOISE, images.JPEG, 35, len(asked.data) - 1)
    assert image.quality <= 35


def test_the_error_of_an_image_that_cannot_fit_says_what_to_do():
    with pytest.raises(images.ImageTooLarge, match=r"raise output\.maxMessageBytes"):
        images.code_within(NOISE, images.JPEG, 95, 1000)
