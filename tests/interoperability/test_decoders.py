"""Image decoders show the right colours: libraries of Python and Node, ffmpeg, a browser.

A test is skipped, with the reason, where this machine lacks its decoder. The programs of Node's libraries and the page
of the browser are in tests/interoperability/programs/decoders.
"""

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from serving import PATIENCE, ROOT

from server.api import images

Pixels = NDArray[np.uint8]
Decode = Callable[[list[Path]], list[Pixels]]

PROGRAMS = ROOT / "tests" / "interoperability" / "programs" / "decoders"
WIDTH, HEIGHT = 192, 128


def saturated() -> Pixels:
    """Every hue in full saturation, from dark to light, and a row of pure colours with sharp edges."""
    hue = np.broadcast_to(np.arange(WIDTH) * 255 // (WIDTH - 1), (HEIGHT, WIDTH))
    value = np.broadcast_to(np.linspace(64, 255, HEIGHT)[:, None], (HEIGHT, WIDTH))
    hsv = np.stack([hue, np.full_like(hue, 255), value], axis=2).astype(np.uint8)
    pixels = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB")).copy()
    for place, colour in enumerate(np.ndindex(2, 2, 2)):
        pixels[:32, place * WIDTH // 8 : (place + 1) * WIDTH // 8] = np.array(colour) * 255
    return pixels


PICTURE = saturated()
CODINGS = {
    "jpeg": images.JPEG,
    "jpeg_subsampled": images.JPEG_SUBSAMPLED,
    "jpeg_rgb": images.JPEG_RGB,
    "png": images.PNG,
    "webp": images.WEBP,
    "webp_lossless": images.WEBP_LOSSLESS,
}
# How far a decoder's pixels may be from Pillow's, of 255 and on average. Where colour is subsampled (previews, and what
# did not fit into a message) decoders interpolate it in their own ways.
BOUNDS = {"jpeg": 1, "jpeg_subsampled": 4, "png": 0, "webp": 4, "webp_lossless": 0}
JPEG, WEBP = ("jpeg", "jpeg_subsampled"), ("webp", "webp_lossless")


def pillow(files: list[Path]) -> list[Pixels]:
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def opencv(files: list[Path]) -> list[Pixels]:
    return [cv2.imread(str(file), cv2.IMREAD_COLOR)[..., ::-1] for file in files]


def ffmpeg(files: list[Path]) -> list[Pixels]:
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return [_rgb(_run(imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", file, *raw)) for file in files]


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for command, package in {"node": "nodejs", "npm": "npm"}.items():
        if shutil.which(command) is None:
            pytest.skip(f"apt-get install {package}")
    folder = tmp_path_factory.mktemp("node")
    for program in PROGRAMS.glob("*.js*"):
        shutil.copy(program, folder)
    install = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error"]
    subprocess.run(install, cwd=folder, check=True, timeout=PATIENCE)
    return folder


def node(library: str) -> Callable[[pytest.FixtureRequest], Decode]:
    def decoder(request: pytest.FixtureRequest) -> Decode:
        folder = request.getfixturevalue("node_modules")

        def decode(files: list[Path]) -> list[Pixels]:
            sizes = json.loads(_run("node", folder / "decode.js", library, *files))
            assert sizes == [[WIDTH, HEIGHT]] * len(files)
            return [_rgb(Path(f"{file}.rgb").read_bytes()) for file in files]

        return decode

    return decoder


def chromium(_: pytest.FixtureRequest) -> Decode:
    if shutil.which("chromium") is None:
        pytest.skip("apt-get install chromium")

    def decode(files: list[Path]) -> list[Pixels]:
        folder = files[0].parent
        uris = [f"data:{_media_type(file)};base64,{base64.b64encode(file.read_bytes()).decode()}" for file in files]
        page = folder / "page.html"
        page.write_text((PROGRAMS / "page.html").read_text().replace("[/* data URIs */]", json.dumps(uris)))
        flags = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={folder / 'profile'}",
        )
        shown = _run("chromium", *flags, "--virtual-time-budget=60000", "--dump-dom", f"file://{page}").decode()
        found = re.search(r'<pre id="pixels">(.*?)</pre>', shown, re.DOTALL)
        assert found is not None, shown[:1000]
        pixels = (np.frombuffer(base64.b64decode(line), np.uint8) for line in found[1].splitlines())
        return [each.reshape(HEIGHT, WIDTH, 4)[..., :3] for each in pixels]

    return decode


def _media_type(file: Path) -> str:
    return CODINGS[file.stem].media_type


def _rgb(raw: bytes) -> Pixels:
    return np.frombuffer(raw, np.uint8).reshape(HEIGHT, WIDTH, 3)


def _run(*command: str | Path) -> bytes:
    ended = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False)
    assert ended.returncode == 0, ended.stderr.decode()
    return ended.stdout


def always(decode: Decode) -> Callable[[pytest.FixtureRequest], Decode]:
    return lambda _: decode


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The picture in each coding, of the default quality."""
    folder = tmp_path_factory.mktemp("pictures")
    made = {}
    for name, coding in CODINGS.items():
        made[name] = folder / f"{name}.{coding.media_type.removeprefix('image/')}"
        made[name].write_bytes(images.code(PICTURE, coding, 95).data)
    return made


def difference(ours: Pixels, theirs: Pixels) -> float:
    return float(np.abs(ours.astype(int) - theirs).mean())


@pytest.mark.parametrize("name", ["jpeg", "png", "webp_lossless", "jpeg_rgb"])
def test_pillow_shows_the_encoded_colours(files: dict[str, Path], name: str):
    (shown,) = pillow([files[name]])
    assert difference(PICTURE, shown) < 1


@pytest.mark.parametrize(
    ("decoder", "codings"),
    [
        pytest.param(always(opencv), (*JPEG, "png", *WEBP), id="OpenCV"),
        pytest.param(always(ffmpeg), (*JPEG, "png", *WEBP), id="ffmpeg"),
        pytest.param(node("sharp"), (*JPEG, "png", *WEBP), id="sharp", marks=pytest.mark.slow),
        pytest.param(node("jpeg-js"), JPEG, id="jpeg-js", marks=pytest.mark.slow),
        pytest.param(node("jimp"), (*JPEG, "png"), id="Jimp", marks=pytest.mark.slow),
        pytest.param(chromium, (*JPEG, "png", *WEBP), id="Chromium", marks=pytest.mark.slow),
    ],
)
def test_a_decoder_shows_the_same_colours_as_pillow(
    files: dict[str, Path],
    request: pytest.FixtureRequest,
    decoder: Callable[[pytest.FixtureRequest], Decode],
    codings: tuple[str, ...],
):
    chosen = [files[name] for name in codings]
    shown = decoder(request)(chosen)
    differences = map(difference, pillow(chosen), shown)
    wrong = {name: found for name, found in zip(codings, differences, strict=True) if found > BOUNDS[name]}
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("library", ["jpeg-js", "jimp"])
def test_some_decoders_show_an_rgb_jpeg_in_wrong_colours(
    files: dict[str, Path], request: pytest.FixtureRequest, library: str
):
    (shown,) = node(library)(request)([files["jpeg_rgb"]])
    assert difference(PICTURE, shown) > 50
