"""Data that all packages of the server share: the request, the caller, the served model, warnings.

Plain data without gRPC, torch or a queue: api/requests.py fills it in, the engine carries it, model.py uses it.
"""

import enum
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

# Width and height for a model trained on 1024 x 1024 (SDXL, Podell et al., 2023, appendix I); wide ratios mirror tall.
_TALL = {"9:21": (672, 1600), "9:16": (768, 1344), "2:3": (768, 1152), "4:5": (912, 1136), "1:1": (1024, 1024)}
ASPECT_RATIOS = _TALL | {":".join(reversed(name.split(":"))): size[::-1] for name, size in _TALL.items()}

CODING_VERSION = "2"
"""The version of the codings in api/images.py, a part of an image's environment."""

_REQUEST_ID_CHARACTERS = "A-Za-z0-9._:/-"


def is_request_id(text: str) -> bool:
    """Return whether `text` is a request id: 1 to 128 characters that are safe in a log."""
    return re.fullmatch(f"[{_REQUEST_ID_CHARACTERS}]{{1,128}}", text) is not None


def sanitized_request_id(text: str) -> str:
    """Return `text` as far as a request id can have it: "_" replaces other characters, the first 128 are kept."""
    return re.sub(f"[^{_REQUEST_ID_CHARACTERS}]", "_", text)[:128]


class Stage(enum.StrEnum):
    """A stage of making an image. BASE and REFINER are the two experts of the ensemble."""

    ENCODE = "encode"
    BASE = "base"
    REFINER = "refiner"
    DECODE = "decode"


EXPERTS = (Stage.BASE, Stage.REFINER)


class Notice(enum.StrEnum):
    """The reason of a warning."""

    PROMPT_TRUNCATED = "prompt_truncated"
    SIZE_SNAPPED = "size_snapped"
    IMAGE_RECODED = "image_recoded"
    EXPERT_IDLE = "expert_idle"
    OPTION_UNUSED = "option_unused"
    PRIORITY_LOWERED = "priority_lowered"
    BATCH_REDUCED = "batch_reduced"


@dataclass(frozen=True)
class Warning:
    """A value that was changed or dropped: `field` in JSON names, `message` one sentence for people."""

    notice: Notice
    field: str
    message: str


@dataclass(frozen=True)
class Caller:
    """The caller of a request. The device is shared fairly between names.

    Only the `owner` of a detached job can find it; "" owns the jobs of all callers without a token. `jobs` at once and
    `max_priority`, if given, replace the limits of the settings.
    """

    name: str
    owner: str = ""
    jobs: int | None = None
    max_priority: int | None = None


@dataclass(frozen=True)
class ImageRequest:
    """A valid request with every default filled in.

    `seeds` has one entry per image, each in 0 .. 2^32 - 1. `steps` counts both experts together; `high_noise_frac` in
    (0, 1] is the base's share of the noise schedule, 1 for the base alone. `guidance_scale` of 1 or less means no
    classifier-free guidance. `width` and `height` are pixels, multiples of `ModelInfo.side_multiple`.
    """

    prompt: str
    negative_prompt: str
    seeds: tuple[int, ...]
    steps: int
    guidance_scale: float
    high_noise_frac: float
    scheduler: str
    width: int
    height: int


@dataclass(frozen=True)
class Environment:
    """Everything that decides an image's bytes, apart from its request and the weights.

    proto/text_to_image.proto documents the fields. `reference` is empty until the first image is made.
    """

    versions: Mapping[str, str]
    hardware: str
    precision: str
    fp32_math: str
    threads: int
    max_batch: int
    compiled: str
    reference: str = ""

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex over all fields, as JSON with sorted keys."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ContentFilterInfo:
    """The content filter. It replaces images with a score of `threshold` or more, out of 1."""

    name: str
    threshold: float


@dataclass(frozen=True)
class ModelInfo:
    """The served model. It was trained on squares of `native_side` pixels; sides are multiples of `side_multiple`.

    `compiled_calls` network calls, each for one shape, were compiled in `compile_seconds`.
    """

    name: str
    fingerprint: str
    has_refiner: bool
    device: str
    precision: str
    schedulers: tuple[str, ...]
    native_side: int
    side_multiple: int
    default_steps: int
    default_guidance_scale: float
    default_high_noise_frac: float
    default_scheduler: str
    environment: Environment
    content_filter: ContentFilterInfo | None = None
    compiled_calls: int = 0
    compile_seconds: float = 0.0


class StepFailed(Exception):
    """Some images of one step failed permanently; the others have advanced as if they had been alone.

    `failures` has the cause of each, by its index in the list of the step.
    """

    def __init__(self, failures: Mapping[int, Exception]) -> None:
        super().__init__("; ".join(f"image {index} of the step: {cause}" for index, cause in failures.items()))
        self.failures = failures


class OutOfMemory(Exception):
    """A call of the model did not fit in the device's memory. It changed nothing, and a smaller one may fit."""


def size_of(aspect_ratio: str, native_side: int, multiple: int) -> tuple[int, int]:
    """Return width and height in pixels of an aspect ratio, for a model trained on squares of `native_side`."""
    width, height = (side * native_side / 1024 for side in ASPECT_RATIOS[aspect_ratio])
    return snapped(width, multiple), snapped(height, multiple)


def default_request(info: ModelInfo, prompt: str, seed: int = 0) -> ImageRequest:
    """Return the request for one image with all defaults."""
    width, height = size_of("1:1", info.native_side, info.side_multiple)
    return ImageRequest(
        prompt=prompt,
        negative_prompt="",
        seeds=(seed,),
        steps=info.default_steps,
        guidance_scale=info.default_guidance_scale,
        high_noise_frac=info.default_high_noise_frac,
        scheduler=info.default_scheduler,
        width=width,
        height=height,
    )


def snapped(side: float, multiple: int) -> int:
    """Return the nearest multiple, at least one."""
    return max(1, round(side / multiple)) * multiple
