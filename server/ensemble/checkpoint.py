"""Check the folders of weights before they are loaded, hash their files, and read their defaults.

A checkpoint is a folder in the layout of a published diffusers repository: model_index.json, and one folder per
component with its configuration and safetensors files, whole or sharded, with an fp16 variant next to fp32 or alone.
The checks read no weights, so they report a broken folder within a second, in one sentence with one exit code.
"""

import dataclasses
import hashlib
import json
import math
import re
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from pydantic_core import ErrorDetails
from safetensors import SafetensorError, safe_open

from server.errors import GitLfsPointer, MissingPart, TruncatedFile, WrongExpert

BASE_PARTS = ("text_encoder", "text_encoder_2", "unet", "vae")
REFINER_PARTS = ("text_encoder_2", "unet")  # and the autoencoder, which is the base's
_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}

_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?P<fp16>\.fp16)?(?:-(\d{5})-of-(?P<shards>\d{5}))?\.safetensors"
)
_LFS = b"version https://git-lfs.github.com/spec/"
_CHUNK = 4 << 20  # bytes hashed at a time, so many that the threads seldom need the interpreter


@dataclass(frozen=True)
class Checkpoint:
    """A folder that has been checked. `weights` has the files to load of each part."""

    folder: Path
    variant: str | None
    weights: Mapping[str, tuple[Path, ...]]
    configs: tuple[Path, ...]

    def parameters(self, parts: Iterable[str]) -> int:
        """Return the number of weights in these parts."""
        return sum(_parameters(file) for part in parts for file in self.weights[part])

    @property
    def files(self) -> list[Path]:
        """All files that are served, sorted by name."""
        return sorted((*self.configs, *(file for files in self.weights.values() for file in files)))


class WeightHasher:
    """Hash files with SHA-256, each in a thread of its own, from `start` on until `stop`.

    Hashing full-size weights takes longer than loading them, so it should start early.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = tuple(files)
        self._digests: dict[Path, Future[bytes]] = {}
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start hashing, unless it has started."""
        for file in self._files:
            if file not in self._digests:
                self._digests[file] = Future()
                # A daemon thread, because nothing waits for it when the process ends.
                threading.Thread(target=self._hash, args=(file,), name="hashing", daemon=True).start()

    def stop(self) -> None:
        """Stop hashing; files that are not hashed yet have no digest."""
        self._stopped.set()

    def digest(self, file: Path) -> bytes:
        """Wait for the digest of a file, and start hashing if need be. Raises MissingPart if it cannot be read."""
        self.start()
        return self._digests[file].result()

    def _hash(self, file: Path) -> None:
        try:
            self._digests[file].set_result(self._digest_of(file))
        except BaseException as error:  # noqa: BLE001  # raised again where the digest is requested
            self._digests[file].set_exception(error)

    def _digest_of(self, file: Path) -> bytes:
        digest, chunk = hashlib.sha256(), memoryview(bytearray(_CHUNK))
        try:
            with file.open("rb", buffering=0) as content:
                while read := content.readinto(chunk):
                    if self._stopped.is_set():
                        raise CancelledError
                    digest.update(chunk[:read])
        except OSError as error:
            raise _unreadable(file, error) from error
        return digest.digest()


class Experts:
    """The checked folders of both experts, or of the base alone. `hasher` hashes their files."""

    def __init__(self, base: Checkpoint, refiner: Checkpoint | None) -> None:
        self.base, self.refiner = base, refiner
        self._checkpoints = [base] if refiner is None else [base, refiner]
        self.hasher = WeightHasher(file for checkpoint in self._checkpoints for file in checkpoint.files)

    def close(self) -> None:
        """Stop hashing."""
        self.hasher.stop()

    def share(self, part: str) -> bool:
        """Whether the refiner has the same weights of a part as the base, or none of its own."""
        if self.refiner is None:
            return False
        own = self.refiner.weights.get(part)
        return own is None or self._digests(own) == self._digests(self.base.weights[part])

    def fingerprint(self) -> str:
        """Return the SHA-256 in hex over the names and contents of all files.

        Raises MissingPart if one of them cannot be read.
        """
        fingerprint = hashlib.sha256()
        for checkpoint in self._checkpoints:
            for file, digest in zip(checkpoint.files, self._digests(checkpoint.files), strict=True):
                fingerprint.update(f"{file.relative_to(checkpoint.folder).as_posix()}\0".encode() + digest)
        return fingerprint.hexdigest()

    def _digests(self, files: Iterable[Path]) -> list[bytes]:
        return [self.hasher.digest(file) for file in files]


def inspect(base: Path, refiner: Path | None) -> Experts:
    """Check the experts' folders. Raises a CheckpointError unless each has all its parts."""
    return Experts(_base(base), None if refiner is None else _refiner(refiner))


def _base(folder: Path) -> Checkpoint:
    index = _index(folder)
    if index.get("text_encoder", [None])[0] is None:
        raise WrongExpert(
            f"{folder} holds a refiner where the base belongs; give it to --refiner, and the base to --base"
        )
    base = _inspect(folder, BASE_PARTS)
    defaults(base)  # an error in them is reported now, not after the weights are loaded
    return base


def _refiner(folder: Path) -> Checkpoint:
    """Check a refiner. If it has no text encoder, it uses the base's, whose weights the published ones share."""
    index = _index(folder)
    if index.get("text_encoder", [None])[0] is not None:
        raise WrongExpert(
            f"{folder} holds a base where the refiner belongs; give it to --base, and the refiner to --refiner"
        )
    return _inspect(folder, tuple(part for part in REFINER_PARTS if part == "unet" or (folder / part).exists()))


def inspect_preview_decoder(folder: Path) -> None:
    """Raise a CheckpointError unless the folder has an AutoencoderTiny, such as TAESD, in diffusers' layout."""
    kind = _json(_required(folder / "config.json")).get("_class_name")
    if kind != "AutoencoderTiny":
        raise MissingPart(f"{folder} holds {kind or 'no class of diffusers'} where an AutoencoderTiny belongs, a TAESD")
    files = _weight_files(folder).get(None)
    if not files:
        raise MissingPart(f"{folder} has no safetensors weights; fetch it again, with its *.safetensors file")
    for file in files:
        _check_whole(file, folder)


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Defaults:
    """Default values of requests: SDXL's own, unless the base's folder has a defaults.json."""

    name: str = ""
    steps: Annotated[int, Field(ge=1, le=1000)] = 40
    guidance_scale: Annotated[float, Field(ge=0, le=50)] = 5.0
    high_noise_frac: Annotated[float, Field(gt=0, le=1)] = 0.8


def defaults(base: Checkpoint) -> Defaults:
    """Read the defaults of a base. Raises MissingPart with every error in its defaults.json."""
    file = base.folder / "defaults.json"
    if file not in base.configs:
        return Defaults()
    try:
        return TypeAdapter(Defaults).validate_json(file.read_bytes(), strict=True)
    except ValidationError as error:
        wrong = "; ".join(map(_explain_default, error.errors()))
        raise MissingPart(f"{file} cannot be used: {wrong}") from error


def _explain_default(error: ErrorDetails) -> str:
    name = ".".join(map(str, error["loc"]))
    known = ", ".join(field.name for field in dataclasses.fields(Defaults))
    if error["type"] == "unexpected_keyword_argument":
        return f'"{name}" is no default that it can set, take it out; it can set {known}'
    if not name:
        return f"it must be a JSON object of {known}"
    rule = error["msg"].removeprefix("Input should be ")
    return f'"{name}" must be {rule}, not {json.dumps(error["input"])}'


def _index(folder: Path) -> dict[str, Any]:
    file = folder / "model_index.json"
    if not file.is_file():
        problem = "is no checkpoint, since it has no model_index.json" if folder.exists() else "does not exist"
        raise MissingPart(
            f"{folder} {problem}; give the folder that `hf download` or `git clone` of a model in the diffusers layout "
            "leaves"
        )
    return _json(file)


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise MissingPart(f"{file} cannot be read as JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(content, dict):
        raise MissingPart(f"{file} holds no JSON object; fetch the checkpoint again")
    return content


def _inspect(folder: Path, parts: tuple[str, ...]) -> Checkpoint:
    found = {part: _weight_files(folder / part) for part in parts}
    for part, variants in found.items():
        if not variants:
            raise MissingPart(
                f"{folder / part} has no safetensors weights; fetch the checkpoint again, with its *.safetensors files"
            )
    variant = "fp16" if all("fp16" in variants for variants in found.values()) else None
    for part, variants in found.items():
        if variant not in variants:
            raise MissingPart(f"{folder / part} has its weights in fp16 only, unlike other parts; fetch all of them")
    weights = {part: variants[variant] for part, variants in found.items()}
    for files in weights.values():
        for file in files:
            _check_whole(file, folder)
    configs = tuple(_config_files(folder, parts))
    for file in configs:
        if file.suffix == ".json":
            _json(file)
    return Checkpoint(folder, variant, weights, configs)


def _weight_files(part: Path) -> dict[str | None, tuple[Path, ...]]:
    """Return the safetensors files of a part by variant, "fp16" or None, sorted by name."""
    variants: dict[str | None, list[Path]] = {}
    shards: dict[str | None, int] = {}
    for file in sorted(part.glob("*.safetensors")):
        if name := _WEIGHTS.fullmatch(file.name):
            variant = "fp16" if name["fp16"] else None
            variants.setdefault(variant, []).append(file)
            shards[variant] = int(name["shards"] or 1)
    for variant, files in variants.items():
        if len(files) != shards[variant]:
            raise MissingPart(f"{part} has {len(files)} of {shards[variant]} weights files; fetch the checkpoint again")
    return {variant: tuple(files) for variant, files in variants.items()}


def _config_files(folder: Path, parts: Iterable[str]) -> Iterable[Path]:
    yield folder / "model_index.json"
    for part in parts:
        yield _required(folder / part / "config.json")
        if tokenizer := _TOKENIZERS.get(part):
            yield _required(folder / tokenizer / "tokenizer_config.json")
            if (whole := folder / tokenizer / "tokenizer.json").is_file():
                yield whole
            else:
                yield _required(folder / tokenizer / "vocab.json")
                yield _required(folder / tokenizer / "merges.txt")
    yield _required(folder / "scheduler" / "scheduler_config.json")
    if (defaults := folder / "defaults.json").is_file():
        yield defaults


def _required(file: Path) -> Path:
    if not file.is_file():
        raise MissingPart(f"{file} is missing; fetch the checkpoint again")
    return file


def _check_whole(file: Path, clone: Path) -> None:
    try:
        with file.open("rb") as content:
            begin = content.read(len(_LFS))
    except OSError as error:
        raise _unreadable(file, error) from error
    if begin == _LFS:
        raise GitLfsPointer(
            f"{file} is a git-lfs pointer instead of weights; run `git lfs install` and then `git lfs pull` in {clone}"
        )
    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise TruncatedFile(f"{file} is not whole ({error}); fetch it again") from error


def _parameters(file: Path) -> int:
    with safe_open(file, framework="numpy") as tensors:
        shapes = (tensors.get_slice(name).get_shape() for name in tensors.keys())  # noqa: SIM118  # not a mapping
        return sum(math.prod(shape) for shape in shapes)


def _unreadable(file: Path, error: OSError) -> MissingPart:
    return MissingPart(f"{file} cannot be read ({error.strerror}); fetch the checkpoint again")
