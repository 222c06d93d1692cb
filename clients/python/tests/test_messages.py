"""Requests are built and answers are read, without a channel."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import EnumDescriptor, FileDescriptor

from text_to_image_client import (
    ContentFilter,
    Done,
    Event,
    Format,
    GenerateOptions,
    ImageReady,
    InvalidRequest,
    OnDisconnect,
    Preview,
    Progress,
    Queued,
    Stage,
    Warning,
    WarningCode,
)
from text_to_image_client._messages import _RULES, build_request, read_event, read_model, read_request, read_result
from text_to_image_client.v1 import text_to_image_pb2 as pb


def test_a_prompt_alone_requests_raw_bytes_up_to_the_channels_limit():
    request = build_request("cat napping", {})
    assert request == pb.GenerateRequest(
        data=pb.TaskData(prompt="cat napping"), output=pb.Output(raw=True, max_message_bytes=64 * 1024 * 1024)
    )


def test_every_option_has_its_field_in_the_request():
    options: GenerateOptions = {
        "negative_prompt": "dogs",
        "aspect_ratio": "16:9",
        "n": 2,
        "seed": 0,
        "steps": 30,
        "guidance_scale": 0,
        "high_noise_frac": 0.9,
        "scheduler": "heun",
        "width": 64,
        "height": 96,
        "format": "webp",
        "quality": 80,
        "model": "mini",
        "request_id": "mine",
        "priority": -1,
        "on_disconnect": "detach",
        "preview_interval": 5,
    }
    assert options.keys() == GenerateOptions.__annotations__.keys()
    assert build_request("cat", options) == pb.GenerateRequest(
        data=pb.TaskData(prompt="cat", model="mini"),
        parameter=pb.TaskParameter(aspect_ratio="16:9", negative_prompt="dogs", n=2, seed=0),
        sampling=pb.Sampling(steps=30, guidance_scale=0, high_noise_frac=0.9, scheduler="heun", width=64, height=96),
        output=pb.Output(
            format=pb.FORMAT_WEBP, quality=80, raw=True, max_message_bytes=64 * 1024 * 1024, preview_interval=5
        ),
        request_id="mine",
        priority=-1,
        on_disconnect=pb.ON_DISCONNECT_DETACH,
    )
    assert read_request(build_request("cat", options)) == {"prompt": "cat", **options}


@pytest.mark.parametrize("format_", Format)
def test_every_format_has_its_number_in_the_contract(format_: Format):
    request = build_request("cat", {"format": format_})
    assert pb.Format.Name(request.output.format) == f"FORMAT_{format_.name}"
    assert read_request(request) == {"prompt": "cat", "format": format_}


@pytest.mark.parametrize("choice", OnDisconnect)
def test_every_on_disconnect_has_its_number_in_the_contract(choice: OnDisconnect):
    request = build_request("cat", {"on_disconnect": choice})
    assert pb.OnDisconnect.Name(request.on_disconnect) == f"ON_DISCONNECT_{choice.name}"
    assert read_request(request) == {"prompt": "cat", "on_disconnect": choice}


def test_a_newer_format_is_read_and_rejected_in_a_request():
    newer = read_request(pb.GenerateRequest(output=pb.Output(format=99)))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=r"output\.format: format must be one of jpeg, .* is '99'"):
        build_request("cat", {"format": newer["format"]})


def _read_number(enum: str, number: int) -> object:
    """Return what the client makes of `number` as a value of `enum`."""
    match enum:
        case "Format":
            return read_request(pb.GenerateRequest(output=pb.Output(format=number))).get("format")  # type: ignore[arg-type]
        case "OnDisconnect":
            return read_request(pb.GenerateRequest(on_disconnect=number)).get("on_disconnect")  # type: ignore[arg-type]
        case "Stage":
            return read_event(pb.StreamGenerateResponse(progress=pb.Progress(stage=number)), {})  # type: ignore[arg-type]
        case "Warning.Code":
            metadata = pb.Metadata(warnings=[pb.Warning(code=number)])  # type: ignore[arg-type]
            return read_result(pb.GenerateResponse(metadata=metadata)).warnings[0].code
    raise AssertionError(f"no test reads the enum {enum}")


def _enums(parent: Any) -> Iterator[EnumDescriptor]:
    yield from parent.enum_types_by_name.values()
    messages = parent.message_types_by_name if isinstance(parent, FileDescriptor) else parent.nested_types_by_name
    for message in messages.values():
        yield from _enums(message)


@pytest.mark.parametrize("enum", list(_enums(pb.DESCRIPTOR)), ids=lambda enum: enum.name)
def test_every_enum_is_read_by_its_words_and_newer_values_raise_nothing(enum: EnumDescriptor):
    name = enum.full_name.removeprefix(f"{pb.DESCRIPTOR.package}.")
    newer = _read_number(name, 99)
    for value in enum.values[1:]:
        assert _read_number(name, value.number) not in (None, newer)


def test_seed_0_is_sent_and_none_is_not():
    assert build_request("cat", {"seed": 0}).parameter.HasField("seed")
    assert not build_request("cat", {"seed": None}).parameter.HasField("seed")


def test_values_no_message_can_carry_are_named_by_json_path():
    with pytest.raises(InvalidRequest) as caught:
        build_request(
            "\ud800",
            {
                "seed": -1,
                "n": 2**32,
                "negative_prompt": 3,  # type: ignore[typeddict-item]
                "high_noise_frac": "x",  # type: ignore[typeddict-item]
                "format": "gif",
                "on_disconnect": "stay",
            },
        )  # type: ignore[typeddict-item]
    assert {violation.field for violation in caught.value.violations} == {
        "data.prompt",
        "parameter.seed",
        "parameter.n",
        "parameter.negative-prompt",
        "sampling.highNoiseFrac",
        "output.format",
        "onDisconnect",
    }
    assert "on_disconnect must be one of cancel, detach, is 'stay'" in str(caught.value)
    assert f"format must be one of {', '.join(Format)}, is 'gif'" in str(caught.value)
    assert "seed must be a whole number from 0 to 4294967295, is -1" in str(caught.value)


def test_an_unknown_option_is_a_type_error():
    with pytest.raises(TypeError, match="no such option: sed"):
        build_request("cat", {"sed": 1})  # type: ignore[typeddict-unknown-key]


@pytest.fixture
def metadata(image_metadata: pb.ImageMetadata) -> pb.Metadata:
    metadata = pb.Metadata(request_id="mine", model="mini", fingerprint="abc", images=[image_metadata, image_metadata])
    metadata.images[1].seed = 8
    metadata.warnings.add(code=pb.Warning.CODE_SIZE_SNAPPED, field="sampling.width", message="100 became 96")
    metadata.ran.FromMilliseconds(1500)
    return metadata


def test_a_response_becomes_a_result(metadata: pb.Metadata):
    choices = [pb.Choice(finish_reason="success", raw=b"first"), pb.Choice(finish_reason="success", raw=b"second")]
    result = read_result(pb.GenerateResponse(data=pb.ResultData(choices=choices), metadata=metadata))
    assert [(image.data, image.seed, image.width, image.height) for image in result.images] == [
        (b"first", 7, 128, 96),
        (b"second", 8, 128, 96),
    ]
    assert result.warnings == (Warning(WarningCode.SIZE_SNAPPED, "sampling.width", "100 became 96"),)
    assert (result.request_id, result.model, result.fingerprint, result.waited, result.ran) == (
        *("mine", "mini", "abc"),
        *(0.0, 1.5),
    )
    assert result.metadata["images"][0]["refinerCalls"] == 4


def test_each_kind_of_event_is_read(metadata: pb.Metadata, image_metadata: pb.ImageMetadata):
    queued = pb.Queued(position=2)
    queued.eta.FromMilliseconds(2500)
    progress = pb.Progress(choice_index=1, stage=pb.STAGE_REFINER, step=3, steps=8)
    choice = pb.ChoiceReady(choice_index=0, choice=pb.Choice(raw=b"first"), metadata=image_metadata)
    preview = pb.Preview(choice_index=1, step=19, steps=24, raw=b"small")
    images = {}

    def read(**event: Any) -> Event | None:
        return read_event(pb.StreamGenerateResponse(**event), images)

    assert read(queued=queued, number=1) == Queued(2, 2.5, 1)
    assert read(queued=queued) == Queued(2, 2.5, 0), "from a service that numbers no events"
    assert read(progress=progress, number=3) == Progress(1, Stage.REFINER, 3, 8, None, 3)
    assert read(preview=preview, number=4) == Preview(1, 19, 24, b"small", 4)
    ready = read(choice=choice, number=5)
    assert isinstance(ready, ImageReady)
    assert (ready.image.data, ready.number) == (b"first", 5)
    done = read(done=pb.Done(metadata=metadata), number=6)
    assert isinstance(done, Done)
    assert (done.result.images, done.number) == ((ready.image,), 6)


@pytest.mark.parametrize(
    "newer",
    [pb.StreamGenerateResponse(), pb.StreamGenerateResponse(progress=pb.Progress(stage=99))],  # type: ignore[arg-type]
    ids=["event", "stage"],
)
def test_a_newer_event_or_stage_is_skipped(newer: pb.StreamGenerateResponse):
    assert read_event(newer, {}) is None


def test_a_newer_warning_keeps_its_message():
    response = pb.GenerateResponse()
    response.metadata.warnings.add(code=99, field="data.prompt", message="new")  # type: ignore[arg-type]
    assert read_result(response).warnings == (Warning(WarningCode.UNSPECIFIED, "data.prompt", "new"),)


def test_the_served_model_is_read_with_its_sizes():
    response = pb.GetModelResponse(name="mini", schedulers=["euler", "heun"])
    response.sizes.add(aspect_ratio="16:9", width=168, height=96)
    response.limits.max_images = 8
    response.limits.max_priority = -1
    response.limits.retention.FromSeconds(600)
    response.defaults.scheduler = "euler"
    response.environment.versions["torch"] = "2.13.0"
    model = read_model(response)
    assert (model.name, model.schedulers, model.limits.max_images) == ("mini", ("euler", "heun"), 8)
    assert (model.limits.max_priority, model.limits.retention) == (-1, 600.0)
    assert model.sizes == {"16:9": (168, 96)}
    assert model.environment.versions == {"torch": "2.13.0"}
    assert model.content_filter is None
    response.content_filter.name, response.content_filter.threshold = "open-nsfw 1.0.0", 0.5
    assert read_model(response).content_filter == ContentFilter("open-nsfw 1.0.0", 0.5)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("prompt", None, "data.prompt: prompt must be text, is None"),
        ("prompt", b"\xff" * 99, r"data.prompt: prompt must be text, is b.\\xff\\xff.*\.\.\. \(bytes\)"),
        ("steps", 3.5, "sampling.steps: steps must be a whole number from 1 to .*, is 3.5"),
        ("seed", 2**32, "parameter.seed: seed must be a whole number from 0 to 4294967295, is 4294967296"),
        ("guidance_scale", "high", "sampling.guidanceScale: guidance_scale must be a number from 0 to 50, is 'high'"),
        ("width", "64", "sampling.width: width must be a whole number of pixels .*, is '64'"),
        ("request_id", 7, "requestId: request_id must be text of at most 128 characters .*, is 7"),
        (
            "guidance_scale",
            10**400,
            "sampling.guidanceScale: guidance_scale must be a number .*, is 10+... .int.",
        ),
        ("priority", 2**40, "priority: priority must be a whole number from -2 to 2, is 1099511627776"),
    ],
)
def test_values_no_message_can_carry_are_reported_with_range_and_value(name: str, value: object, words: str):
    given: dict[str, Any] = {"prompt": "cat", name: value}
    with pytest.raises(InvalidRequest) as caught:
        build_request(given.pop("prompt"), given)  # type: ignore[arg-type]
    assert re.fullmatch(words, str(caught.value)), caught.value
    for python in ("Traceback", "expected", "argument", "object cannot"):
        assert python not in str(caught.value)


def test_every_option_has_a_rule_for_error_messages():
    assert _RULES.keys() == {"prompt", "after", *GenerateOptions.__annotations__}
