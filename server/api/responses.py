"""Responses: the messages that callers get, made from the engine's events and from coded images."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

from google.protobuf.duration_pb2 import Duration

from server.api import images
from server.api.requests import CODINGS, ParsedRequest, RequestLimits, max_image_bytes
from server.domain import ASPECT_RATIOS, Environment, ImageRequest, ModelInfo, Notice, Stage, Warning, size_of
from server.engine import events
from text_to_image_client.v1 import text_to_image_pb2 as pb

_FORMATS = {coding: number for number, coding in CODINGS.items() if number != pb.FORMAT_UNSPECIFIED}
_STAGES = {stage: pb.Stage.Value(f"STAGE_{stage.name}") for stage in Stage}
_NOTICES = {notice: pb.Warning.Code.Value(f"CODE_{notice.name}") for notice in Notice}

_PREVIEW_QUALITY = 80


def code_image(parsed: ParsedRequest, event: events.ImageReady) -> images.CodedImage:
    """Code the event's image as requested, or smaller to fit into its message. Raises images.ImageTooLarge."""
    return images.code_within(event.pixels, parsed.output.coding, parsed.output.quality, _file_bytes(parsed))


def _file_bytes(parsed: ParsedRequest) -> int:
    """Return the largest image file that fits into its message, where it may travel in base64."""
    available = max_image_bytes(parsed)
    return available if parsed.output.raw else (available - 64) // 4 * 3  # 64: the data URI's prefix


def recoded_warning(parsed: ParsedRequest, image: images.CodedImage, index: int) -> Warning:
    """Return the warning of an image that is not coded as requested."""
    quality = f"of quality {image.quality}" if image.quality else "without loss"
    return Warning(
        Notice.IMAGE_RECODED,
        "output.maxMessageBytes",
        f"image {index} came as {pb.Format.Name(_FORMATS[image.coding])} {quality}, to fit into a message of "
        f"{parsed.output.max_message_bytes} bytes; raise output.maxMessageBytes to what your client can take",
    )


def choice_message(parsed: ParsedRequest, image: images.CodedImage, filtered: bool = False) -> pb.Choice:
    """Return a finished image; `filtered` if the content filter replaced it."""
    finish_reason = "content_filtered" if filtered else "success"
    if parsed.output.raw:
        return pb.Choice(finish_reason=finish_reason, raw=image.data)
    return pb.Choice(finish_reason=finish_reason, image=image.data_uri)


def image_metadata_message(
    parsed: ParsedRequest, event: events.ImageReady, image: images.CodedImage
) -> pb.ImageMetadata:
    """Return the values that reproduce one image."""
    request = parsed.image
    return pb.ImageMetadata(
        seed=event.seed,
        width=request.width,
        height=request.height,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        high_noise_frac=request.high_noise_frac,
        scheduler=request.scheduler,
        base_calls=event.base_calls,
        refiner_calls=event.refiner_calls,
        media_type=image.coding.media_type,
        request=_request_message(request, event.seed, image),
        sha256=hashlib.sha256(image.data).hexdigest(),
    )


def _request_message(request: ImageRequest, seed: int, image: images.CodedImage) -> pb.GenerateRequest:
    """Return the request for this image alone, with every default filled in; the inverse of requests.parse."""
    output = pb.Output(format=_FORMATS[image.coding])
    if not image.coding.lossless:
        output.quality = image.quality
    return pb.GenerateRequest(
        data=pb.TaskData(prompt=request.prompt),
        parameter=pb.TaskParameter(negative_prompt=request.negative_prompt, n=1, seed=seed),
        sampling=pb.Sampling(
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            high_noise_frac=request.high_noise_frac,
            scheduler=request.scheduler,
            width=request.width,
            height=request.height,
        ),
        output=output,
    )


def generate_response(
    parsed: ParsedRequest, choices: Mapping[int, pb.Choice], metadata: pb.Metadata
) -> pb.GenerateResponse:
    """Return all images, by index, in one message. Raises images.ImageTooLarge if they were coded for several."""
    response = pb.GenerateResponse(
        data=pb.ResultData(choices=[choices[index] for index in sorted(choices)]), metadata=metadata
    )
    if response.ByteSize() > parsed.output.max_message_bytes:
        raise images.ImageTooLarge(
            f"the images of {parsed.request_id}, which StreamGenerate began, do not fit into one message; use Attach"
        )
    return response


def metadata_message(
    parsed: ParsedRequest,
    image_metadata: Sequence[pb.ImageMetadata],
    warnings: Sequence[Warning],
    finished: events.Finished,
) -> pb.Metadata:
    """Return the metadata of a whole answer. `warnings` are those of coding the images."""
    return pb.Metadata(
        request_id=parsed.request_id,
        model=parsed.info.name,
        fingerprint=parsed.info.fingerprint,
        images=image_metadata,
        warnings=[
            pb.Warning(code=_NOTICES[each.notice], field=each.field, message=each.message)
            for each in (*parsed.warnings, *finished.warnings, *warnings)
        ],
        waited=_duration(finished.waited),
        ran=_duration(finished.ran),
        environment=_environment_message(finished.environment),
    )


def queued_message(event: events.Queued) -> pb.StreamGenerateResponse:
    """Return the event as a stream has it."""
    return pb.StreamGenerateResponse(queued=pb.Queued(position=event.position, eta=_duration(event.eta)))


def progress_message(event: events.Progress) -> pb.StreamGenerateResponse:
    """Return the event as a stream has it."""
    return pb.StreamGenerateResponse(
        progress=pb.Progress(
            choice_index=event.index,
            stage=_STAGES[event.stage],
            step=event.step,
            steps=event.steps,
            eta=_duration(event.eta),
        )
    )


def preview_message(parsed: ParsedRequest, event: events.Preview) -> pb.StreamGenerateResponse:
    """Return the event as a stream has it, coded as a small JPEG."""
    image = images.code_within(event.pixels, images.JPEG_SUBSAMPLED, _PREVIEW_QUALITY, _file_bytes(parsed))
    preview = pb.Preview(choice_index=event.index, step=event.step, steps=event.steps)
    if parsed.output.raw:
        preview.raw = image.data
    else:
        preview.image = image.data_uri
    return pb.StreamGenerateResponse(preview=preview)


def heartbeat_message(
    message: pb.StreamGenerateResponse, then: float, now: float, number: int
) -> pb.StreamGenerateResponse:
    """Return a `queued` or `progress` message of time `then` again, with the ETA as of `now`; one clock, in seconds.

    `number` is that of the newest event in the stream, which may be another one.
    """
    heartbeat = pb.StreamGenerateResponse()
    heartbeat.CopyFrom(message)
    heartbeat.number = number
    eta = heartbeat.queued.eta if heartbeat.HasField("queued") else heartbeat.progress.eta
    eta.CopyFrom(_duration(max(0.0, eta.ToMicroseconds() / 1e6 - (now - then))))
    return heartbeat


def model_message(info: ModelInfo, limits: RequestLimits) -> pb.GetModelResponse:
    """Return the served model, its defaults and the limits of the caller."""
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
