"""What comes back: images, results, events and the served model, as frozen dataclasses.

Times are in seconds, sizes in pixels. Images and results show themselves in a notebook.
"""

import base64
import enum
import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

from ._files import write_whole

__all__ = [
    "ContentFilter",
    "Defaults",
    "Done",
    "Environment",
    "Event",
    "Format",
    "GenerateOptions",
    "Image",
    "ImageReady",
    "Limits",
    "ModelInfo",
    "OnDisconnect",
    "Preview",
    "Progress",
    "Queued",
    "Request",
    "Result",
    "ServingStatus",
    "Stage",
    "Warning",
    "WarningCode",
]


class Format(enum.StrEnum):
    """How an image is coded."""

    JPEG = "jpeg"
    PNG = "png"
    WEBP = "webp"
    JPEG_SUBSAMPLED = "jpeg_subsampled"
    """A smaller JPEG, with colour at half the resolution."""
    WEBP_LOSSLESS = "webp_lossless"
    """Smaller than a PNG, and every pixel kept."""
    JPEG_RGB = "jpeg_rgb"
    """A JPEG that keeps RGB, as Instill's answers are. Some decoders show it in wrong colours."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """File name endings of this format, the usual one first."""
        kind = self.partition("_")[0]
        return (".jpg", ".jpeg") if kind == "jpeg" else (f".{kind}",)

    @classmethod
    def of(cls, path: Path) -> "Format | None":
        """The format that the name of `path` promises: JPEG, PNG or WEBP."""
        return next((each for each in cls if path.suffix.lower() in each.suffixes), None)


class OnDisconnect(enum.StrEnum):
    """What becomes of a job when its caller goes."""

    CANCEL = "cancel"
    DETACH = "detach"
    """It goes on, and is kept for a while: `attach` follows it, `cancel` ends it, the same request joins it."""


class GenerateOptions(TypedDict, total=False):
    """What a request may say beside its prompt. An option that is absent or None has the served model's default.

    `model()` tells the defaults and limits that hold; the server checks them.
    """

    negative_prompt: str | None
    """What to steer away from. Default ""."""
    aspect_ratio: str | None
    """Width to height: 16:9, 1:1, 21:9, 2:3, 3:2, 4:5, 5:4, 9:16 or 9:21. Default 1:1. Not with width and height."""
    n: int | None
    """Number of images, 1 to `limits.max_images`. Default 1."""
    seed: int | None
    """0 to 2^32 - 1; image k of n is drawn from seed + k. Default: random, and told in `Image.seed`."""
    steps: int | None
    """Denoising steps of both experts together, 1 to `limits.max_steps`."""
    guidance_scale: float | None
    """Weight of classifier-free guidance, 0 to 50. At 1 or less there is none."""
    high_noise_frac: float | None
    """The base expert's share of the noise schedule, above 0 and at most 1; 1 leaves the refiner out."""
    scheduler: str | None
    """One of `ModelInfo.schedulers`."""
    width: int | None
    """Pixels, `limits.min_side` to `limits.max_side`; needs height. Snapped to what the model can make, with a
    warning."""
    height: int | None
    """As width."""
    format: Format | str | None
    """One of `Format`: "jpeg", "png" and so on. Default "jpeg"."""
    quality: int | None
    """Quality of the formats that lose something, 1 to 100. Default 95."""
    model: str | None
    """The served model's name, to be sure of it. Default: whichever is served."""
    request_id: str | None
    """Your own name for this request: up to 128 of A-Z a-z 0-9 . _ : / -. Default: a random UUID."""
    priority: int | None
    """-2 to 2: each step up counts as if the job were four times shorter. Default 0; at most `limits.max_priority`."""
    on_disconnect: OnDisconnect | str | None
    """One of `OnDisconnect`. Default "cancel"; "detach" needs a request_id."""
    preview_interval: int | None
    """A `Preview` event for every so many network calls of an image. Default 0, none. Not of `generate`."""


class Request(GenerateOptions, total=False):
    """A whole request, the keyword arguments of `generate` and `stream`: client.generate(**request).

    It always has a prompt. To type checkers it need not have one, so that they take `request | {"seed": 8}`: pyright
    checks the right side against the type of the left one.
    """

    prompt: str


@dataclass(frozen=True)
class Image:
    """One finished image, and all that is needed to make it again: client.generate(**image.request)."""

    data: bytes = field(repr=False)
    """The file's bytes, coded as `media_type` says."""
    media_type: str
    """"image/jpeg", "image/png" or "image/webp"."""
    finish_reason: str
    """"success", or "content_filtered": the service's content filter objected, and this is plain grey."""
    seed: int
    width: int
    height: int
    steps: int
    guidance_scale: float
    high_noise_frac: float
    scheduler: str
    base_calls: int
    """Network calls of the base expert."""
    refiner_calls: int
    """Network calls of the refiner."""
    request: Request
    """What asks for this image alone, every default filled in, coded as it came."""
    sha256: str
    """SHA-256 of `data`, in hex, as the server tells it."""

    @property
    def format(self) -> Format:
        """JPEG, PNG or WEBP."""
        return Format(self.media_type.removeprefix("image/"))

    @property
    def data_uri(self) -> str:
        """ "data:image/jpeg;base64,..."."""
        return f"data:{self.media_type};base64,{self._base64()}"

    def save(self, path: str | Path) -> Path:
        """Write the image as it is, byte for byte, and return the path.

        The file is whole or not there: on a full disk, what was there before stays. Raises ValueError if the name
        promises another format, since an image is never coded again behind your back, and OSError.
        """
        return _write(Path(path), self.data, self.format)

    def _base64(self) -> str:
        return base64.b64encode(self.data).decode("ascii")

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        bundle = {"text/plain": repr(self), "text/html": self._repr_html_()}
        if self.format is not Format.WEBP:  # which notebooks know only as HTML
            bundle[self.media_type] = self._base64()
        return bundle

    def _repr_html_(self) -> str:
        return f'<img src="{self.data_uri}" width="{self.width}" height="{self.height}" alt="seed {self.seed}">'


def _write(path: Path, data: bytes, format_: Format) -> Path:
    if Format.of(path) is not format_:
        named = path.with_suffix(format_.suffixes[0]).name if path.name else f"cat{format_.suffixes[0]}"
        raise ValueError(f"{path} cannot hold an image/{format_}: name it {named}, or ask for another format")
    return write_whole(path, data)


class WarningCode(enum.StrEnum):
    """Why an answer is not to the letter of its request."""

    UNSPECIFIED = "unspecified"
    PROMPT_TRUNCATED = "prompt_truncated"
    SIZE_SNAPPED = "size_snapped"
    IMAGE_RECODED = "image_recoded"
    EXPERT_IDLE = "expert_idle"
    OPTION_UNUSED = "option_unused"
    PRIORITY_LOWERED = "priority_lowered"
    BATCH_REDUCED = "batch_reduced"
    """Memory ran out, and later network calls had fewer rows, which can change the image's last bits."""


@dataclass(frozen=True)
class Warning:
    """One thing that was changed or dropped: `field` in the request's JSON names, `message` one sentence."""

    code: WarningCode
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


@dataclass(frozen=True)
class Environment:
    """What decides an image's bytes beside its request and the weights."""

    fingerprint: str
    """SHA-256 in hex over all that follows. Equal environments and weights make equal bytes."""
    versions: Mapping[str, str]
    """Of the server and the libraries that compute and code, by name."""
    hardware: str
    """The GPU's name, or the processor's with the instruction set in use."""
    precision: str
    """"fp32", "bf16", "fp16" or "fp8"."""
    fp32_math: str
    """How products of fp32 numbers are computed: "matmul ieee, convolution tf32"."""
    threads: int
    """Threads that share a computation on the CPU; 0 on other devices."""
    max_batch: int
    """Images that can share a network call, whose shape that decides."""
    compiled: str
    """How networks are compiled, and for images of which sizes: "off", or "blocks for 1024x1024". A service that
    compiles while it serves tells the one, and later the other."""
    reference: str
    """SHA-256 in hex of an image that every server draws before it serves, and anew when it has compiled since:
    measured, where the rest is told."""


@dataclass(frozen=True)
class Result:
    """The whole answer to one request."""

    images: tuple[Image, ...]
    warnings: tuple[Warning, ...]
    request_id: str
    model: str
    fingerprint: str
    """SHA-256 of the served weights and configuration, in hex."""
    environment: Environment
    waited: float
    """Seconds from admission to the first network call."""
    ran: float
    """Seconds from the first network call to the last."""
    metadata: Mapping[str, Any] = field(repr=False)
    """The contract's Metadata message as JSON has it, which is also what grpcurl prints. `Provenance` reads it."""

    def to_instill(self) -> dict[str, Any]:
        """The output of Instill AI's TASK_TEXT_TO_IMAGE."""
        return {
            "data": {
                "choices": [{"finish-reason": image.finish_reason, "image": image.data_uri} for image in self.images]
            }
        }

    def _repr_html_(self) -> str:
        figures = "".join(
            f'<figure style="margin:0">{image._repr_html_()}<figcaption>seed {image.seed}</figcaption></figure>'
            for image in self.images
        )
        warnings = "".join(f"<p>{html.escape(str(warning))}</p>" for warning in self.warnings)
        return f'<div style="display:flex;flex-wrap:wrap;gap:1em">{figures}</div>{warnings}'


class Stage(enum.StrEnum):
    """Where an image is on its way. BASE and REFINER are the two experts of the ensemble."""

    ENCODE = "encode"
    BASE = "base"
    REFINER = "refiner"
    DECODE = "decode"


@dataclass(frozen=True)
class Queued:
    """The request was admitted; the device will finish `position` others first. Told again when that has changed."""

    position: int
    eta: float | None
    """Estimated seconds until the last image."""
    number: int = 0
    """The event's place among all events of its job, from 1. 0: the service is too old to tell."""


@dataclass(frozen=True)
class Progress:
    """One call of a network has ended: `step` of the `steps` that image `choice_index` needs in this stage."""

    choice_index: int
    stage: Stage
    step: int
    steps: int
    eta: float | None
    """Estimated seconds until the last image."""
    number: int = 0
    """As in Queued."""


@dataclass(frozen=True)
class Preview:
    """What image `choice_index` is about to become, after `step` of `steps` network calls: a small picture."""

    choice_index: int
    step: int
    steps: int
    image: bytes = field(repr=False)
    """A JPEG."""
    number: int = 0
    """As in Queued."""

    def save(self, path: str | Path) -> Path:
        """Write the picture as `Image.save` does. Raises ValueError unless the name promises a JPEG."""
        return _write(Path(path), self.image, Format.JPEG)

    def _repr_jpeg_(self) -> bytes:
        return self.image


@dataclass(frozen=True)
class ImageReady:
    """Image `choice_index` of the request, counted from 0, is finished."""

    choice_index: int
    image: Image
    number: int = 0
    """As in Queued."""


@dataclass(frozen=True)
class Done:
    """The last event: the same Result that `generate` would have returned."""

    result: Result
    number: int = 0
    """As in Queued."""


Event: TypeAlias = Queued | Progress | Preview | ImageReady | Done


@dataclass(frozen=True)
class Defaults:
    """What a request gets where it says nothing."""

    steps: int
    guidance_scale: float
    high_noise_frac: float
    scheduler: str
    aspect_ratio: str


@dataclass(frozen=True)
class Limits:
    """What a request may ask for, and how many are admitted at once."""

    max_images: int
    max_steps: int
    max_prompt_characters: int
    min_side: int
    max_side: int
    max_pixels: int
    side_multiple: int
    """Width and height are multiples of this many pixels."""
    max_queue: int
    max_priority: int
    """Priorities above it are lowered to it."""
    retention: float
    """Seconds for which a detached job is kept after its end, as long as there is room."""


@dataclass(frozen=True)
class ContentFilter:
    """What judges images before they are sent: one that it scores `threshold` or more, of 1, is replaced by grey."""

    name: str
    threshold: float


@dataclass(frozen=True)
class ModelInfo:
    """What is served."""

    name: str
    fingerprint: str
    """SHA-256 over all weights and configuration files, in hex."""
    has_refiner: bool
    device: str
    """"cuda", "mps" or "cpu"."""
    precision: str
    """"fp32", "bf16", "fp16" or "fp8"."""
    schedulers: tuple[str, ...]
    defaults: Defaults
    limits: Limits
    sizes: Mapping[str, tuple[int, int]]
    """Width and height of every aspect ratio."""
    environment: Environment
    content_filter: ContentFilter | None = None
    """None where images are not judged."""


class ServingStatus(enum.StrEnum):
    """The answer of grpc.health.v1."""

    UNKNOWN = "UNKNOWN"
    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"
    SERVICE_UNKNOWN = "SERVICE_UNKNOWN"
