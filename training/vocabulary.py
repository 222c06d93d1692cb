"""Prune CLIP's byte-pair vocabulary to the words of the captions and the commonest merges of English.

The vocabulary is part of open_clip_torch (MIT). A merge is kept with all its parts, so that a kept word is split as by
the full vocabulary, and any other text into smaller pieces. There are no unknown tokens.
"""

import gzip
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
_CLIP_MERGES = 49152 - 256 - 2  # the number of lines of the file that CLIP uses
CONTEXT = 77  # tokens


def prune(words: Iterable[str], size: int, folder: Path) -> CLIPTokenizer:
    """Write vocab.json and merges.txt of at most `size` tokens below `folder`, and return their tokenizer."""
    merges = _clip_merges()
    whole = _write(merges, folder / "whole")
    needed = {token for word in words for token in whole.tokenize(word)}
    made = {first + second: (first, second) for first, second in reversed(merges)}

    kept: set[str] = set()

    def keep(token: str) -> None:
        if token in made and token not in kept:
            kept.add(token)
            for part in made[token]:
                keep(part)

    for token in sorted(needed):
        keep(token)
    room = size - 512 - len(_SPECIAL)
    for first, second in merges:
        if len(kept) >= room:
            break
        keep(first + second)
    return _write([pair for pair in merges if pair[0] + pair[1] in kept], folder)


def english(count: int | None = 24_000) -> list[str]:
    """Return the words of CLIP's vocabulary of at least three letters, the commonest first."""
    ends = ((first + second).removesuffix("</w>") for first, second in _clip_merges() if second.endswith("</w>"))
    return [word for word in ends if word.isascii() and word.isalpha() and len(word) > 2][:count]


def carried_by(package: str) -> Path:
    """Return the folder of an installed package, which need not be importable."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed: see training/requirements.txt")
    return Path(spec.origin).parent


def _clip_merges() -> list[tuple[str, str]]:
    file = carried_by("open_clip") / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : _CLIP_MERGES + 1]
    return [(first, second) for first, second in (line.split() for line in lines)]


def _write(merges: list[tuple[str, str]], folder: Path) -> CLIPTokenizer:
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges), *_SPECIAL]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: at for at, token in enumerate(dict.fromkeys(tokens))}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges), ""]))
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=CONTEXT)
