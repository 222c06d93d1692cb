"""Messages to domain and back: a request is checked whole, all violations at once, and every default is filled in.

Pure functions over the generated messages; what the fields mean is said in proto/text_to_image.proto.
"""

import asyncio
import dataclasses
import hashlib
import math
import re
import secrets
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from server.api import images
from server.domain import ASPECT_RATIOS, Environment, ImageRequest, ModelInfo, Notice, Stage, Warning, size_of, snapped
from server.engine import events
from server.settings import Settings
from text_to_image_client.v1 import text_to_image_pb2 as pb

_T = TypeVar("_T")

_CODINGS = {
    pb.FORMAT_UNSPECIFIED: images.JPEG,
    pb.FORMAT_JPEG: images.JPEG,
    pb.FORMAT_PNG: images.PNG,
    pb.FORMAT_WEBP: images.WEBP,
    pb.FORMAT_JPEG_SUBSAMPLED: images.JPEG_SUBSAMPLED,
    pb.FORMAT_WEBP_LOSSLESS: images.WEBP_LOSSLESS,
    pb.FORMAT_JPEG_RGB: images.JPEG_RGB,
}
_FORMATS = {coding: format for format, coding in _CODINGS.items()}  # JPEG's is the later of its two
_STAGES = {stage: pb.Stage.Value(f"STAGE_{stage.name}") for stage in Stage}
_NOTICES = {notice: pb.Warning.Code.Value(f"CODE_{notice.name}") for notice in Notice}

DEFAULT_MESSAGE_BYTES = 4 * 1024 * 1024  # what a gRPC client receives unless told otherwise
_MESSAGE_BYTES = (16 * 1024, 64 * 1024 * 1024)
_ENVELOPE_BYTES = 8 * 1024  # kept free in a message for all that is not image,
_ENVELOPE_BYTES_PER_IMAGE = 512  # and for each image's metadata, without the prompts, and warning
_PREVIEW_QUALITY = 80

UNREADABLE_TEXT = "?"
"""Stands for a prompt that cannot be read, so that the other rules are checked and none is broken by its absence."""

ADMITTED = (("t2i-admitted", "1"),)
"""The headers of a unary answer, by which a client knows that the server has begun the request."""
DEVICE_LOST = "DEVICE_LOST"
"""The reason in google.rpc.ErrorInfo, which clients know a lost device by."""
_ERROR_DOMAIN = pb.DESCRIPTOR.package  # "text_to_image.v1"

# What a call may end with: message, details and our own metadata, as they travel. nginx takes one page of 4096 bytes
# (grpc_buffer_size) and makes UNAVAILABLE of what is larger, which clients retry; most gRPC clients take 8 KiB and
# report what is larger as RESOURCE_EXHAUSTED.
TRAILER_BYTES = 4000
_DETAILS = "grpc-status-details-bin"
_HEADER_BYTES = 32  # that HPACK (RFC 7541, 4.1) counts for each header, in addition to its name and value
_FIELD_BYTES, _DESCRIPTION_BYTES, _MESSAGE_BYTES_OF_STATUS = 128, 384, 768  # each in UTF-8, longer ones are cut


class Loading(Exception):
    """The model is not ready yet."""


class Unauthenticated(Exception):
    """The call has no token that is known here."""


class Undecodable(Exception):
    """The request is no Protobuf message of its method."""

    def __init__(self) -> None:
        super().__init__("the request's bytes are not the Protobuf message that this method takes")


class Unimplemented(Exception):
    """No such method is served here."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path[:200]} is not served here; GetModel and reflection show what is")


class SlowReader(Exception):
    """The client has left its stream unread for too long."""


class UnknownModel(Exception):
    """No model of this name and version is served."""


class UnknownJob(Exception):
    """No detached job has this name, or no longer."""


class JobAlreadyExists(Exception):
    """The name is that of another detached job."""


class InternalError(Exception):
    """The server failed. The cause is in the log, and only there."""

    def __init__(self) -> None:
        super().__init__("internal error; the server's log has the cause")


@dataclass(frozen=True)
class Violation:
    """What is wrong with one field, and what would be right. `field` in JSON names: "parameter.aspect-ratio"."""

    field: str
    description: str


class InvalidRequest(Exception):
    """A request that cannot be served as it is, with everything that is wrong with it."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(f"{each.field}: {each.description}" for each in self.violations))


# The one table of errors. Messages of these are written for callers; of any other nothing is told.
STATUS: dict[type[Exception], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    # gRPC's own libraries say INTERNAL, which is what operators are woken for; but it is the caller who is at fault.
    Undecodable: grpc.StatusCode.INVALID_ARGUMENT,
    Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    images.ImageTooLarge: grpc.StatusCode.INVALID_ARGUMENT,
    events.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    events.DeviceFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    # Nobody retries ABORTED unasked, neither gRPC nor a proxy: the same request may cost the next device, too.
    events.DeviceLost: grpc.StatusCode.ABORTED,
    events.DeviceUnavailable: grpc.StatusCode.UNAVAILABLE,
    Loading: grpc.StatusCode.UNAVAILABLE,
    events.Draining: grpc.StatusCode.UNAVAILABLE,
    events.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    events.Cancelled: grpc.StatusCode.CANCELLED,
    SlowReader: grpc.StatusCode.CANCELLED,
    UnknownModel: grpc.StatusCode.NOT_FOUND,
    UnknownJob: grpc.StatusCode.NOT_FOUND,
    JobAlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    events.ModelFailed: grpc.StatusCode.INTERNAL,
    InternalError: grpc.StatusCode.INTERNAL,
}


@dataclass(frozen=True)
class Output:
    """How the images are to be coded, and after how many network calls there is a preview, 0 for never."""

    coding: images.Coding
    quality: int
    raw: bool
    max_message_bytes: int
    preview_interval: int = 0


@dataclass(frozen=True)
class ParsedRequest:
    """A valid request with its defaults filled in, and what had to be changed for that.

    `detached` tells that the job outlives its callers. `images_per_message` share one message's room.
    """

    request_id: str
    image: ImageRequest
    output: Output
    warnings: tuple[Warning, ...]
    priority: int = 0
    detached: bool = False
    images_per_message: int = 1


@dataclass(frozen=True)
class RequestLimits:
    """What the served model and the settings allow together. Sides in pixels, `retention` in seconds."""

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
    """RequestLimits of a server: sides from a quarter to four times the model's own, area at most `max_pixels`."""
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
    """The caller's name for the request, or a new one; None if it has one that must not come near a log."""
    return name_of(message) if message.request_id else str(uuid.uuid4())


def name_of(message: pb.GenerateRequest | pb.AttachRequest | pb.CancelRequest) -> str | None:
    """The name that the message gives, or None if there is none that may come near a log."""
    return message.request_id if re.fullmatch(r"[A-Za-z0-9._:/-]{1,128}", message.request_id) else None


def safe_name(given: str) -> str:
    """Return `given` as a name that may come near a log: other characters become "_", and 128 are kept."""
    return re.sub(r"[^A-Za-z0-9._:/-]", "_", given)[:128]


def random_seed() -> int:
    return secrets.randbits(32)


def parse(
    message: pb.GenerateRequest,
    request_id: str | None,
    info: ModelInfo,
    limits: RequestLimits,
    draw_seed: Callable[[], int] = random_seed,
) -> ParsedRequest:
    """Check a request and fill in its defaults. Raises InvalidRequest with all violations.

    `request_id` is what request_id_of made of the message's.
    """
    data, parameter, sampling, output = message.data, message.parameter, message.sampling, message.output
    wrong: list[Violation] = []
    warnings: list[Warning] = []

    def require(holds: bool, field: str, description: str) -> None:
        if not holds:
            wrong.append(Violation(field, description))

    longest = limits.max_prompt_characters
    require(bool(data.prompt.strip()), "data.prompt", "is required and must not be blank")
    for field, prompt in (("data.prompt", data.prompt), ("parameter.negative-prompt", parameter.negative_prompt)):
        require(len(prompt) <= longest, field, f"must have at most {longest} characters, has {len(prompt)}")
    require(
        not data.HasField("model") or data.model == info.name,
        "data.model",
        f'must be "{info.name}", the model served here, or left out',
    )
    require(request_id is not None, "requestId", "must have at most 128 characters of A-Z a-z 0-9 . _ : / -")

    require(-2 <= message.priority <= 2, "priority", f"must be -2 to 2, is {message.priority}")
    require(
        message.on_disconnect in pb.OnDisconnect.values(),
        "onDisconnect",
        f"must be one of {', '.join(pb.OnDisconnect.keys())}",
    )
    detached = message.on_disconnect == pb.ON_DISCONNECT_DETACH
    require(bool(message.request_id) or not detached, "requestId", "is required for a job that is to be detached")

    n = _given(parameter, "n", 1)
    require(1 <= n <= limits.max_images, "parameter.n", f"must be 1 to {limits.max_images}, is {n}")
    seed = parameter.seed if parameter.HasField("seed") else draw_seed()

    steps = _given(sampling, "steps", info.default_steps)
    require(1 <= steps <= limits.max_steps, "sampling.steps", f"must be 1 to {limits.max_steps}, is {steps}")
    guidance_scale = _given(sampling, "guidance_scale", info.default_guidance_scale)
    require(0 <= guidance_scale <= 50, "sampling.guidanceScale", f"must be 0 to 50, is {guidance_scale:g}")
    high_noise_frac = _given(sampling, "high_noise_frac", info.default_high_noise_frac)
    require(
        0 < high_noise_frac <= 1, "sampling.highNoiseFrac", f"must be above 0 and at most 1, is {high_noise_frac:g}"
    )
    require(
        high_noise_frac == 1 or info.has_refiner,
        "sampling.highNoiseFrac",
        "must be 1 or left out, since no refiner is served here",
    )
    scheduler = _given(sampling, "scheduler", info.default_scheduler)
    require(scheduler in info.schedulers, "sampling.scheduler", f"must be one of {', '.join(info.schedulers)}")
    width, height = _size(message, info, limits, wrong, warnings)
    require(
        width * height <= limits.max_pixels,
        "sampling.width" if sampling.HasField("width") else "parameter.aspect-ratio",
        f"must make at most {limits.max_pixels} pixels in all, makes {width}x{height}",
    )

    require(output.format in _CODINGS, "output.format", f"must be one of {', '.join(pb.Format.keys())}")
    quality = _given(output, "quality", 95)
    require(1 <= quality <= 100, "output.quality", f"must be 1 to 100, is {quality}")
    max_message_bytes = _given(output, "max_message_bytes", DEFAULT_MESSAGE_BYTES)
    least, most = _MESSAGE_BYTES
    require(
        least <= max_message_bytes <= most,
        "output.maxMessageBytes",
        f"must be {least} to {most}, is {max_message_bytes}",
    )

    if message.priority > limits.max_priority:
        lowered = f"{message.priority} became {limits.max_priority}, the highest that is allowed here"
        warnings.append(Warning(Notice.PRIORITY_LOWERED, "priority", lowered))
    if parameter.negative_prompt and guidance_scale <= 1:
        unused = "has no effect with a guidance scale of 1 or less, which leaves guidance out"
        warnings.append(Warning(Notice.OPTION_UNUSED, "parameter.negative-prompt", unused))
    if output.HasField("quality") and output.format in (pb.FORMAT_PNG, pb.FORMAT_WEBP_LOSSLESS):
        unused = "has no effect on a format that loses nothing"
        warnings.append(Warning(Notice.OPTION_UNUSED, "output.quality", unused))

    preview_interval = output.preview_interval
    if preview_interval and info.content_filter is not None:
        preview_interval = 0
        unused = "has no effect here, where a content filter judges images before they are sent, and only finished ones"
        warnings.append(Warning(Notice.OPTION_UNUSED, "output.previewInterval", unused))

    if wrong or request_id is None:
        raise InvalidRequest(wrong)
    return ParsedRequest(
        request_id=request_id,
        image=ImageRequest(
            prompt=data.prompt,
            negative_prompt=parameter.negative_prompt,
            seeds=tuple((seed + index) % 2**32 for index in range(n)),
            steps=steps,
            guidance_scale=guidance_scale,
            high_noise_frac=high_noise_frac,
            scheduler=scheduler,
            width=width,
            height=height,
        ),
        output=Output(_CODINGS[output.format], quality, output.raw, max_message_bytes, preview_interval),
        warnings=tuple(warnings),
        priority=min(message.priority, limits.max_priority),
        detached=detached,
    )


def in_one_message(task: ParsedRequest) -> ParsedRequest:
    """The task of a call that is answered by one message: no previews, and room that all images share."""
    warnings = task.warnings
    if task.output.preview_interval:
        unused = "has no effect in Generate, which has no events; use StreamGenerate"
        warnings += (Warning(Notice.OPTION_UNUSED, "output.previewInterval", unused),)
    return dataclasses.replace(
        task,
        output=dataclasses.replace(task.output, preview_interval=0),
        warnings=warnings,
        images_per_message=len(task.image.seeds),
    )


def _given(message: Message, field: str, default: _T) -> _T:
    return getattr(message, field) if message.HasField(field) else default


def _size(
    message: pb.GenerateRequest, info: ModelInfo, limits: RequestLimits, wrong: list[Violation], warnings: list[Warning]
) -> tuple[int, int]:
    """Width and height in pixels, from the aspect ratio or as asked for and snapped."""
    sampling, parameter = message.sampling, message.parameter
    asked = sampling.HasField("width"), sampling.HasField("height")
    if not any(asked):
        ratio = parameter.aspect_ratio if parameter.HasField("aspect_ratio") else "1:1"
        if ratio not in ASPECT_RATIOS:
            wrong.append(Violation("parameter.aspect-ratio", f"must be one of {', '.join(sorted(ASPECT_RATIOS))}"))
            ratio = "1:1"
        return size_of(ratio, info.native_side, info.side_multiple)

    if not all(asked):
        missing = "sampling.height" if asked[0] else "sampling.width"
        wrong.append(Violation(missing, "must be given too; width and height go together"))
    if parameter.HasField("aspect_ratio"):
        wrong.append(
            Violation("parameter.aspect-ratio", "must be left out when sampling.width and sampling.height are given")
        )
    sides = {"sampling.width": sampling.width, "sampling.height": sampling.height}
    for (field, side), given in zip(sides.items(), asked, strict=True):
        if given and not limits.min_side <= side <= limits.max_side:
            wrong.append(Violation(field, f"must be {limits.min_side} to {limits.max_side} pixels, is {side}"))
    fitting = {field: snapped(side, info.side_multiple) for field, side in sides.items()}
    warnings.extend(
        Warning(
            Notice.SIZE_SNAPPED,
            field,
            f"{side} pixels became {fitting[field]}, a multiple of {info.side_multiple} as the autoencoder needs",
        )
        for field, side in sides.items()
        if fitting[field] != side
    )
    return fitting["sampling.width"], fitting["sampling.height"]


def violations_of_all(found: Mapping[Violation, Sequence[int]], name_of: Callable[[str, str], str]) -> list[Violation]:
    """One violation for each that was found, whichever requests of a batch have it.

    `name_of` makes the name of a field from the field and the places of these requests.
    """
    named = (Violation(name_of(each.field, places(indices)), each.description) for each, indices in found.items())
    return list(dict.fromkeys(named))


def places(indices: Sequence[int]) -> str:
    """Which elements of a batch have one and the same violation, in ascending order: "0-2,5"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def status_of(error: Exception, room: int = TRAILER_BYTES) -> status_pb2.Status:
    """Return the google.rpc.Status of an error in STATUS, with its details: BadRequest, RetryInfo or ErrorInfo.

    It takes at most `room` bytes of a call's trailers: of an InvalidRequest it has the first violations, as many as
    fit, and the number of the others.
    """
    if isinstance(error, InvalidRequest):
        return _bad_request(error.violations, room)
    message = _cut(str(error), _MESSAGE_BYTES_OF_STATUS)
    status = status_pb2.Status(code=STATUS[type(error)].value[0], message=message)
    if isinstance(error, events.ResourceExhausted) and error.retry_after < math.inf:
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=_duration(error.retry_after)))
    elif isinstance(error, events.DeviceLost):
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=DEVICE_LOST, domain=_ERROR_DOMAIN))
    return status


def _bad_request(violations: Sequence[Violation], room: int) -> status_pb2.Status:
    shown: list[Violation] = []
    status = status_pb2.Status(code=STATUS[InvalidRequest].value[0])
    for each in violations:
        shown.append(Violation(_cut(each.field, _FIELD_BYTES), _cut(each.description, _DESCRIPTION_BYTES)))
        others = len(violations) - len(shown)
        longer = status_pb2.Status(
            code=status.code, message=str(InvalidRequest(shown)) + (f"; and {others} more" if others else "")
        )
        bad_request = error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(field=each.field, description=each.description)
                for each in shown
            ]
        )
        longer.details.add().Pack(bad_request)
        if len(shown) > 1 and _trailer_bytes(longer) > room:
            break
        status = longer
    return status


def _cut(text: str, most: int) -> str:
    """The text's beginning, at most so many bytes of UTF-8."""
    coded = text.encode()
    return text if len(coded) <= most else coded[: most - 3].decode(errors="ignore") + "..."


def _trailer_bytes(status: status_pb2.Status) -> int:
    """What a status takes of a call's trailers: the message percent-encoded, and the details in base64."""
    message = sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in status.message.encode())
    details: int = -(-status.ByteSize() * 4 // 3)
    names = sum(_HEADER_BYTES + len(name) for name in ("grpc-status", "grpc-message", _DETAILS))
    return names + 2 + message + details


async def abort(context: "grpc.aio.ServicerContext[Any, Any]", error: Exception) -> None:
    """End a call by an error in STATUS: code, message, and trailing metadata with the details."""
    ours = tuple(context.trailing_metadata() or ())
    status = status_of(error, TRAILER_BYTES - sum(_HEADER_BYTES + len(name) + len(value) for name, value in ours))
    details = (*ours, (_DETAILS, status.SerializeToString()))  # which take the place of what was set before
    try:
        await context.abort(STATUS[type(error)], status.message, trailing_metadata=details)
    except grpc.aio.InternalError:  # of gRPC's, when it has just found the caller gone
        raise asyncio.CancelledError from None


def coded(task: ParsedRequest, event: events.ImageReady) -> images.CodedImage:
    """The event's image as the task asks for it, or so that it fits its message. Raises images.ImageTooLarge."""
    return images.code_within(event.pixels, task.output.coding, task.output.quality, _file_bytes(task))


def _file_bytes(task: ParsedRequest) -> int:
    """Bytes that an image file may have, to fit its message as it travels."""
    room = room_for_image(task)
    return room if task.output.raw else (room - 64) // 4 * 3  # base64, after the data URI's own words


def room_for_image(task: ParsedRequest) -> int:
    """Bytes of a message that one image may fill: its share is the same whichever image is ready first."""
    prompts = len(task.image.prompt.encode()) + len(task.image.negative_prompt.encode())
    envelope = _ENVELOPE_BYTES + (_ENVELOPE_BYTES_PER_IMAGE + prompts) * len(task.image.seeds)
    return max(0, task.output.max_message_bytes - envelope) // task.images_per_message


def recoded_warning(task: ParsedRequest, image: images.CodedImage, index: int) -> Warning:
    """For an image that is not coded as was asked."""
    quality = f"of quality {image.quality}" if image.quality else "without loss"
    return Warning(
        Notice.IMAGE_RECODED,
        "output.maxMessageBytes",
        f"image {index} came as {pb.Format.Name(_FORMATS[image.coding])} {quality}, to fit into a message of "
        f"{task.output.max_message_bytes} bytes; raise output.maxMessageBytes to what your client can take",
    )


def choice_message(task: ParsedRequest, image: images.CodedImage, filtered: bool = False) -> pb.Choice:
    finish_reason = "content_filtered" if filtered else "success"
    if task.output.raw:
        return pb.Choice(finish_reason=finish_reason, raw=image.data)
    return pb.Choice(finish_reason=finish_reason, image=image.data_uri)


def image_metadata_message(task: ParsedRequest, event: events.ImageReady, image: images.CodedImage) -> pb.ImageMetadata:
    asked = task.image
    return pb.ImageMetadata(
        seed=event.seed,
        width=asked.width,
        height=asked.height,
        steps=asked.steps,
        guidance_scale=asked.guidance_scale,
        high_noise_frac=asked.high_noise_frac,
        scheduler=asked.scheduler,
        base_calls=event.base_calls,
        refiner_calls=event.refiner_calls,
        media_type=image.coding.media_type,
        request=_request_message(asked, event.seed, image),
        sha256=hashlib.sha256(image.data).hexdigest(),
    )


def _request_message(asked: ImageRequest, seed: int, image: images.CodedImage) -> pb.GenerateRequest:
    """The request that asks for this image alone, and leaves nothing to defaults; the way back of `parse`."""
    output = pb.Output(format=_FORMATS[image.coding])
    if not image.coding.lossless:
        output.quality = image.quality
    return pb.GenerateRequest(
        data=pb.TaskData(prompt=asked.prompt),
        parameter=pb.TaskParameter(negative_prompt=asked.negative_prompt, n=1, seed=seed),
        sampling=pb.Sampling(
            steps=asked.steps,
            guidance_scale=asked.guidance_scale,
            high_noise_frac=asked.high_noise_frac,
            scheduler=asked.scheduler,
            width=asked.width,
            height=asked.height,
        ),
        output=output,
    )


def whole_answer(task: ParsedRequest, choices: Mapping[int, pb.Choice], metadata: pb.Metadata) -> pb.GenerateResponse:
    """All images, by index, in one message. Raises images.ImageTooLarge if they were coded to travel one by one."""
    response = pb.GenerateResponse(
        data=pb.ResultData(choices=[choices[index] for index in sorted(choices)]), metadata=metadata
    )
    if response.ByteSize() > task.output.max_message_bytes:
        raise images.ImageTooLarge(
            f"the images of {task.request_id}, which StreamGenerate began, do not fit into one message; use Attach"
        )
    return response


def metadata_message(
    task: ParsedRequest,
    info: ModelInfo,
    image_metadata: Sequence[pb.ImageMetadata],
    warnings: Sequence[Warning],
    finished: events.Finished,
) -> pb.Metadata:
    return pb.Metadata(
        request_id=task.request_id,
        model=info.name,
        fingerprint=info.fingerprint,
        images=image_metadata,
        warnings=[
            pb.Warning(code=_NOTICES[each.notice], field=each.field, message=each.message)
            for each in (*task.warnings, *finished.warnings, *warnings)
        ],
        waited=_duration(finished.waited),
        ran=_duration(finished.ran),
        environment=_environment_message(finished.environment),
    )


def queued_message(event: events.Queued) -> pb.StreamGenerateResponse:
    return pb.StreamGenerateResponse(queued=pb.Queued(position=event.position, eta=_duration(event.eta)))


def progress_message(event: events.Progress) -> pb.StreamGenerateResponse:
    return pb.StreamGenerateResponse(
        progress=pb.Progress(
            choice_index=event.index,
            stage=_STAGES[event.stage],
            step=event.step,
            steps=event.steps,
            eta=_duration(event.eta),
        )
    )


def repeated_message(
    message: pb.StreamGenerateResponse, then: float, now: float, number: int
) -> pb.StreamGenerateResponse:
    """Return a `queued` or `progress` that was made `then` as it is `now`, on one clock in seconds: its ETA is less.

    `number` is that of the newest event that the stream has had, which may be another one.
    """
    again = pb.StreamGenerateResponse()
    again.CopyFrom(message)
    again.number = number
    eta = again.queued.eta if again.HasField("queued") else again.progress.eta
    eta.CopyFrom(_duration(max(0.0, eta.ToMicroseconds() / 1e6 - (now - then))))
    return again


def preview_message(task: ParsedRequest, event: events.Preview) -> pb.StreamGenerateResponse:
    image = images.code_within(event.pixels, images.JPEG_SUBSAMPLED, _PREVIEW_QUALITY, _file_bytes(task))
    preview = pb.Preview(choice_index=event.index, step=event.step, steps=event.steps)
    if task.output.raw:
        preview.raw = image.data
    else:
        preview.image = image.data_uri
    return pb.StreamGenerateResponse(preview=preview)


def model_message(info: ModelInfo, limits: RequestLimits) -> pb.GetModelResponse:
    return pb.GetModelResponse(
        name=info.name,
        fingerprint=info.fingerprint,
        has_refiner=info.has_refiner,
        device=info.device,
        precision=info.precision,
        schedulers=info.schedulers,
        defaults=pb.GetModelResponse.Defaults(
            steps=info.default_steps,
            guidance_scale=info.default_guidance_scale,
            high_noise_frac=info.default_high_noise_frac,
            scheduler=info.default_scheduler,
            aspect_ratio="1:1",
        ),
        limits=pb.GetModelResponse.Limits(**dataclasses.asdict(limits) | {"retention": _duration(limits.retention)}),
        sizes=[
            pb.GetModelResponse.Size(aspect_ratio=ratio, width=width, height=height)
            for ratio in sorted(ASPECT_RATIOS)
            for width, height in [size_of(ratio, info.native_side, info.side_multiple)]
        ],
        environment=_environment_message(info.environment),
        content_filter=None
        if info.content_filter is None
        else pb.GetModelResponse.ContentFilter(**dataclasses.asdict(info.content_filter)),
    )


def _environment_message(environment: Environment) -> pb.Environment:
    return pb.Environment(fingerprint=environment.fingerprint, **dataclasses.asdict(environment))


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromMicroseconds(round(seconds * 1e6))
    return duration
