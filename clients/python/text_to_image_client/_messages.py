"""Convert between the contract's messages and this client's types. Pure: no channel, no clock, no file."""

import secrets
from typing import Any, cast

from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict

from ._enums import FORMATS, ON_DISCONNECT, STAGES, WARNING_CODES, EnumWords
from ._exceptions import FieldViolation, InvalidRequest
from ._types import (
    ContentFilter,
    Defaults,
    Done,
    Environment,
    Event,
    Format,
    GenerateOptions,
    Image,
    ImageReady,
    Limits,
    ModelInfo,
    OnDisconnect,
    Preview,
    Progress,
    Queued,
    Request,
    Result,
    Warning,
    WarningCode,
)
from .v1 import text_to_image_pb2 as pb

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""The largest message that a channel of this client receives. Every request reports it to the server."""

_REFUSED_MESSAGE_BYTES = 1  # servers accept 16 KiB to 64 MiB

_FIELDS = {
    "model": "data.model",
    "aspect_ratio": "parameter.aspect_ratio",
    "negative_prompt": "parameter.negative_prompt",
    "n": "parameter.n",
    "seed": "parameter.seed",
    "steps": "sampling.steps",
    "guidance_scale": "sampling.guidance_scale",
    "high_noise_frac": "sampling.high_noise_frac",
    "scheduler": "sampling.scheduler",
    "width": "sampling.width",
    "height": "sampling.height",
    "format": "output.format",
    "quality": "output.quality",
    "preview_interval": "output.preview_interval",
    "request_id": "request_id",
    "priority": "priority",
    "on_disconnect": "on_disconnect",
}
"""The path of each of GenerateOptions in a GenerateRequest."""

_ENUMS: dict[str, EnumWords[Any]] = {"output.format": FORMATS, "on_disconnect": ON_DISCONNECT}
"""The options that are enums in the contract, by their paths."""

_WHOLE = "a whole number"
_RULES = {
    "prompt": "text",
    "model": "text",
    "aspect_ratio": 'text such as "16:9"',
    "negative_prompt": "text",
    "n": f"{_WHOLE} from 1 to the server's limits.max_images",
    "seed": f"{_WHOLE} from 0 to 4294967295",
    "steps": f"{_WHOLE} from 1 to the server's limits.max_steps",
    "guidance_scale": "a number from 0 to 50",
    "high_noise_frac": "a number above 0 and at most 1",
    "scheduler": "text, one of those that model() lists",
    "width": f"{_WHOLE} of pixels from limits.min_side to limits.max_side of the server",
    "height": f"{_WHOLE} of pixels from limits.min_side to limits.max_side of the server",
    "format": f"one of {', '.join(Format)}",
    "quality": f"{_WHOLE} from 1 to 100",
    "preview_interval": f"{_WHOLE} from 0 on",
    "request_id": "text of at most 128 characters of A-Z a-z 0-9 . _ : / -",
    "priority": f"{_WHOLE} from -2 to 2",
    "on_disconnect": f"one of {', '.join(OnDisconnect)}",
    "after": f"{_WHOLE} from 0 on, the number of an event",
}
"""The type and range of each argument, for error messages."""


def build_request(prompt: str, options: GenerateOptions) -> pb.GenerateRequest:
    """Return the request for `prompt`, with images as raw bytes instead of base64.

    Raises InvalidRequest, with every bad field, for values that no message can carry: a negative seed, a lone
    surrogate. The server checks ranges. Raises TypeError for an unknown option.
    """
    request, violations = draft_request(prompt, options)
    if violations:
        raise invalid_request(violations)
    return request


def draft_request(prompt: str, options: GenerateOptions) -> tuple[pb.GenerateRequest, tuple[FieldViolation, ...]]:
    """Return the request of `build_request` without the fields that it cannot carry, and their violations."""
    if unknown := options.keys() - _FIELDS.keys():
        raise TypeError(f"no such option: {', '.join(sorted(unknown))}")
    request = pb.GenerateRequest(output=pb.Output(raw=True, max_message_bytes=MAX_MESSAGE_BYTES))
    given = {"prompt": prompt} | {name: value for name, value in options.items() if value is not None}
    violations = []
    for name, value in given.items():
        path = _FIELDS.get(name, "data.prompt")
        try:
            _set(request, path, _ENUMS[path].number(value) if path in _ENUMS else value)
        except (TypeError, ValueError, OverflowError):
            violations.append(FieldViolation(_json_path(path), f"{name} must be {_RULES[name]}, is {_shown(value)}"))
    return request, tuple(violations)


def attach_request(request_id: str, after: int) -> pb.AttachRequest:
    """Return the request that follows a detached job. Raises InvalidRequest as `build_request` does."""
    return cast("pb.AttachRequest", _filled(pb.AttachRequest(), request_id=request_id, after=after))


def cancel_request(request_id: str) -> pb.CancelRequest:
    """Return the request that ends a detached job. Raises InvalidRequest as `build_request` does."""
    return cast("pb.CancelRequest", _filled(pb.CancelRequest(), request_id=request_id))


def _filled(message: Any, **fields: object) -> Any:
    violations = []
    for name, value in fields.items():
        try:
            setattr(message, name, value)
        except (TypeError, ValueError, OverflowError):
            json_name = message.DESCRIPTOR.fields_by_name[name].json_name
            violations.append(FieldViolation(json_name, f"{name} must be {_RULES[name]}, is {_shown(value)}"))
    if violations:
        raise invalid_request(tuple(violations))
    return message


def with_seed(request: pb.GenerateRequest) -> pb.GenerateRequest:
    """Set a random seed if `request` has none, so that every server draws the same images, and return it.

    A detached request is not changed: an equal request under its name joins the job, so both must be equal.
    """
    if request.on_disconnect != pb.ON_DISCONNECT_DETACH and not request.parameter.HasField("seed"):
        request.parameter.seed = secrets.randbits(32)
    return request


def as_refusable(request: pb.GenerateRequest) -> pb.GenerateRequest:
    """Return a copy with a limit that every server refuses, so that the server validates it and draws nothing."""
    refusable = pb.GenerateRequest()
    refusable.CopyFrom(request)
    refusable.output.max_message_bytes = _REFUSED_MESSAGE_BYTES
    return refusable


def with_server_violations(
    violations: tuple[FieldViolation, ...], found: tuple[FieldViolation, ...]
) -> tuple[FieldViolation, ...]:
    """Add to the violations of a draft those that the server found in `as_refusable` and that the caller caused.

    A field that the message could not carry is missing for the server, so its violation is not repeated.
    """
    known = {violation.field for violation in violations} | {_json_path("output.max_message_bytes")}
    return (*violations, *(violation for violation in found if violation.field not in known))


def invalid_request(violations: tuple[FieldViolation, ...]) -> InvalidRequest:
    """Return the error with all violations."""
    return InvalidRequest("; ".join(map(str, violations)), violations=violations)


def _shown(value: object) -> str:
    """Return the value in at most about 60 characters."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:40]}... ({type(value).__name__})"


def read_request(message: pb.GenerateRequest) -> Request:
    """Return the prompt and the options that `message` sets, the inverse of `build_request`."""
    request: dict[str, Any] = {"prompt": message.data.prompt}
    for name, path in _FIELDS.items():
        parent, field = _parent(message, path)
        if field in {descriptor.name for descriptor, _ in parent.ListFields()}:
            value = getattr(parent, field)
            if path in _ENUMS:  # a newer value stays a number, which `build_request` refuses by name
                value = _ENUMS[path].word(value) or str(value)
            request[name] = value
    return cast("Request", request)


def option_of(field: str) -> str | None:
    """Return the prompt or the option that sets the field of this JSON path, None if there is none."""
    names = {_json_path(path): name for name, path in (*_FIELDS.items(), ("prompt", "data.prompt"))}
    return names.get(field)


def _set(message: Any, path: str, value: object) -> None:
    parent, name = _parent(message, path)
    setattr(parent, name, value)


def _parent(message: Any, path: str) -> tuple[Any, str]:
    """Return the message that holds the field at the end of `path`, and the field's name."""
    *parents, name = path.split(".")
    for parent in parents:
        message = getattr(message, parent)
    return message, name


def _json_path(path: str) -> str:
    names = []
    message: Any = pb.GenerateRequest()
    for name in path.split("."):
        names.append(message.DESCRIPTOR.fields_by_name[name].json_name)
        message = getattr(message, name)
    return ".".join(names)


def read_result(response: pb.GenerateResponse) -> Result:
    """Return the images and the metadata of an answer."""
    metadata = response.metadata
    images = map(_read_image, response.data.choices, metadata.images)
    return _result(tuple(images), metadata)


def read_event(message: pb.StreamGenerateResponse, images: dict[int, Image]) -> Event | None:
    """Return the event in `message`, or None for a kind or a stage that is newer than this client.

    `images` holds the stream's images so far, by index. A `choice` adds to it, and `Done` returns them all.
    """
    number = message.number
    match message.WhichOneof("event"):
        case "queued":
            return Queued(message.queued.position, _eta(message.queued), number)
        case "progress" if (stage := STAGES.word(message.progress.stage)) is not None:
            progress = message.progress
            return Progress(progress.choice_index, stage, progress.step, progress.steps, _eta(progress), number)
        case "preview":
            preview = message.preview
            return Preview(preview.choice_index, preview.step, preview.steps, preview.raw, number)
        case "choice":
            choice = message.choice
            images[choice.choice_index] = _read_image(choice.choice, choice.metadata)
            return ImageReady(choice.choice_index, images[choice.choice_index], number)
        case "done":
            return Done(_result(tuple(images[index] for index in sorted(images)), message.done.metadata), number)
    return None


def read_model(response: pb.GetModelResponse) -> ModelInfo:
    """Return the description of the served model."""
    defaults, limits = response.defaults, response.limits
    return ModelInfo(
        name=response.name,
        fingerprint=response.fingerprint,
        has_refiner=response.has_refiner,
        device=response.device,
        precision=response.precision,
        schedulers=tuple(response.schedulers),
        defaults=Defaults(
            steps=defaults.steps,
            guidance_scale=defaults.guidance_scale,
            high_noise_frac=defaults.high_noise_frac,
            scheduler=defaults.scheduler,
            aspect_ratio=defaults.aspect_ratio,
        ),
        limits=Limits(
            max_images=limits.max_images,
            max_steps=limits.max_steps,
            max_prompt_characters=limits.max_prompt_characters,
            min_side=limits.min_side,
            max_side=limits.max_side,
            max_pixels=limits.max_pixels,
            side_multiple=limits.side_multiple,
            max_queue=limits.max_queue,
            max_priority=limits.max_priority,
            retention=_seconds(limits.retention),
        ),
        sizes={size.aspect_ratio: (size.width, size.height) for size in response.sizes},
        environment=read_environment(response.environment),
        content_filter=ContentFilter(response.content_filter.name, response.content_filter.threshold)
        if response.HasField("content_filter")
        else None,
    )


def read_environment(environment: pb.Environment) -> Environment:
    """Return the environment of a server."""
    return Environment(
        fingerprint=environment.fingerprint,
        versions=dict(sorted(environment.versions.items())),
        hardware=environment.hardware,
        precision=environment.precision,
        fp32_math=environment.fp32_math,
        threads=environment.threads,
        max_batch=environment.max_batch,
        compiled=environment.compiled or "off",  # older servers do not set it
        reference=environment.reference,
    )


def _read_image(choice: pb.Choice, metadata: pb.ImageMetadata) -> Image:
    return Image(
        data=choice.raw,
        media_type=metadata.media_type,
        finish_reason=choice.finish_reason,
        seed=metadata.seed,
        width=metadata.width,
        height=metadata.height,
        steps=metadata.steps,
        guidance_scale=metadata.guidance_scale,
        high_noise_frac=metadata.high_noise_frac,
        scheduler=metadata.scheduler,
        base_calls=metadata.base_calls,
        refiner_calls=metadata.refiner_calls,
        request=read_request(metadata.request),
        sha256=metadata.sha256,
    )


def _result(images: tuple[Image, ...], metadata: pb.Metadata) -> Result:
    return Result(
        images=images,
        warnings=tuple(
            Warning(WARNING_CODES.word(warning.code) or WarningCode.UNSPECIFIED, warning.field, warning.message)
            for warning in metadata.warnings
        ),
        request_id=metadata.request_id,
        model=metadata.model,
        fingerprint=metadata.fingerprint,
        environment=read_environment(metadata.environment),
        waited=_seconds(metadata.waited),
        ran=_seconds(metadata.ran),
        metadata=MessageToDict(metadata, always_print_fields_with_no_presence=True),
    )


def _eta(message: pb.Queued | pb.Progress) -> float | None:
    return _seconds(message.eta) if message.HasField("eta") else None


def _seconds(duration: Duration) -> float:
    return duration.ToTimedelta().total_seconds()
