"""The training data: emoji art from npm packages, rendered to transparent squares, with names and keywords.

A concept is an emoji. Each of five sets draws it in its own style, and a sixth style is the outlines of one set. Flags,
symbols, letters and skin tones are excluded. The result is `art.npz`: lossless WebP images, the concept and style of
each, and the words of the concepts. weights/NOTICE has the licences and attributions.
"""

import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RUNS = Path(__file__).parent / "runs"  # downloads and results of training
WEIGHTS = Path(__file__).parents[1] / "weights"  # the trained ensemble
SIDE = 256  # pixels
HELD_OUT = 32  # every 32nd picture is held out from the training of the autoencoder and the experts

# npm package, version, the words for its style
SETS = {
    "fluent-emoji": ("@iconify-json/fluent-emoji", "1.2.7", ("3d", "3d render", "shaded")),
    "fluent-emoji-flat": ("@iconify-json/fluent-emoji-flat", "1.2.6", ("flat", "flat icon", "simple")),
    "noto": ("@iconify-json/noto", "1.2.9", ("noto style", "soft")),
    "noto-v1": ("@iconify-json/noto-v1", "1.2.5", ("blob style", "classic")),
    "twemoji": ("@iconify-json/twemoji", "1.2.5", ("twemoji style", "cartoon")),
}
OUTLINE, _OUTLINED = "outline", "twemoji"  # the generated style, and the set that it is generated from
STYLES = {style: words for style, (_, _, words) in SETS.items()} | {
    OUTLINE: ("outline", "line art", "line drawing", "black and white outline")
}
KEYWORDS = {"emojibase-data": "17.0.0", "emojilib": "4.0.3"}
_LEFT_OUT = {"component", "symbols", "flags"}


@dataclass(frozen=True)
class Picture:
    """One drawing of a concept. `style` is a key of STYLES."""

    concept: int
    style: str
    webp: bytes


@dataclass(frozen=True)
class Concept:
    """One emoji: its name, its group, and its keywords."""

    name: str
    group: str
    keywords: tuple[str, ...]


@dataclass(frozen=True)
class Art:
    """All pictures and their concepts."""

    concepts: tuple[Concept, ...]
    pictures: tuple[Picture, ...]

    def held_out(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return a mask of the held-out pictures, (pictures,)."""
        return np.arange(len(self.pictures)) % HELD_OUT == 0

    def pixels(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return all pictures, uint8 of shape (pictures, 256, 256, 4): red, green, blue and opacity."""
        with ThreadPoolExecutor(16) as pool:
            decoded = pool.map(
                lambda picture: np.asarray(Image.open(io.BytesIO(picture.webp)).convert("RGBA")), self.pictures
            )
            return np.stack(list(decoded))

    def save(self, file: Path) -> None:
        index = {
            "concepts": [[each.name, each.group, each.keywords] for each in self.concepts],
            "pictures": [[each.concept, each.style, len(each.webp)] for each in self.pictures],
        }
        content = np.frombuffer(b"".join(each.webp for each in self.pictures), np.uint8)
        np.savez(file, index=np.frombuffer(json.dumps(index).encode(), np.uint8), content=content)


def everything() -> Art:
    """Return all art. Downloads and renders it on the first call."""
    file = RUNS / "art.npz"
    if not file.is_file():
        fetch(RUNS / "packages", [*((name, version) for name, version, _ in SETS.values()), *KEYWORDS.items()])
        render(RUNS / "packages").save(file)
    return load(file)


def load(file: Path) -> Art:
    with np.load(file) as stored:
        index, content = json.loads(stored["index"].tobytes()), stored["content"].tobytes()
    pictures, at = [], 0
    for concept, style, size in index["pictures"]:
        pictures.append(Picture(concept, style, content[at : at + size]))
        at += size
    concepts = tuple(Concept(name, group, tuple(keywords)) for name, group, keywords in index["concepts"])
    return Art(concepts, tuple(pictures))


def fetch(folder: Path, packages: Iterable[tuple[str, str]]) -> None:
    """Download npm packages, each a name and a version, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [f"{package}@{version}" for package, version in packages]
    subprocess.run(["npm", "pack", "--silent", "--pack-destination", folder.resolve(), *wanted], check=True, cwd=folder)


def render(folder: Path) -> Art:
    """Render all drawings of all concepts from the packages in a folder."""
    icons = {style: _read(folder, style, "icons.json") for style in SETS}
    concepts: list[Any] = []
    drawings: list[Any] = []
    for entry, group in _entries(folder):
        names = _names(entry)
        styles = {style: names & _all_names(icons[style]) for style in SETS}
        if not any(styles.values()):
            continue
        keywords = dict.fromkeys(_clean(word) for word in (entry["label"], *entry.get("tags", ()), *entry["emojilib"]))
        keywords.pop("", None)
        keywords.pop(_clean(entry["label"]), None)
        drawn = {style: _svg(icons[style], found) for style, found in styles.items() if found}
        if _OUTLINED in drawn:
            drawn[OUTLINE] = _outlined(drawn[_OUTLINED])
        drawings += [(len(concepts), style, svg) for style, svg in drawn.items()]
        concepts.append(Concept(_clean(entry["label"]), group, tuple(keywords)))
    with ThreadPoolExecutor(4) as pool:
        webps = list(pool.map(lambda drawing: _webp(drawing[2]), drawings))
    pictures = (
        Picture(concept, style, webp) for (concept, style, _), webp in zip(drawings, webps, strict=True) if webp
    )
    return Art(tuple(concepts), tuple(pictures))


def _entries(folder: Path) -> Iterable[tuple[dict[str, Any], str]]:
    groups = {group["order"]: group["key"] for group in _read(folder, "emojibase-data", "en/messages.json")["groups"]}
    emojilib = _read(folder, "emojilib", "dist/emoji-en-US.json")
    for entry in sorted(_read(folder, "emojibase-data", "en/data.json"), key=lambda entry: entry.get("order", 0)):
        group = groups.get(entry.get("group", -1))
        if group is not None and group not in _LEFT_OUT:
            words = emojilib.get(entry["emoji"], emojilib.get(entry["emoji"].replace("\ufe0f", ""), []))
            yield {**entry, "emojilib": [word.replace("_", " ") for word in words]}, group


def _names(entry: dict[str, Any]) -> set[str]:
    """Return the names of an emoji in iconify's sets, which derive them from its CLDR label."""
    label = entry["label"].lower().replace("&", "and").replace("\u2019", "").replace("ñ", "n").replace("é", "e")
    return {re.sub(r"[^a-z0-9]+", "-", label).strip("-"), re.sub(r"[^a-z0-9]+", "-", label.replace(".", "")).strip("-")}


def _all_names(icons: dict[str, Any]) -> set[str]:
    return set(icons["icons"]) | set(icons.get("aliases", {}))


def _svg(icons: dict[str, Any], names: set[str]) -> str:
    name = min(names)
    icon = icons["icons"][name if name in icons["icons"] else icons["aliases"][name]["parent"]]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{SIDE}" height="{SIDE}">{icon["body"]}</svg>'
    )


def _outlined(svg: str) -> str:
    """Return the same shapes in white with a dark edge."""
    svg = re.sub(r' (stroke|stroke-width)="[^"]*"', "", re.sub(r'fill="(?!none)[^"]*"', 'fill="#fff"', svg))
    side = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])  # type: ignore[index]
    edge = side / 45
    svg = re.sub(r'viewBox="[^"]*"', f'viewBox="{-edge:g} {-edge:g} {side + 2 * edge:g} {side + 2 * edge:g}"', svg)
    return svg.replace("<svg", f'<svg fill="#fff" stroke="#333" stroke-width="{edge:.3f}" stroke-linejoin="round"', 1)


def _webp(svg: str) -> bytes:
    """Return the rendered drawing as lossless WebP, empty if the renderer cannot draw it."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    if drawn.size != (SIDE, SIDE) or not drawn.getbbox():
        return b""
    coded = io.BytesIO()
    drawn.save(coded, "webp", lossless=True, quality=60, method=4)
    return coded.getvalue()


def _clean(words: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"[^a-z0-9' -]", " ", words.lower().replace("\u2019", "'"))).strip()


def _read(folder: Path, package: str, file: str) -> Any:
    (archive,) = folder.glob(f"{'iconify-json-' if package in SETS else ''}{package}-[0-9]*.tgz")
    with tarfile.open(archive) as content:
        member = content.extractfile(f"package/{file}")
        assert member is not None
        return json.load(member)
