"""Responses: metadata that reproduces an image, and messages within their limits."""

import dataclasses

import numpy as np
import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st
from model_info import MODEL_INFO
from parsing import check, parse

from server.api import images, requests, responses
from server.domain import ASPECT_RATIOS, Notice, Warning
from server.engine import events
from text_to_image_client.v1 import text_to_image_pb2 as pb


def test_images_of_one_message_share_its_space_evenly():
    alone = parse('{"data": {"prompt": "x"}, "parameter": {"n": 4}}')
    assert requests.max_image_bytes(requests.in_one_message(alone)) == requests.max_image_bytes(alone) // 4


def test_the_error_of_an_answer_too_large_for_one_message_suggests_attach():
    parsed = parse('{"data": {"prompt": "x"}, "output": {"maxMessageBytes": 16384}, "requestId": "mine"}')
    with pytest.raises(images.ImageTooLarge, match=r"the images of mine, .* use Attach"):
        responses.generate_response(parsed, {0: pb.Choice(raw=b"x" * 16384)}, pb.Metadata())


def metadata_of(parsed: requests.ParsedRequest, index: int, coding: images.Coding, quality: int) -> pb.ImageMetadata:
    pixels = np.zeros((8, 8, 3), np.uint8)
    event = events.ImageReady(index, parsed.image.seeds[index], pixels, base_calls=150, refiner_calls=150)
    return responses.image_metadata_message(parsed, event, images.code(pixels, coding, quality, smaller=True))


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
def test_the_request_in_an_images_metadata_reproduces_that_image(
    data: dict, parameter: dict, sampling: dict, size: dict, coding: images.Coding, quality: int
):
    where = parameter if "aspect-ratio" in size else sampling
    where |= size
    asked = {"data": data, "parameter": parameter, "sampling": sampling, "requestId": "mine", "output": {"raw": True}}
    parsed = check(json_format.ParseDict(asked, pb.GenerateRequest()))
    for index, seed in enumerate(parsed.image.seeds):
        request = json_format.MessageToJson(metadata_of(parsed, index, coding, quality).request)
        again = parse(request)
        assert again.image == dataclasses.replace(parsed.image, seeds=(seed,))
        assert again.output.coding is coding
        assert coding.lossless or again.output.quality == quality
        assert {each.notice for each in again.warnings} <= {Notice.OPTION_UNUSED}
        assert again.request_id != "mine"


def test_the_metadata_of_the_longest_prompts_fits_next_to_the_images():
    message = pb.GenerateRequest(data=pb.TaskData(prompt="猫" * 10_000))
    message.parameter.negative_prompt = "犬" * 10_000
    message.parameter.n = 8
    message.parameter.seed = 2**32 - 8
    parsed = requests.in_one_message(check(message))
    coded = images.CodedImage(b"", images.WEBP_LOSSLESS, 0, smaller=True)
    metadata = responses.metadata_message(
        parsed,
        [metadata_of(parsed, index, images.JPEG_SUBSAMPLED, 95) for index in range(8)],
        [responses.recoded_warning(parsed, coded, index) for index in range(8)],
        events.Finished(
            (Warning(Notice.PROMPT_TRUNCATED, "parameter.negative-prompt", "犬" * 300),) * 2,
            1e6,
            1e6,
            MODEL_INFO.environment,
        ),
    )
    assert metadata.ByteSize() <= parsed.output.max_message_bytes - 8 * requests.max_image_bytes(parsed)
