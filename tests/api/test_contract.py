"""What the contract promises about requests: defaults, ranges, and every violation told at once."""

import contextlib
import dataclasses
import math

import grpc
import numpy as np
import pytest
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from model_info import LIMITS, MODEL_INFO

from server.api import errors, images, requests, responses
from server.domain import ASPECT_RATIOS, ModelInfo, Notice, Warning, size_of
from server.engine import events
from server.engine.interface import NOBODY
from server.settings import Settings
from text_to_image_client.v1 import text_to_image_pb2 as pb


def parse(text: str, info: ModelInfo = MODEL_INFO) -> requests.ParsedRequest:
    message = json_format.Parse(text, pb.GenerateRequest())
    return check(message, info, requests.limits_of(info, Settings()))


def check(
    message: pb.GenerateRequest, info: ModelInfo = MODEL_INFO, limits: requests.RequestLimits = LIMITS
) -> requests.ParsedRequest:
    return requests.parse(message, requests.request_id_of(message), info, limits, NOBODY, draw_seed=lambda: 7)


def violations(text: str, info: ModelInfo = MODEL_INFO) -> dict[str, str]:
    with pytest.raises(errors.InvalidRequest) as caught:
        parse(text, info)
    return {each.field: each.description for each in caught.value.violations}


def test_a_bare_prompt_gets_every_default():
    task = parse('{"data": {"prompt": "a cat"}}')
    assert task.image.seeds == (7,)
    assert (task.image.steps, task.image.guidance_scale, task.image.high_noise_frac) == (40, 5.0, 0.8)
    assert (task.image.width, task.image.height, task.image.scheduler) == (1024, 1024, "euler")
    assert task.output == requests.Output(images.JPEG, 95, raw=False, max_message_bytes=4194304)
    assert task.warnings == ()
    assert len(task.request_id) == 36


def test_instills_kebab_case_is_the_json_of_the_contract():
    task = parse('{"data": {"prompt": "x"}, "parameter": {"aspect-ratio": "9:16", "negative-prompt": "y", "n": 2}}')
    assert (task.image.width, task.image.height) == (768, 1344)
    assert task.image.negative_prompt == "y"
    answer = json_format.MessageToDict(pb.Choice(finish_reason="success", image="data:"))
    assert answer == {"finish-reason": "success", "image": "data:"}


def test_seed_zero_is_a_seed_and_image_k_has_seed_plus_k():
    assert parse('{"data": {"prompt": "x"}, "parameter": {"seed": 0, "n": 3}}').image.seeds == (0, 1, 2)
    assert parse('{"data": {"prompt": "x"}, "parameter": {"seed": 4294967295, "n": 2}}').image.seeds == (4294967295, 0)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("{}", "data.prompt"),
        ('{"data": {"prompt": " \\t\\n"}}', "data.prompt"),
        (f'{{"data": {{"prompt": "{"x" * 10_001}"}}}}', "data.prompt"),
        ('{"data": {"prompt": "x", "model": "other"}}', "data.model"),
        ('{"data": {"prompt": "x"}, "requestId": "a b"}', "requestId"),
        ('{"data": {"prompt": "x"}, "parameter": {"n": 0}}', "parameter.n"),
        ('{"data": {"prompt": "x"}, "parameter": {"n": 9}}', "parameter.n"),
        ('{"data": {"prompt": "x"}, "parameter": {"aspect-ratio": "1:2"}}', "parameter.aspect-ratio"),
        (
            f'{{"data": {{"prompt": "x"}}, "parameter": {{"negative-prompt": "{"x" * 10_001}"}}}}',
            "parameter.negative-prompt",
        ),
        ('{"data": {"prompt": "x"}, "sampling": {"steps": 0}}', "sampling.steps"),
        ('{"data": {"prompt": "x"}, "sampling": {"steps": 151}}', "sampling.steps"),
        ('{"data": {"prompt": "x"}, "sampling": {"guidanceScale": -0.1}}', "sampling.guidanceScale"),
        ('{"data": {"prompt": "x"}, "sampling": {"guidanceScale": "NaN"}}', "sampling.guidanceScale"),
        ('{"data": {"prompt": "x"}, "sampling": {"guidanceScale": "Infinity"}}', "sampling.guidanceScale"),
        ('{"data": {"prompt": "x"}, "sampling": {"highNoiseFrac": 0}}', "sampling.highNoiseFrac"),
        ('{"data": {"prompt": "x"}, "sampling": {"highNoiseFrac": 1.01}}', "sampling.highNoiseFrac"),
        ('{"data": {"prompt": "x"}, "sampling": {"scheduler": "plms"}}', "sampling.scheduler"),
        ('{"data": {"prompt": "x"}, "sampling": {"width": 512}}', "sampling.height"),
        ('{"data": {"prompt": "x"}, "sampling": {"height": 512}}', "sampling.width"),
        ('{"data": {"prompt": "x"}, "sampling": {"width": 512, "height": 5000}}', "sampling.height"),
        ('{"data": {"prompt": "x"}, "sampling": {"width": 4096, "height": 4096}}', "sampling.width"),
        (
            '{"data": {"prompt": "x"}, "sampling": {"width": 512, "height": 512}, "parameter": {"aspect_ratio":"1:1"}}',
            "parameter.aspect-ratio",
        ),
        ('{"data": {"prompt": "x"}, "output": {"format": 9}}', "output.format"),
        ('{"data": {"prompt": "x"}, "output": {"quality": 101}}', "output.quality"),
        ('{"data": {"prompt": "x"}, "output": {"maxMessageBytes": 100}}', "output.maxMessageBytes"),
        ('{"data": {"prompt": "x"}, "priority": 3}', "priority"),
        ('{"data": {"prompt": "x"}, "priority": -3}', "priority"),
        ('{"data": {"prompt": "x"}, "requestId": "x", "onDisconnect": 3}', "onDisconnect"),
        ('{"data": {"prompt": "x"}, "onDisconnect": "ON_DISCONNECT_DETACH"}', "requestId"),
    ],
)
def test_each_bad_field_is_named_in_its_json_words(text: str, field: str):
    assert list(violations(text)) == [field]


def test_all_violations_of_a_request_are_told_at_once():
    found = violations(
        '{"parameter": {"n": 99, "aspect-ratio": "x"}, "sampling": {"steps": 0}, "output": {"quality": 0}}'
    )
    assert set(found) == {"data.prompt", "parameter.n", "parameter.aspect-ratio", "sampling.steps", "output.quality"}
    assert found["parameter.n"] == "must be 1 to 8, is 99"


def test_a_size_between_two_that_the_autoencoder_can_make_is_snapped_with_a_warning():
    task = parse('{"data": {"prompt": "x"}, "sampling": {"width": 515, "height": 512}}')
    assert (task.image.width, task.image.height) == (512, 512)
    assert [(each.notice, each.field) for each in task.warnings] == [(Notice.SIZE_SNAPPED, "sampling.width")]


@pytest.mark.parametrize(
    ("max_pixels", "fields", "field"),
    [
        (1024 * 1024 - 1, "", "parameter.aspect-ratio"),
        (517 * 512, ', "sampling": {"width": 517, "height": 512}', "sampling.width"),
    ],
    ids=["the default size", "a size that is snapped upwards"],
)
def test_no_way_of_asking_for_a_size_makes_more_pixels_than_are_allowed(max_pixels: int, fields: str, field: str):
    message = json_format.Parse(f'{{"data": {{"prompt": "x"}}{fields}}}', pb.GenerateRequest())
    with pytest.raises(errors.InvalidRequest) as caught:
        check(message, limits=requests.limits_of(MODEL_INFO, Settings(max_pixels=max_pixels)))
    assert [each.field for each in caught.value.violations] == [field]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ('"parameter": {"negative-prompt": "y"}, "sampling": {"guidanceScale": 1}', "parameter.negative-prompt"),
        ('"output": {"format": "FORMAT_PNG", "quality": 50}', "output.quality"),
        ('"output": {"format": "FORMAT_WEBP_LOSSLESS", "quality": 50}', "output.quality"),
    ],
)
def test_an_option_without_effect_is_told(fields: str, field: str):
    (warning,) = parse(f'{{"data": {{"prompt": "x"}}, {fields}}}').warnings
    assert (warning.notice, warning.field) == (Notice.OPTION_UNUSED, field)


@pytest.mark.parametrize(
    ("asked", "ceiling", "given", "told"),
    [
        (0, 0, 0, []),
        (-2, 0, -2, []),
        (2, 2, 2, []),
        (2, 1, 1, ["2 became 1, the highest that is allowed here"]),
        (0, -1, -1, ["0 became -1, the highest that is allowed here"]),
    ],
)
def test_a_priority_above_the_ceiling_is_lowered_with_a_warning(asked: int, ceiling: int, given: int, told: list[str]):
    message = json_format.ParseDict({"data": {"prompt": "x"}, "priority": asked}, pb.GenerateRequest())
    task = check(message, limits=requests.limits_of(MODEL_INFO, Settings(max_priority=ceiling)))
    assert task.priority == given
    assert [each.message for each in task.warnings] == told
    assert {(each.notice, each.field) for each in task.warnings} <= {(Notice.PRIORITY_LOWERED, "priority")}


def test_previews_have_no_effect_where_there_are_no_events_and_that_is_told():
    task = parse('{"data": {"prompt": "x"}, "output": {"previewInterval": 2}}')
    assert (task.output.preview_interval, task.warnings) == (2, ())
    whole = requests.in_one_message(task)
    assert whole.output.preview_interval == 0
    assert [(each.notice, each.field) for each in whole.warnings] == [(Notice.OPTION_UNUSED, "output.previewInterval")]


def test_images_of_one_message_share_its_room_evenly():
    alone = parse('{"data": {"prompt": "x"}, "parameter": {"n": 4}}')
    assert requests.max_image_bytes(requests.in_one_message(alone)) == requests.max_image_bytes(alone) // 4


def test_an_answer_that_does_not_fit_into_one_message_says_how_to_get_it():
    task = parse('{"data": {"prompt": "x"}, "output": {"maxMessageBytes": 16384}, "requestId": "mine"}')
    with pytest.raises(images.ImageTooLarge, match=r"the images of mine, .* use Attach"):
        responses.generate_response(task, {0: pb.Choice(raw=b"x" * 16384)}, pb.Metadata())


def test_asking_for_a_refiner_that_is_not_served_is_an_error_and_not_silence():
    alone = ModelInfo(**{**vars(MODEL_INFO), "has_refiner": False, "default_high_noise_frac": 1.0})
    assert parse('{"data": {"prompt": "x"}}', alone).image.high_noise_frac == 1.0
    assert list(violations('{"data": {"prompt": "x"}, "sampling": {"highNoiseFrac": 0.8}}', alone)) == [
        "sampling.highNoiseFrac"
    ]


@pytest.mark.parametrize("native_side", [128, 256, 512, 768, 1024])
@pytest.mark.parametrize("ratio", sorted(ASPECT_RATIOS))
def test_every_aspect_ratio_has_its_shape_at_every_native_size(ratio: str, native_side: int):
    multiple = 4 if native_side < 256 else 8
    width, height = size_of(ratio, native_side, multiple)
    across, down = map(int, ratio.split(":"))
    assert width % multiple == height % multiple == 0
    assert math.isclose(width / height, across / down, rel_tol=0.07)
    assert math.isclose(width * height, native_side**2, rel_tol=0.2)


def test_the_nine_sizes_of_sdxl_are_the_published_ones():
    assert {ratio: size_of(ratio, 1024, 8) for ratio in ASPECT_RATIOS} == {
        "9:21": (672, 1600),
        "9:16": (768, 1344),
        "2:3": (768, 1152),
        "4:5": (912, 1136),
        "1:1": (1024, 1024),
        "5:4": (1136, 912),
        "3:2": (1152, 768),
        "16:9": (1344, 768),
        "21:9": (1600, 672),
    }


@settings(deadline=None)  # how long one takes says how busy the machine is
@given(st.binary(max_size=300))
def test_no_bytes_that_decode_as_a_request_make_parsing_fail_otherwise_than_by_violations(data: bytes):
    message = pb.GenerateRequest()
    with contextlib.suppress(DecodeError):
        message.ParseFromString(data)
        with contextlib.suppress(errors.InvalidRequest):
            check(message)


@settings(deadline=None)  # how long one takes says how busy the machine is
@given(st.text(min_size=1, max_size=200))
def test_any_unicode_prompt_that_is_not_blank_is_taken_as_it_is(prompt: str):
    message = pb.GenerateRequest(data=pb.TaskData(prompt=prompt))
    if prompt.strip():
        assert check(message).image.prompt == prompt
    else:
        with pytest.raises(errors.InvalidRequest):
            check(message)


def metadata_of(task: requests.ParsedRequest, index: int, coding: images.Coding, quality: int) -> pb.ImageMetadata:
    pixels = np.zeros((8, 8, 3), np.uint8)
    event = events.ImageReady(index, task.image.seeds[index], pixels, base_calls=150, refiner_calls=150)
    return responses.image_metadata_message(task, event, images.code(pixels, coding, quality, smaller=True))


PROMPTS = st.text(min_size=1, max_size=40).filter(str.strip)
SIZES = st.fixed_dictionaries({"width": st.integers(256, 4096), "height": st.integers(256, 1024)})
RATIOS = st.fixed_dictionaries({"aspect-ratio": st.sampled_from(sorted(ASPECT_RATIOS))})
CODINGS = [
    *(images.JPEG, images.JPEG_RGB, images.JPEG_SUBSAMPLED, images.PNG),
    *(images.WEBP, images.WEBP_LOSSLESS),
]


@settings(deadline=None)  # how long one takes says how busy the machine is
@given(
    data=st.fixed_dictionaries({"prompt": PROMPTS}, optional={"model": st.just("mini")}),
    parameter=st.fixed_dictionaries(
        {}, optional={"negative-prompt": st.text(), "n": st.integers(1, 8), "seed": st.integers(0, 2**32 - 1)}
    ),
    sampling=st.fixed_dictionaries(
        {},
        optional={
            "steps": st.integers(1, 150),
            "guidanceScale": st.floats(0, 50),
            "highNoiseFrac": st.floats(0, 1, exclude_min=True),
            "scheduler": st.sampled_from(MODEL_INFO.schedulers),
        },
    ),
    size=st.one_of(st.just({}), SIZES, RATIOS),
    coding=st.sampled_from(CODINGS),
    quality=st.integers(1, 100),
)
def test_the_request_told_with_each_image_asks_for_that_image_and_nothing_else(
    data: dict, parameter: dict, sampling: dict, size: dict, coding: images.Coding, quality: int
):
    where = parameter if "aspect-ratio" in size else sampling
    where |= size
    asked = {"data": data, "parameter": parameter, "sampling": sampling, "requestId": "mine", "output": {"raw": True}}
    task = check(json_format.ParseDict(asked, pb.GenerateRequest()))
    for index, seed in enumerate(task.image.seeds):
        told = json_format.MessageToJson(metadata_of(task, index, coding, quality).request)
        again = parse(told)
        assert again.image == dataclasses.replace(task.image, seeds=(seed,))
        assert again.output.coding is coding
        assert coding.lossless or again.output.quality == quality
        assert {each.notice for each in again.warnings} <= {Notice.OPTION_UNUSED}
        assert again.request_id != "mine"


def test_the_metadata_of_the_longest_prompts_fits_into_what_the_images_leave_of_a_message():
    message = pb.GenerateRequest(data=pb.TaskData(prompt="猫" * 10_000))
    message.parameter.negative_prompt = "犬" * 10_000
    message.parameter.n = 8
    message.parameter.seed = 2**32 - 8
    task = requests.in_one_message(check(message))
    coded = images.CodedImage(b"", images.WEBP_LOSSLESS, 0, smaller=True)
    metadata = responses.metadata_message(
        task,
        [metadata_of(task, index, images.JPEG_SUBSAMPLED, 95) for index in range(8)],
        [responses.recoded_warning(task, coded, index) for index in range(8)],
        events.Finished(
            (Warning(Notice.PROMPT_TRUNCATED, "parameter.negative-prompt", "犬" * 300),) * 2,
            1e6,
            1e6,
            MODEL_INFO.environment,
        ),
    )
    assert metadata.ByteSize() <= task.output.max_message_bytes - 8 * requests.max_image_bytes(task)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidRequest([errors.Violation("data.prompt", "is required")]), grpc.StatusCode.INVALID_ARGUMENT),
        (events.ResourceExhausted("full", 2.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.Loading("loading"), grpc.StatusCode.UNAVAILABLE),
        (events.Draining("draining"), grpc.StatusCode.UNAVAILABLE),
        (events.DeviceUnavailable("about to end"), grpc.StatusCode.UNAVAILABLE),
        (events.DeviceLost("hangs"), grpc.StatusCode.ABORTED),
        (events.DeadlineExceeded("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (events.Cancelled("gone"), grpc.StatusCode.CANCELLED),
        (events.ModelFailed("broken"), grpc.StatusCode.INTERNAL),
        (errors.UnknownJob("who?"), grpc.StatusCode.NOT_FOUND),
        (errors.JobAlreadyExists("taken"), grpc.StatusCode.ALREADY_EXISTS),
        (errors.InternalError(), grpc.StatusCode.INTERNAL),
    ],
)
def test_every_error_has_its_status(error: Exception, code: grpc.StatusCode):
    assert errors.status_of(error).code == code.value[0]


def test_a_bad_request_and_a_full_queue_carry_googles_details():
    bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    status = errors.status_of(errors.InvalidRequest([errors.Violation("data.prompt", "is required")]))
    assert status.details[0].Unpack(bad)
    assert bad.field_violations[0].field == "data.prompt"
    assert errors.status_of(events.ResourceExhausted("full", 2.5)).details[0].Unpack(retry)
    assert retry.retry_delay.ToSeconds() == 2


def test_a_lost_device_is_named_by_google_s_error_info():
    lost = error_details_pb2.ErrorInfo()
    assert errors.status_of(events.DeviceLost("hangs")).details[0].Unpack(lost)
    assert (lost.reason, lost.domain) == ("DEVICE_LOST", "text_to_image.v1")
