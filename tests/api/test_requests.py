"""Requests: defaults, ranges, and all violations reported at once."""

import contextlib
import math

import pytest
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from model_info import MODEL_INFO
from parsing import check, parse

from server.api import errors, images, requests
from server.domain import ASPECT_RATIOS, ModelInfo, Notice, size_of
from server.settings import Settings
from text_to_image_client.v1 import text_to_image_pb2 as pb


def violations(text: str, info: ModelInfo = MODEL_INFO) -> dict[str, str]:
    with pytest.raises(errors.InvalidRequest) as caught:
        parse(text, info)
    return {each.field: each.description for each in caught.value.violations}


def test_a_bare_prompt_gets_every_default():
    parsed = parse('{"data": {"prompt": "a cat"}}')
    assert parsed.image.seeds == (7,)
    assert (parsed.image.steps, parsed.image.guidance_scale, parsed.image.high_noise_frac) == (40, 5.0, 0.8)
    assert (parsed.image.width, parsed.image.height, parsed.image.scheduler) == (1024, 1024, "euler")
    assert parsed.output == requests.Output(images.JPEG, 95, raw=False, max_message_bytes=4194304)
    assert parsed.warnings == ()
    assert len(parsed.request_id) == 36


def test_json_names_are_instills_kebab_case():
    parsed = parse('{"data": {"prompt": "x"}, "parameter": {"aspect-ratio": "9:16", "negative-prompt": "y", "n": 2}}')
    assert (parsed.image.width, parsed.image.height) == (768, 1344)
    assert parsed.image.negative_prompt == "y"
    answer = json_format.MessageToDict(pb.Choice(finish_reason="success", image="data:"))
    assert answer == {"finish-reason": "success", "image": "data:"}


def test_seed_0_is_a_seed_and_image_k_has_seed_plus_k():
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
def test_each_invalid_field_is_reported_by_its_json_name(text: str, field: str):
    assert list(violations(text)) == [field]


def test_all_violations_are_reported_at_once():
    found = violations(
        '{"parameter": {"n": 99, "aspect-ratio": "x"}, "sampling": {"steps": 0}, "output": {"quality": 0}}'
    )
    assert set(found) == {"data.prompt", "parameter.n", "parameter.aspect-ratio", "sampling.steps", "output.quality"}
    assert found["parameter.n"] == "must be 1 to 8, is 99"


def test_a_size_that_the_autoencoder_cannot_make_is_snapped_with_a_warning():
    parsed = parse('{"data": {"prompt": "x"}, "sampling": {"width": 515, "height": 512}}')
    assert (parsed.image.width, parsed.image.height) == (512, 512)
    assert [(each.notice, each.field) for each in parsed.warnings] == [(Notice.SIZE_SNAPPED, "sampling.width")]


@pytest.mark.parametrize(
    ("max_pixels", "fields", "field"),
    [
        (1024 * 1024 - 1, "", "parameter.aspect-ratio"),
        (517 * 512, ', "sampling": {"width": 517, "height": 512}', "sampling.width"),
    ],
    ids=["the default size", "a size that is snapped upwards"],
)
def test_the_pixel_limit_holds_for_every_way_to_give_a_size(max_pixels: int, fields: str, field: str):
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
def test_an_option_without_effect_is_a_warning(fields: str, field: str):
    (warning,) = parse(f'{{"data": {{"prompt": "x"}}, {fields}}}').warnings
    assert (warning.notice, warning.field) == (Notice.OPTION_UNUSED, field)


@pytest.mark.parametrize(
    ("requested", "limit", "used", "texts"),
    [
        (0, 0, 0, []),
        (-2, 0, -2, []),
        (2, 2, 2, []),
        (2, 1, 1, ["2 became 1, the highest that is allowed here"]),
        (0, -1, -1, ["0 became -1, the highest that is allowed here"]),
    ],
)
def test_a_priority_above_the_limit_is_lowered_with_a_warning(requested: int, limit: int, used: int, texts: list[str]):
    message = json_format.ParseDict({"data": {"prompt": "x"}, "priority": requested}, pb.GenerateRequest())
    parsed = check(message, limits=requests.limits_of(MODEL_INFO, Settings(max_priority=limit)))
    assert parsed.priority == used
    assert [each.message for each in parsed.warnings] == texts
    assert {(each.notice, each.field) for each in parsed.warnings} <= {(Notice.PRIORITY_LOWERED, "priority")}


def test_previews_in_generate_are_a_warning():
    parsed = parse('{"data": {"prompt": "x"}, "output": {"previewInterval": 2}}')
    assert (parsed.output.preview_interval, parsed.warnings) == (2, ())
    whole = requests.in_one_message(parsed)
    assert whole.output.preview_interval == 0
    assert [(each.notice, each.field) for each in whole.warnings] == [(Notice.OPTION_UNUSED, "output.previewInterval")]


def test_a_high_noise_frac_without_a_refiner_is_an_error():
    alone = ModelInfo(**{**vars(MODEL_INFO), "has_refiner": False, "default_high_noise_frac": 1.0})
    assert parse('{"data": {"prompt": "x"}}', alone).image.high_noise_frac == 1.0
    assert list(violations('{"data": {"prompt": "x"}, "sampling": {"highNoiseFrac": 0.8}}', alone)) == [
        "sampling.highNoiseFrac"
    ]


@pytest.mark.parametrize("native_side", [128, 256, 512, 768, 1024])
@pytest.mark.parametrize("ratio", sorted(ASPECT_RATIOS))
def test_aspect_ratios_keep_shape_and_area_at_every_native_size(ratio: str, native_side: int):
    multiple = 4 if native_side < 256 else 8
    width, height = size_of(ratio, native_side, multiple)
    across, down = map(int, ratio.split(":"))
    assert width % multiple == height % multiple == 0
    assert math.isclose(width / height, across / down, rel_tol=0.07)
    assert math.isclose(width * height, native_side**2, rel_tol=0.2)


def test_the_nine_sizes_of_sdxl_are_those_of_the_paper():
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
def test_any_decodable_request_is_parsed_or_invalid(data: bytes):
    message = pb.GenerateRequest()
    with contextlib.suppress(DecodeError):
        message.ParseFromString(data)
        with contextlib.suppress(errors.InvalidRequest):
            check(message)


@settings(deadline=None)  # how long one takes says how busy the machine is
@given(st.text(min_size=1, max_size=200))
def test_any_unicode_prompt_that_is_not_blank_is_unchanged(prompt: str):
    message = pb.GenerateRequest(data=pb.TaskData(prompt=prompt))
    if prompt.strip():
        assert check(message).image.prompt == prompt
    else:
        with pytest.raises(errors.InvalidRequest):
            check(message)
