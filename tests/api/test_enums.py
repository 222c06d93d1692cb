"""Every value of the contract's enums is known everywhere: server, Python client, `t2i` and docs."""

import typing
from collections.abc import Callable, Iterator
from typing import Any

import click
import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor
from grpc_health.v1 import health_pb2
from serving import ROOT, request
from stepped_model import ENVIRONMENT, MODEL_INFO

from server.api import images, open_inference, requests, responses
from server.domain import Notice, Stage, Warning
from server.engine import events
from server.engine.interface import NOBODY
from server.settings import Settings
from server.stubs.inference_v2 import open_inference_pb2 as oip
from text_to_image_client import Format, OnDisconnect, ServingStatus, WarningCode
from text_to_image_client import Stage as ClientStage
from text_to_image_client._messages import build_request, read_event, read_request, read_result
from text_to_image_client.cli import main
from text_to_image_client.v1 import text_to_image_pb2 as pb

LIMITS = requests.limits_of(MODEL_INFO, Settings(_cli_parse_args=False))
TASK = requests.parse(request(), "id", MODEL_INFO, LIMITS, NOBODY)


def enums(message: Descriptor | Any) -> Iterator[EnumDescriptor]:
    yield from message.enum_types_by_name.values()
    inner = message.nested_types_by_name if isinstance(message, Descriptor) else message.message_types_by_name
    for each in inner.values():
        yield from enums(each)


def values(name: str) -> set[int]:
    """Return the numbers of an enum of the contract, without the unspecified 0."""
    (found,) = (each for each in enums(pb.DESCRIPTOR) if each.full_name == f"text_to_image.v1.{name}")
    return {value.number for value in found.values} - {0}


def parsed(**fields: Any) -> requests.ParsedRequest:
    return requests.parse(pb.GenerateRequest(data=pb.TaskData(prompt="x"), **fields), "id", MODEL_INFO, LIMITS, NOBODY)


def coded_by_server() -> set[int]:
    """Return the formats that the server accepts and reports in an image's metadata."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    found = set()
    for number in pb.Format.values():
        task = parsed(output=pb.Output(format=number))
        ready = events.ImageReady(0, 0, pixels, 1, 1)
        image = images.code(pixels, task.output.coding, 95)
        found.add(responses.image_metadata_message(task, ready, image).request.output.format)
    return found


def detached_by_server() -> set[int]:
    return {
        pb.ON_DISCONNECT_DETACH if parsed(request_id="x", on_disconnect=number).detached else pb.ON_DISCONNECT_CANCEL
        for number in pb.OnDisconnect.values()
    }


def staged_by_server() -> set[int]:
    return {responses.progress_message(events.Progress(0, stage, 1, 1, 0)).progress.stage for stage in Stage}


def warned_by_server() -> set[int]:
    warnings = [Warning(notice, "", "") for notice in Notice]
    finished = events.Finished((), 0, 0, ENVIRONMENT)
    return {each.code for each in responses.metadata_message(TASK, [], warnings, finished).warnings}


def read_by_client(field: str, name: str) -> Callable[[], set[int]]:
    """Return the numbers that the client reads as a word and writes as the same number."""

    def read() -> set[int]:
        found = set()
        for number in values(name):
            message = pb.GenerateRequest()
            room = message.output if field == "format" else message
            setattr(room, field, number)
            again = build_request("", {field: read_request(message)[field]})  # type: ignore[literal-required,misc]
            found.add(getattr(again.output if field == "format" else again, field))
        return found

    return read


def staged_by_client() -> set[int]:
    events = ((n, pb.StreamGenerateResponse(progress=pb.Progress(stage=n))) for n in pb.Stage.values())
    return {number for number, event in events if read_event(event, {}) is not None}


def warned_by_client() -> set[int]:
    metadata = pb.Metadata(warnings=[pb.Warning(code=number) for number in pb.Warning.Code.values()])
    warnings = read_result(pb.GenerateResponse(metadata=metadata)).warnings
    return {
        warning.code
        for warning, read in zip(metadata.warnings, warnings, strict=True)
        if read.code is not WarningCode.UNSPECIFIED
    }


ENUMS: dict[str, tuple[Callable[[], set[int]], Callable[[], set[int]]]] = {
    "Format": (coded_by_server, read_by_client("format", "Format")),
    "OnDisconnect": (detached_by_server, read_by_client("on_disconnect", "OnDisconnect")),
    "Stage": (staged_by_server, staged_by_client),
    "Warning.Code": (warned_by_server, warned_by_client),
}


def test_every_enum_of_the_contract_is_covered_here():
    assert {each.full_name for each in enums(pb.DESCRIPTOR)} == {f"text_to_image.v1.{name}" for name in ENUMS}


@pytest.mark.parametrize("name", ENUMS)
def test_server_and_client_know_every_value(name: str):
    for known in ENUMS[name]:
        assert known() == values(name)


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (Format, pb.Format),
        (OnDisconnect, pb.OnDisconnect),
        (ClientStage, pb.Stage),
        (Stage, pb.Stage),
        (WarningCode, pb.Warning.Code),
        (Notice, pb.Warning.Code),
    ],
    ids=lambda each: f"{each.__module__}.{each.__name__}" if isinstance(each, type) else each.DESCRIPTOR.name,
)
def test_python_enums_have_the_names_of_the_contract(words: Any, numbers: Any):
    prefix = numbers.Name(0).removesuffix("UNSPECIFIED")
    named = {f"{prefix}{word.upper()}" for word in words} | {numbers.Name(0)}
    assert named == set(numbers.keys())


def test_the_client_has_every_status_of_health_checks():
    assert set(ServingStatus) == set(health_pb2.HealthCheckResponse.ServingStatus.keys())


def test_t2i_offers_every_format():
    (option,) = (each for each in main.commands["generate"].params if each.name == "format_")
    assert isinstance(option.type, click.Choice)
    assert {f"FORMAT_{word.upper()}" for word in option.type.choices} == set(pb.Format.keys()) - {"FORMAT_UNSPECIFIED"}


def test_the_open_inference_protocol_takes_every_format():
    message = oip.ModelInferRequest()
    for number in values("Format"):
        message.parameters["format"].string_param = pb.Format.Name(number).removeprefix("FORMAT_").lower()
        (made,) = open_inference.read(message, 8).messages
        assert made.output.format == number


def test_the_docs_name_every_format():
    page = (ROOT / "docs/grpc.md").read_text()
    assert [name for name in sorted(pb.Format.keys()) if f"`{name}`" not in page] == ["FORMAT_UNSPECIFIED"]


@pytest.mark.parametrize("file", ["proto/text_to_image.proto", "clients/python/text_to_image_client/_types.py"])
def test_lists_of_precisions_are_complete(file: str):
    served = set(typing.get_args(Settings.model_fields["precision"].annotation)) - {"auto"}
    lists = [line for line in (ROOT / file).read_text().splitlines() if '"bf16", "fp16"' in line]
    assert lists
    for line in lists:
        assert all(f'"{precision}"' in line for precision in served), line
