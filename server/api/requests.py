"""Requests: check a message whole, report every violation at once, fill in the defaults.

Pure functions over the generated messages; proto/text_to_image.proto documents the fields.
"""

import dataclasses
import math
import secrets
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from google.protobuf.message import Message

from server.api import images
from server.api.errors import InvalidRequest, Violation
from server.domain import (
    ASPECT_RATIOS,
    Caller,
    ImageRequest,
    ModelInfo,
    Notice,
    Warning,
    is_request_id,
    size_of,
    snapped,
)
from server.engine.interface import Submission
from server.settings import Settings
from text_to_image_client.v1 import text_to_image_pb2 as pb

_T = TypeVar("_T")

CODINGS = {pb.Format.Value(f"FORMAT_{name}"): coding for name, coding in images.CODINGS.items()} | {
    pb.FORMAT_UNSPECIFIED: images.JPEG
}

DEFAULT_MESSAGE_BYTES = 4 * 1024 * 1024
"""The largest message that a gRPC client takes by default."""
_MIN_MESSAGE_BYTES, _MAX_MESSAGE_BYTES = 16 * 1024, 64 * 1024 * 1024
# Reserved in a message for everything but images, and per image for its metadata (without the prompts) and a warning.
_ENVELOPE_BYTES, _ENVELOPE_BYTES_PER_IMAGE = 8 * 1024, 512

UNREADABLE_TEXT = "?"
"""The stand-in for a prompt that cannot be read: the other rules are checked, and its absence breaks none."""


@dataclass(frozen=True)
class Output:
    """The coding of the images. A preview follows every `preview_interval` network calls; 0 means never."""

    coding: images.Coding
    quality: int
    raw: bool
    max_message_bytes: int
    preview_interval: int = 0


@dataclass(frozen=True)
class ParsedRequest:
    """A valid request with its defaults filled in, by whom and of which model it was asked.

    A job that is `detached` outlives its callers. It must end within `timeout` seconds of its admission.
    `images_per_message` images share the space of one message. `warnings` report what was changed or has no effect.
    """

    message: pb.GenerateRequest
    request_id: str
    info: ModelInfo
    caller: Caller
    image: ImageRequest
    output: Output
    warnings: tuple[Warning, ...]
    timeout: float = math.inf
    priority: int = 0
    detached: bool = False
    images_per_message: int = 1

    @property
    def submission(self) -> Submission:
        """The job that the engine runs for this request."""
        return Submission(
            self.request_id, self.image, self.caller, self.timeout, self.priority, self.output.preview_interval
        )


@dataclass(frozen=True)
class RequestLimits:
    """The limits that follow from the model and the settings. Sides in pixels, `retention` in seconds."""

    max_images: int
    max_steps: int
    max_prompt_characters: int
    min_side: int
    max_side: int
    max_pixels: int
    side_multiple: int
    max_queue: int
    max_priority: int
    retention: float


def limits_of(info: ModelInfo, settings: Settings) -> RequestLimits:
    """Return a server's limits: sides from a quarter to four times the model's own, an area of `max_pixels`."""
    return RequestLimits(
        max_images=settings.max_images,
        max_steps=settings.max_steps,
        max_prompt_characters=settings.max_prompt_characters,
        min_side=snapped(info.native_side / 4, info.side_multiple),
        max_side=4 * info.native_side,
        max_pixels=settings.max_pixels or 4 * info.native_side**2,
        side_multiple=info.side_multiple,
        max_queue=settings.max_queue,
        max_priority=settings.max_priority,
        retention=settings.retention_seconds,
    )


def request_id_of(message: pb.GenerateRequest) -> str | None:
    """Return the request's id, a new one if it has none, or None if its id must not be logged."""
    return job_name_of(message) if message.request_id else str(uuid.uuid4())


def job_name_of(message: pb.GenerateRequest | pb.AttachRequest | pb.CancelRequest) -> str | None:
    """Return the request id in `message`, or None if there is none that may be logged."""
    return message.request_id if is_request_id(message.request_id) else None


def random_seed() -> int:
    """Return a seed of 32 bits."""
    return secrets.randbits(32)


@dataclass
class _Findings:
    """The violations and warnings of one request."""

    violations: list[Violation] = field(default_factory=list)
    warnings: list[Warning] = field(default_factory=list)

    def require(self, holds: bool, field: str, description: str) -> None:
        if not holds:
            self.violations.append(Violation(field, description))

    def warn(self, notice: Notice, field: str, message: str) -> None:
        self.warnings.append(Warning(notice, field, message))


def parse(
    message: pb.GenerateRequest,
    request_id: str | None,
    info: ModelInfo,
    limits: RequestLimits,
    caller: Caller,
    timeout: float = math.inf,
    draw_seed: Callable[[], int] = random_seed,
) -> ParsedRequest:
    """Check a request and fill in its defaults. Raises InvalidRequest with all violations.

    `request_id` comes from `request_id_of(message)` or from the protocol that the message was translated from.
    """
    found = _Findings()
    _check_data(message, info, limits, found)
    _check_job(message, request_id, found)
    image = _image_request(message, info, limits, draw_seed, found)
    output = _output(message.output, found)
    if message.priority > limits.max_priority:
        lowered = f"{message.priority} became {limits.max_priority}, the highest that is allowed here"
        found.warn(Notice.PRIORITY_LOWERED, "priority", lowered)
    output = _without_unused_options(message, image, output, info, found)
    if found.violations or request_id is None:
        raise InvalidRequest(found.violations)
    return ParsedRequest(
        message=message,
        request_id=request_id,
        info=info,
        caller=caller,
        image=image,
        output=output,
        warnings=tuple(found.warnings),
        timeout=timeout,
        priority=min(message.priority, limits.max_priority),
        detached=message.on_disconnect == pb.ON_DISCONNECT_DETACH,
    )


def _check_data(message: pb.GenerateRequest, info: ModelInfo, limits: RequestLimits, found: _Findings) -> None:
    data, longest = message.data, limits.max_prompt_characters
    found.require(bool(data.prompt.strip()), "data.prompt", "is required and must not be blank")
    for name, prompt in (
        ("data.prompt", data.prompt),
        ("parameter.negative-prompt", message.parameter.negative_prompt),
    ):
        found.require(len(prompt) <= longest, name, f"must have at most {longest} characters, has {len(prompt)}")
    found.require(
        not data.HasField("model") or data.model == info.name,
        "data.model",
        f'must be "{info.name}", the model served here, or left out',
    )


def _check_job(message: pb.GenerateRequest, request_id: str | None, found: _Findings) -> None:
    found.require(request_id is not None, "requestId", "must have at most 128 characters of A-Z a-z 0-9 . _ : / -")
    found.require(-2 <= message.priority <= 2, "priority", f"must be -2 to 2, is {message.priority}")
    found.require(
        message.on_disconnect in pb.OnDisconnect.values(),
        "onDisconnect",
        f"must be one of {', '.join(pb.OnDisconnect.keys())}",
    )
    found.require(
        bool(message.request_id) or message.on_disconnect != pb.ON_DISCONNECT_DETACH,
        "requestId",
        "is required for a job that is to be detached",
    )


def _image_request(
    message: pb.GenerateRequest,
    info: ModelInfo,
    limits: RequestLimits,
    draw_seed: Callable[[], int],
    found: _Findings,
) -> ImageRequest:
    parameter, sampling = message.parameter, message.sampling
    n = _value_or_default(parameter, "n", 1)
    found.require(1 <= n <= limits.max_images, "parameter.n", f"must be 1 to {limits.max_images}, is {n}")
    seed = parameter.seed if parameter.HasField("seed") else draw_seed()

    steps = _value_or_default(sampling, "steps", info.default_steps)
    found.require(1 <= steps <= limits.max_steps, "sampling.steps", f"must be 1 to {limits.max_steps}, is {steps}")
    guidance_scale = _value_or_default(sampling, "guidance_scale", info.default_guidance_scale)
    found.require(0 <= guidance_scale <= 50, "sampling.guidanceScale", f"must be 0 to 50, is {guidance_scale:g}")
    high_noise_frac = _value_or_default(sampling, "high_noise_frac", info.default_high_noise_frac)
    found.require(
        0 < high_noise_frac <= 1, "sampling.highNoiseFrac", f"must be above 0 and at most 1, is {high_noise_frac:g}"
    )
    found.require(
        high_noise_frac == 1 or info.has_refiner,
        "sampling.highNoiseFrac",
        "must be 1 or left out, since no refiner is served here",
    )
    scheduler = _value_or_default(sampling, "scheduler", info.default_scheduler)
    found.require(scheduler in info.schedulers, "sampling.scheduler", f"must be one of {', '.join(info.schedulers)}")
    width, height = _size(message, info, limits, found)
    found.require(
        width * height <= limits.max_pixels,
        "sampling.width" if sampling.HasField("width") else "parameter.aspect-ratio",
        f"must make at most {limits.max_pixels} pixels in all, makes {width}x{height}",
    )
    return ImageRequest(
        prompt=message.data.prompt,
        negative_prompt=parameter.negative_prompt,
        seeds=tuple((seed + index) % 2**32 for index in range(min(n, limits.max_images))),
        steps=steps,
        guidance_scale=guidance_scale,
        high_noise_frac=high_noise_frac,
        scheduler=scheduler,
        width=width,
        height=height,
    )


def _size(message: pb.GenerateRequest, info: ModelInfo, limits: RequestLimits, found: _Findings) -> tuple[int, int]:
    """Return width and height in pixels, by the aspect ratio or as given and snapped."""
    sampling, parameter = message.sampling, message.parameter
    given = sampling.HasField("width"), sampling.HasField("height")
    if not any(given):
        ratio = parameter.aspect_ratio if parameter.HasField("aspect_ratio") else "1:1"
        if ratio not in ASPECT_RATIOS:
            found.require(False, "parameter.aspect-ratio", f"must be one of {', '.join(sorted(ASPECT_RATIOS))}")
            ratio = "1:1"
        return size_of(ratio, info.native_side, info.side_multiple)

    missing = "sampling.height" if given[0] else "sampling.width"
    found.require(all(given), missing, "must be given too; width and height go together")
    found.require(
        not parameter.HasField("aspect_ratio"),
        "parameter.aspect-ratio",
        "must be left out when sampling.width and sampling.height are given",
    )
    sides = {"sampling.width": sampling.width, "sampling.height": sampling.height}
    for (name, side), is_given in zip(sides.items(), given, strict=True):
        fits = not is_given or limits.min_side <= side <= limits.max_side
        found.require(fits, name, f"must be {limits.min_side} to {limits.max_side} pixels, is {side}")
    fitting = {name: snapped(side, info.side_multiple) for name, side in sides.items()}
    for name, side in sides.items():
        if fitting[name] != side:
            moved = f"{side} pixels became {fitting[name]}, a multiple of {info.side_multiple} as the autoencoder needs"
            found.warn(Notice.SIZE_SNAPPED, name, moved)
    return fitting["sampling.width"], fitting["sampling.height"]


def _output(output: pb.Output, found: _Findings) -> Output:
    found.require(output.format in CODINGS, "output.format", f"must be one of {', '.join(pb.Format.keys())}")
    quality = _value_or_default(output, "quality", 95)
    found.require(1 <= quality <= 100, "output.quality", f"must be 1 to 100, is {quality}")
    max_message_bytes = _value_or_default(output, "max_message_bytes", DEFAULT_MESSAGE_BYTES)
    found.require(
        _MIN_MESSAGE_BYTES <= max_message_bytes <= _MAX_MESSAGE_BYTES,
        "output.maxMessageBytes",
        f"must be {_MIN_MESSAGE_BYTES} to {_MAX_MESSAGE_BYTES}, is {max_message_bytes}",
    )
    coding = CODINGS.get(output.format, images.JPEG)
    return Output(coding, quality, output.raw, max_message_bytes, output.preview_interval)


def _without_unused_options(
    message: pb.GenerateRequest, image: ImageRequest, output: Output, info: ModelInfo, found: _Findings
) -> Output:
    """Warn of options without effect, and return the output without them."""
    if image.negative_prompt and image.guidance_scale <= 1:
        unused = "has no effect with a guidance scale of 1 or less, which leaves guidance out"
        found.warn(Notice.OPTION_UNUSED, "parameter.negative-prompt", unused)
    if message.output.HasField("quality") and output.coding.lossless:
        found.warn(Notice.OPTION_UNUSED, "output.quality", "has no effect on a format that loses nothing")
    if output.preview_interval and info.content_filter is not None:
        unused = "has no effect here, where a content filter judges images before they are sent, and only finished ones"
        found.warn(Notice.OPTION_UNUSED, "output.previewInterval", unused)
        return dataclasses.replace(output, preview_interval=0)
    return output


def _value_or_default(message: Message, name: str, default: _T) -> _T:
    return getattr(message, name) if message.HasField(name) else default


def in_one_message(parsed: ParsedRequest) -> ParsedRequest:
    """Return the request as for a call that is answered by one message: no previews, and images share its space."""
    warnings = parsed.warnings
    if parsed.output.preview_interval:
        unused = "has no effect in Generate, which has no events; use StreamGenerate"
        warnings += (Warning(Notice.OPTION_UNUSED, "output.previewInterval", unused),)
    return dataclasses.replace(
        parsed,
        output=dataclasses.replace(parsed.output, preview_interval=0),
        warnings=warnings,
        images_per_message=len(parsed.image.seeds),
    )


def with_message_bytes(parsed: ParsedRequest, max_message_bytes: int) -> ParsedRequest:
    """Return the request with another limit on its message, such as its share of an answer to several requests."""
    return dataclasses.replace(
        parsed, output=dataclasses.replace(parsed.output, max_message_bytes=max(0, max_message_bytes))
    )


def max_image_bytes(parsed: ParsedRequest) -> int:
    """Return the bytes of a message that one image may fill: the same share for each image, in any order."""
    prompts = len(parsed.image.prompt.encode()) + len(parsed.image.negative_prompt.encode())
    envelope = _ENVELOPE_BYTES + (_ENVELOPE_BYTES_PER_IMAGE + prompts) * len(parsed.image.seeds)
    return max(0, parsed.output.max_message_bytes - envelope) // parsed.images_per_message


def violations_of_batch(
    found: Mapping[Violation, Sequence[int]], name_of: Callable[[str, str], str]
) -> list[Violation]:
    """Return one violation for each in `found`, whose values are the indices of the requests that have it.

    `name_of` names a field, given the field and these indices as text.
    """
    named = (Violation(name_of(each.field, index_ranges(indices)), each.description) for each, indices in found.items())
    return list(dict.fromkeys(named))


def index_ranges(indices: Sequence[int]) -> str:
    """Return ascending indices as text: "0-2,5"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
