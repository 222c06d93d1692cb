"""Images are saved byte for byte, and notebooks render images and results."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from text_to_image_client import Environment, Format, Image, Result, Warning, WarningCode

IMAGE = Image(
    data=b"\xff\xd8\xff\xee\x00\x0eAdobe",
    media_type="image/jpeg",
    finish_reason="success",
    seed=7,
    width=128,
    height=96,
    steps=20,
    guidance_scale=4.5,
    high_noise_frac=0.8,
    scheduler="euler",
    base_calls=16,
    refiner_calls=4,
    request={"prompt": "cat napping", "seed": 7},
    sha256="",
)
ENVIRONMENT = Environment("", {}, "", "fp32", "", 1, 1, "off", "")


@pytest.mark.parametrize("name", ["cat.jpg", "cat.jpeg", "CAT.JPG"])
def test_an_image_saves_its_received_bytes(tmp_path: Path, name: str):
    path = IMAGE.save(str(tmp_path / name))
    assert path == tmp_path / name
    assert path.read_bytes() == IMAGE.data


@pytest.mark.parametrize("name", ["cat.png", "cat", "cat.txt"])
def test_a_name_with_another_formats_ending_is_rejected(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match=r"name it cat\.jpg, or ask for another format"):
        IMAGE.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_an_unwritable_file_is_reported_by_its_name(tmp_path: Path):
    with pytest.raises(ValueError, match=r"name it cat\.jpg"):
        IMAGE.save("")
    with pytest.raises(FileNotFoundError) as caught:
        IMAGE.save(tmp_path / "missing" / "cat.jpg")
    assert caught.value.filename == str(tmp_path / "missing" / "cat.jpg")


def test_the_bytes_stay_out_of_the_repr():
    assert "Adobe" not in repr(IMAGE)


def test_the_data_uri_begins_as_instills_do():
    assert IMAGE.data_uri.startswith("data:image/jpeg;base64,/9j/7gAOQWRvY")


@pytest.mark.parametrize(("format_", "shown_as"), [("png", "image/png"), ("jpeg", "image/jpeg"), ("webp", "text/html")])
def test_a_notebook_renders_every_format(format_: str, shown_as: str):
    bundle = replace(IMAGE, media_type=f"image/{format_}")._repr_mimebundle_()
    assert shown_as in bundle
    assert f"data:image/{format_};base64," in bundle["text/html"]


def test_a_newer_media_type_is_saved_under_its_own_ending(tmp_path: Path):
    image = replace(IMAGE, media_type="image/avif")
    assert (image.format, image.suffixes) == ("avif", (".avif",))
    assert image.save(tmp_path / "cat.avif").read_bytes() == IMAGE.data
    with pytest.raises(ValueError, match=r"name it cat\.avif"):
        image.save(tmp_path / "cat.jpg")
    assert "data:image/avif;base64," in image._repr_mimebundle_()["text/html"]


def test_a_result_renders_its_images_and_escapes_its_warnings():
    warning = Warning(WarningCode.PROMPT_TRUNCATED, "data.prompt", "<script> was dropped")
    html = Result((IMAGE, IMAGE), (warning,), "id", "mini", "abc", ENVIRONMENT, 0.0, 1.0, {})._repr_html_()
    assert html.count("<img") == 2
    assert "&lt;script&gt; was dropped" in html
    assert "<script>" not in html


def test_a_result_converts_to_instills_output():
    output = Result((IMAGE,), (), "id", "mini", "abc", ENVIRONMENT, 0.0, 1.0, {}).to_instill()
    assert output == {"data": {"choices": [{"finish-reason": "success", "image": IMAGE.data_uri}]}}


EXAMPLES = """
from text_to_image_client import Image, Provenance, Request, TextToImage

def again(client: TextToImage, image: Image, saved: Provenance, request: Request) -> None:
    client.generate(**image.request)
    client.generate(**(image.request | {"seed": 8}))
    client.stream(**(image.request | {"seed": 8, "on_disconnect": "detach"}), timeout=5)
    client.generate(**saved.request(steps=30))
    client.generate(**(saved.request(1) | {"format": "png"}))
    client.generate(request.get("prompt", ""), seed=request.get("seed"))
"""
MISTAKES = """
from text_to_image_client import Image, TextToImage

def again(client: TextToImage, image: Image) -> None:
    client.generate("cat", seed="8")
    client.generate("cat", sed=8)
"""


@pytest.mark.slow
def test_pyright_and_mypy_accept_the_readmes_examples_and_find_mistakes(tmp_path: Path):
    if shutil.which("npm") is None:
        pytest.skip("apt-get install npm")
    install = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error", "pyright@1.1.414"]
    subprocess.run(install, cwd=tmp_path, check=True)
    (tmp_path / "examples.py").write_text(EXAMPLES)
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    client = str(Path(__file__).parents[1])
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [client], "include": ["*.py"]}))
    pyright = [tmp_path / "node_modules" / ".bin" / "pyright", "--outputjson", "--pythonpath", sys.executable]
    found = subprocess.run(pyright, cwd=tmp_path, capture_output=True, text=True, check=False)
    errors = [each for each in json.loads(found.stdout)["generalDiagnostics"] if each["severity"] == "error"]
    assert [Path(each["file"]).name for each in errors] == ["mistakes.py"] * 2, found.stdout
    mypy = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--ignore-missing-imports", "examples.py"]
    checked = subprocess.run(mypy, cwd=tmp_path, env=os.environ | {"MYPYPATH": client}, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stdout


def test_a_format_is_known_by_the_name_of_a_file():
    assert [Format.of(Path(name)) for name in ("a.jpeg", "a.PNG", "a.webp", "a.gif")] == ["jpeg", "png", "webp", None]


def test_every_format_is_known_by_its_usual_ending():
    kinds = {each: Format.of(Path(f"a{each.suffixes[0]}")) for each in Format}
    assert kinds == {
        Format.JPEG: Format.JPEG,
        Format.PNG: Format.PNG,
        Format.WEBP: Format.WEBP,
        Format.JPEG_SUBSAMPLED: Format.JPEG,
        Format.WEBP_LOSSLESS: Format.WEBP,
        Format.JPEG_RGB: Format.JPEG,
    }
