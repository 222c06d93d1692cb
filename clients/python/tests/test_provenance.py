"""Saved metadata: its requests, the differences of a new result, and the rejection of other files."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from text_to_image_client import InvalidRequest, Provenance, Request, Result
from text_to_image_client._messages import build_request, read_result
from text_to_image_client.v1 import text_to_image_pb2 as pb

SAVED: Request = {
    "prompt": 'a "red" apple 🍎\n',
    "negative_prompt": "",
    "n": 1,
    "seed": 2**32 - 1,
    "steps": 20,
    "guidance_scale": 0.1 + 0.2,
    "high_noise_frac": 0.8,
    "scheduler": "heun",
    "width": 128,
    "height": 96,
    "format": "jpeg_subsampled",
    "quality": 61,
}


def options_of(request: Request) -> Any:
    return {name: value for name, value in request.items() if name != "prompt"}


@pytest.fixture
def answer(image_metadata: pb.ImageMetadata) -> pb.GenerateResponse:
    """The service's answer with two images of one request."""
    image_metadata.request.CopyFrom(build_request(SAVED["prompt"], options_of(SAVED)))
    image_metadata.request.output.ClearField("raw")
    image_metadata.request.output.ClearField("max_message_bytes")
    image_metadata.sha256 = "1" * 64
    answer = pb.GenerateResponse(metadata=pb.Metadata(model="mini", fingerprint="a" * 64))
    answer.metadata.images.extend([image_metadata, image_metadata])
    answer.metadata.images[1].request.parameter.seed = 0
    answer.metadata.images[1].sha256 = "2" * 64
    answer.metadata.environment.CopyFrom(
        pb.Environment(
            fingerprint="e" * 64,
            versions={"server": "0.1.0", "torch": "2.13.0+cpu"},
            hardware="Intel(R) Xeon(R) Processor, AVX512",
            precision="fp32",
            fp32_math="matmul ieee, convolution ieee",
            threads=2,
            max_batch=1,
            compiled="off",
            reference="b" * 64,
        )
    )
    answer.data.choices.extend([pb.Choice(finish_reason="success", raw=b"image")] * 2)
    return answer


@pytest.fixture
def result(answer: pb.GenerateResponse) -> Result:
    return read_result(answer)


@pytest.fixture
def saved(result: Result) -> Provenance:
    return Provenance(json.loads(json.dumps(result.metadata)))


def test_each_images_request_survives_json(saved: Provenance, result: Result):
    assert saved.request(0) == result.images[0].request == SAVED
    assert saved.request(1) == result.images[1].request == {**SAVED, "seed": 0}


def test_all_images_are_one_request_whose_seed_wraps_around(saved: Provenance):
    assert saved.request() == {**SAVED, "n": 2}


@pytest.mark.parametrize(
    "shape", ["metadata", "answer", "names as in the proto file"], ids=["metadata", "answer", "proto names"]
)
def test_metadata_and_whole_answers_are_read_with_either_field_names(
    answer: pb.GenerateResponse, tmp_path: Path, shape: str
):
    content = MessageToDict(
        answer.metadata if shape == "metadata" else answer,
        preserving_proto_field_name=shape == "names as in the proto file",
    )
    file = tmp_path / "cat.json"
    file.write_text(json.dumps(content))
    assert Provenance.load(file).request() == {**SAVED, "n": 2}


@pytest.mark.parametrize(
    ("changes", "changed", "dropped"),
    [
        ({"seed": 0}, {"seed": 0}, set()),
        ({"prompt": "a pear", "steps": None}, {"prompt": "a pear"}, set()),
        ({"aspect_ratio": "16:9"}, {"aspect_ratio": "16:9"}, {"width", "height"}),
        ({"width": 256}, {"width": 256}, set()),
        ({"format": "png"}, {"format": "png"}, {"quality"}),
        ({"format": "webp", "quality": 9}, {"format": "webp", "quality": 9}, set()),
        ({"format": "jpeg_subsampled"}, {}, set()),
    ],
)
def test_given_options_change_the_saved_request(
    saved: Provenance, changes: Any, changed: dict[str, object], dropped: set[str]
):
    unchanged = {name: value for name, value in SAVED.items() if name not in dropped}
    assert saved.request(0, **changes) == unchanged | changed


def test_images_that_differ_in_more_than_seeds_need_an_index(answer: pb.GenerateResponse):
    answer.metadata.images[1].request.output.quality = 40
    saved = Provenance(MessageToDict(answer.metadata))
    with pytest.raises(InvalidRequest, match="differ in more than their seeds; choose one, 0 to 1"):
        saved.request()
    assert saved.request(1)["quality"] == 40


@pytest.mark.parametrize("number", [2, -1])
def test_an_index_without_an_image_is_rejected(saved: Provenance, number: int):
    with pytest.raises(InvalidRequest, match=f"there is no image {number} in the metadata, 0 to 1"):
        saved.request(number)


def test_equal_results_have_no_differences(saved: Provenance, result: Result):
    assert saved.differences(result) == ()


@pytest.mark.parametrize(
    ("change", "differences"),
    [
        ({"fingerprint": "c" * 64}, ["weights: aaaaaaaaaaaa... then, cccccccccccc... now"]),
        ({"fingerprint": "c" * 64, "reference": "c" * 64}, ["weights: aaaaaaaaaaaa... then, cccccccccccc... now"]),
        ({"reference": "c" * 64}, ["reference image: bbbbbbbbbbbb... then, cccccccccccc... now"]),
        ({"threads": 1}, ["threads: 2 then, 1 now"]),
        ({"precision": "bf16"}, ["precision: fp32 then, bf16 now"]),
        ({"hardware": "NVIDIA H200"}, ["hardware: Intel(R) Xeon(R) Processor, AVX512 then, NVIDIA H200 now"]),
        ({"fp32_math": "x"}, ["fp32 math: matmul ieee, convolution ieee then, x now"]),
        (
            {"versions": {"torch": "2.14.0", "cudnn": "9"}},
            ["server: 0.1.0 then, none now", "torch: 2.13.0+cpu then, 2.14.0 now", "cudnn: none then, 9 now"],
        ),
        (
            {"versions": {"server": "0.1.0", "torch": "2.13.0+cpu", "coding": "2"}},  # FORMAT_JPEG was RGB then
            ["coding: none then, 2 now"],
        ),
        ({}, ["environment: in a field that this client is too old to know"]),
    ],
)
def test_every_difference_is_named(saved: Provenance, result: Result, change: dict[str, Any], differences: list[str]):
    weights = change.pop("fingerprint", result.fingerprint)
    environment = replace(result.environment, fingerprint="f" * 64, **change)
    assert saved.differences(replace(result, fingerprint=weights, environment=environment)) == tuple(differences)


def test_other_bytes_are_a_difference_if_the_request_is_the_same(saved: Provenance, result: Result):
    first, second = result.images
    other = replace(second, sha256="9" * 64)
    assert saved.differences(replace(result, images=(first, other))) == ("image 1: other bytes",)
    changed = replace(other, request={**second.request, "steps": 3})
    assert saved.differences(replace(result, images=(first, changed))) == ()


def _without_request(metadata: dict[str, Any]) -> dict[str, Any]:
    for image in metadata["images"]:
        del image["request"]
    return metadata


def _with(**fields: object) -> Any:
    return lambda metadata: metadata | fields


@pytest.mark.parametrize(
    ("corrupt", "complaint"),
    [
        (lambda _: b"", "is not JSON: Expecting value"),
        (lambda _: b"\xff\xd8\xff\xee\x00\x0eAdobe", "is not JSON: 'utf-8' codec can't decode"),
        (lambda metadata: json.dumps(metadata).encode()[:-9], "is not JSON: "),
        (lambda _: [], "metadata must be a JSON object"),
        (lambda _: "cat", "metadata must be a JSON object"),
        (lambda _: {"metadata": 3}, "metadata must be a JSON object"),
        (lambda _: {}, "has no images"),
        (lambda _: {"data": {"choices": []}}, 'no field named "data"'),
        (lambda _: {"name": "text-to-image-client", "version": "1"}, 'no field named "name"'),
        (_with(images=[]), "has no images"),
        (_with(images=3), "not the metadata of an answer"),
        (_with(images=[3]), "not the metadata of an answer"),
        (_with(images=[{"seed": 7}]), "image 0 of the metadata lacks its request"),
        (_with(images=[{"seed": -7}]), "not the metadata of an answer"),
        (_without_request, "image 0 of the metadata lacks its request; is it of an old service?"),
    ],
)
def test_a_file_without_metadata_is_rejected_by_name(
    answer: pb.GenerateResponse, tmp_path: Path, corrupt: Any, complaint: str
):
    content = corrupt(copy.deepcopy(MessageToDict(answer.metadata)))
    file = tmp_path / "cat.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(InvalidRequest) as caught:
        Provenance.load(file)
    assert str(caught.value).startswith(f"{file}")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
