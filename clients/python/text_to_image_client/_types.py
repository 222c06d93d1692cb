"""The types of requests and answers: options, images, results, events and the served model.

Answers are frozen dataclasses. Times are in seconds, sizes in pixels. Notebooks render images and results.
"""

import base64
import enum
import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

from ._files import write_atomically

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
    """The file format of an image, with its coding."""

    JPEG = "jpeg"
    PNG = "png"
    WEBP = "webp"
    JPEG_SUBSAMPLED = "jpeg_subsampled"
    """A smaller JPEG: colour at half the resolution (4:2:0)."""
    WEBP_LOSSLESS = "webp_lossless"
    """Lossless, and smaller than a PNG."""
    JPEG_RGB = "jpeg_rgb"
    """A JPEG in RGB, as Instill's answers are. Some decoders show it in wrong colours."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The file name endings of this format, the usual one first."""
        return _suffixes(self.partition("_")[0])

    @classmethod
    def of(cls, path: Path) -> "Format | None":
        """Return the format of the file name ending of `path`: JPEG, PNG, WEBP, or None for any other."""
        return next((each for each in cls if path.suffix.lower() in each.suffixes), None)


class OnDisconnect(enum.StrEnum):
    """What the server does with a job when its caller disconnects."""

    CANCEL = "cancel"
    """End the job."""
    DETACH = "detach"
    """Finish the job and keep it for a time: `attach` follows it, `cancel` ends it, an equal request joins it."""


class GenerateOptions(TypedDict, total=False):
    """The options of a request. An option that is absent or None has the served model's default.

    `model()` returns the model's defaults and limits. The server checks the ranges.
    """

    negative_prompt: str | None
    """Text to steer away from by classifier-free guidance. Default ""."""
    aspect_ratio: str | None
    """Width to height: 16:9, 1:1, 21:9, 2:3, 3:2, 4:5, 5:4, 9:16 or 9:21. Default 1:1. Not with width and height."""
    n: int | None
    """Number of images, 1 to `limits.max_images`. Default 1."""
    seed: int | None
    """0 to 2^32 - 1. Image k of n has the seed `seed + k`. Default: random; `Image.seed` reports it."""
    steps: int | None
    """Denoising steps of both experts together, 1 to `limits.max_steps`. Default: `defaults.steps`."""
    guidance_scale: float | None
    """Weight of classifier-free guidance, 0 to 50. 1 or less turns guidance off."""
    high_noise_frac: float | None
    """The base expert's share of the noise schedule, above 0 and at most 1. 1 turns the refiner off."""
    scheduler: str | None
    """One of `ModelInfo.schedulers`."""
    width: int | None
    """Pixels, `limits.min_side` to `limits.max_side`; needs height. The server snaps it to a multiple of
    `limits.side_multiple`, with a warning."""
    height: int | None
    """Pixels, as for width."""
    format: Format | str | None
    """One of `Format`: "jpeg", "png" and so on. Default "jpeg"."""
    quality: int | None
    """Quality of lossy formats, 1 to 100. Default 95."""
    model: str | None
    """The expected name of the served model; another name is InvalidRequest. Default: not checked."""
    request_id: str | None
    """The caller's name for this request: up to 128 characters of A-Z a-z 0-9 . _ : / -. Default: a random UUID."""
    priority: int | None
    """-2 to 2. Each step up counts as if the job were four times shorter. Default 0; at most `limits.max_priority`."""
    on_disconnect: OnDisconnect | str | None
    """One of `OnDisconnect`. Default "cancel"; "detach" needs a request_id."""
    preview_interval: int | None
    """U-Net calls of an image between `Preview` events. Default 0: no previews. `generate` ignores it."""


class Request(GenerateOptions, total=False):
    """A whole request as keyword arguments of `generate` and `stream`: client.generate(**request).

    It always has a prompt. The type does not require one, because pyright checks the right side of
    `request | {"seed": 8}` against the type of the left side.
    """

    prompt: str


@dataclass(frozen=True)
class Image:
    """One finished image, and the request that reproduces it: client.generate(**image.request)."""

    data: bytes = field(repr=False)
    """The bytes of the image file, in the format of `media_type`."""
    media_type: str
    """"image/jpeg", "image/png" or "image/webp"."""
    finish_reason: str
    """"success", or "content_filtered" if the content filter replaced the image by plain grey."""
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
    """The request for this image alone, with all defaults filled in and the format in which it came."""
    sha256: str
    """SHA-256 of `data`, in hex, computed by the server."""

    @property
    def format(self) -> Format | str:
        """JPEG, PNG or WEBP; for a media type that is newer than this client, its subtype as text."""
        subtype = self.media_type.removeprefix("image/")
        return Format(subtype) if subtype in list(Format) else subtype

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The file name endings of the image's format, the usual one first."""
        return _suffixes(self.format)

    @property
    def data_uri(self) -> str:
        """ "data:image/jpeg;base64,..."."""
        return f"data:{self.media_type};base64,{self._base64()}"

    def save(self, path: str | Path) -> Path:
        """Write `data` to `path` and return the path.

        The write is atomic: on a full disk the old file stays. The image is never recoded, so a name that ends in
        another format's ending raises ValueError. Raises OSError if the file cannot be written.
        """
        return _write(Path(path), self.data, self.format)

    def _base64(self) -> str:
        return base64.b64encode(self.data).decode("ascii")

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        bundle = {"text/plain": repr(self), "text/html": self._repr_html_()}
        if self.format in (Format.JPEG, Format.PNG):  # notebooks render other formats only as HTML
            bundle[self.media_type] = self._base64()
        return bundle

    def _repr_html_(self) -> str:
        return f'<img src="{self.data_uri}" width="{self.width}" height="{self.height}" alt="seed {self.seed}">'


def _suffixes(subtype: str) -> tuple[str, ...]:
    return (".jpg", ".jpeg") if subtype == "jpeg" else (f".{subtype}",)


def _write(path: Path, data: bytes, format_: str) -> Path:
    suffixes = _suffixes(format_)
    if path.suffix.lower() not in suffixes:
        named = path.with_suffix(suffixes[0]).name if path.name else f"cat{suffixes[0]}"
        raise ValueError(f"{path} cannot hold an image/{format_}: name it {named}, or ask for another format")
    return write_atomically(path, data)


class WarningCode(enum.StrEnum):
    """The kind of a `Warning`: what the server changed or dropped."""

    UNSPECIFIED = "unspecified"
    """A kind that is newer than this client."""
    PROMPT_TRUNCATED = "prompt_truncated"
    SIZE_SNAPPED = "size_snapped"
    IMAGE_RECODED = "image_recoded"
    EXPERT_IDLE = "expert_idle"
    OPTION_UNUSED = "option_unused"
    PRIORITY_LOWERED = "priority_lowered"
    BATCH_REDUCED = "batch_reduced"
    """Memory ran out, and later U-Net calls had smaller batches, which can change the image's last bits."""


@dataclass(frozen=True)
class Warning:
    """One change that the server made to a request: `field` is its JSON path, `message` one sentence."""

    code: WarningCode
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


@dataclass(frozen=True)
class Environment:
    """The properties of the server that determine an image's bytes, in addition to the request and the weights."""

    fingerprint: str
    """SHA-256 in hex over all other fields. Equal environments and weights give equal bytes."""
    versions: Mapping[str, str]
    """The versions of the server and of the libraries that compute and encode, by name."""
    hardware: str
    """The name of the GPU, or of the processor with the instruction set in use."""
    precision: str
    """"fp32", "bf16", "fp16" or "fp8"."""
    fp32_math: str
    """The arithmetic of fp32 products: "matmul ieee, convolution tf32"."""
    threads: int
    """Threads of a CPU operator; 0 on other devices."""
    max_batch: int
    """The largest number of images in a U-Net call, which determines the shape of the call."""
    compiled: str
    """How the networks run, and for which image sizes: "off", "blocks for 1024x1024" or "blocks for all sizes". A
    service that compiles while it serves changes it once."""
    reference: str
    """SHA-256 in hex of the pixels of a reference image. The server draws it before it serves, and again after it
    compiled. So it also shows differences that the other fields do not list."""


@dataclass(frozen=True)
class Result:
    """The answer to one request."""

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
    """The contract's Metadata message as JSON, as grpcurl prints it. `Provenance` reads it."""

    def to_instill(self) -> dict[str, Any]:
        """Return the output of Instill AI's TASK_TEXT_TO_IMAGE."""
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
    """The network that works on an image: text encoders, base expert, refiner expert or autoencoder."""

    ENCODE = "encode"
    BASE = "base"
    REFINER = "refiner"
    DECODE = "decode"


@dataclass(frozen=True)
class Queued:
    """The request is admitted, and `position` others finish first. Sent again when position or ETA change."""

    position: int
    eta: float | None
    """Estimated seconds until the last image."""
    number: int = 0
    """The number of the event in its job, from 1; 0 from a service that numbers no events."""


@dataclass(frozen=True)
class Progress:
    """A network call ended: number `step` of the `steps` that image `choice_index` needs in this stage."""

    choice_index: int
    stage: Stage
    step: int
    steps: int
    eta: float | None
    """Estimated seconds until the last image."""
    number: int = 0
    """See `Queued.number`."""


@dataclass(frozen=True)
class Preview:
    """A small preview of image `choice_index` after `step` of `steps` U-Net calls."""

    choice_index: int
    step: int
    steps: int
    image: bytes = field(repr=False)
    """A JPEG file."""
    number: int = 0
    """See `Queued.number`."""

    def save(self, path: str | Path) -> Path:
        """Write the JPEG as `Image.save` does. Raises ValueError unless the name ends in .jpg or .jpeg."""
        return _write(Path(path), self.image, Format.JPEG)

    def _repr_jpeg_(self) -> bytes:
        return self.image


@dataclass(frozen=True)
class ImageReady:
    """Image `choice_index` of the request, counted from 0, is finished."""

    choice_index: int
    image: Image
    number: int = 0
    """See `Queued.number`."""


@dataclass(frozen=True)
class Done:
    """The last event, with the Result that `generate` returns."""

    result: Result
    number: int = 0
    """See `Queued.number`."""


Event: TypeAlias = Queued | Progress | Preview | ImageReady | Done


@dataclass(frozen=True)
class Defaults:
    """The served model's values for options that a request leaves out."""

    steps: int
    guidance_scale: float
    high_noise_frac: float
    scheduler: str
    aspect_ratio: str


@dataclass(frozen=True)
class Limits:
    """The limits of a request, and of the server's queue. Sides in pixels."""

    max_images: int
    max_steps: int
    max_prompt_characters: int
    min_side: int
    max_side: int
    max_pixels: int
    side_multiple: int
    """Width and height are multiples of this many pixels."""
    max_queue: int
    """Requests that are admitted at the same time."""
    max_priority: int
    """The server lowers higher priorities to this one."""
    retention: float
    """Seconds for which the server keeps a detached job after its end, as long as it has room."""


@dataclass(frozen=True)
class ContentFilter:
    """The filter that scores images from 0 to 1. The server replaces those of `threshold` or more by plain grey."""

    name: str
    threshold: float


@dataclass(frozen=True)
class ModelInfo:
    """The served model."""

    name: str
    fingerprint: str
    """SHA-256 of all weights and configuration files, in hex."""
    has_refiner: bool
    device: str
    """"cuda", "mps" or "cpu"."""
    precision: str
    """"fp32", "bf16", "fp16" or "fp8"."""
    schedulers: tuple[str, ...]
    defaults: Defaults
    limits: Limits
    sizes: Mapping[str, tuple[int, int]]
    """Width and height by aspect ratio."""
    environment: Environment
    content_filter: ContentFilter | None = None
    """None if the server filters no images."""


class ServingStatus(enum.StrEnum):
    """The status of a service by grpc.health.v1. UNKNOWN is also a status that is newer than this client."""

    UNKNOWN = "UNKNOWN"
    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"
    SERVICE_UNKNOWN = "SERVICE_UNKNOWN"
