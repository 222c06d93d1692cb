"""The size of an error in a call's trailers stays within the limits of clients, for any request and method."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from bad_requests import LONG, PROMPTS, everything_wrong, tensors, unknown_tensors
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import PATIENCE
from stepped_model import SteppedModel

from server.api import errors, requests
from server.api.errors import InvalidRequest, Violation
from server.api.instill import InstillServicer, ModelPublicServicer
from server.api.open_inference import OpenInferenceServicer
from server.engine import events
from server.runtime import Runtime
from server.servicer import TextToImageServicer
from server.settings import Settings
from server.stubs.inference_v2 import open_inference_pb2 as oip
from server.stubs.inference_v2 import open_inference_pb2_grpc as oip_grpc
from server.stubs.model_model_v1alpha import model_public_pb2 as public
from server.stubs.model_model_v1alpha import model_public_pb2_grpc as public_grpc
from server.stubs.model_ray_v1alpha import user_defined_pb2 as user_defined
from server.stubs.model_ray_v1alpha import user_defined_pb2_grpc as user_defined_grpc
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

CALLS = 200  # gRPC refuses what is between a client's soft and its hard limit at random
MOST = 4096  # which nginx takes by default; clients take 8 KiB

TEXTS = st.text(max_size=50) | st.text("猫%\n", min_size=1, max_size=9).map(lambda text: text * 200)


def size_of(message: str, trailing: list[tuple[str, str | bytes]]) -> int:
    """Return the size of a call's trailers by HPACK's count: percent-encoded text, and base64 of binary values."""
    headers = {"grpc-message": len(grpc_percent_encoded(message)), "grpc-status": 2}
    for name, value in trailing:
        headers[name] = -(-len(value) * 4 // 3) if name.endswith("-bin") else len(value)
    return sum(32 + len(name) + length for name, length in headers.items())


def grpc_percent_encoded(message: str) -> str:
    """Encode as gRPC's specification says for Status-Message."""
    return "".join(chr(b) if 0x20 <= b <= 0x7E and b != 0x25 else f"%{b:02X}" for b in message.encode())


@settings(deadline=None)
@given(violations=st.lists(st.builds(Violation, TEXTS, TEXTS), min_size=1, max_size=30))
def test_the_status_of_any_invalid_request_fits_and_counts_omitted_violations(violations: list[Violation]):
    status = errors.status_of(InvalidRequest(violations))
    assert size_of(status.message, [("grpc-status-details-bin", status.SerializeToString())]) < MOST
    bad = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(bad)
    shown = len(bad.field_violations)
    others = len(violations) - shown
    assert shown >= 1
    assert status.message.endswith(f"; and {others} more") or not others
    for each, violation in zip(bad.field_violations, violations, strict=False):
        assert violation.description.startswith(each.description.removesuffix("..."))
        assert f"{each.field}: {each.description}" in status.message


@pytest.mark.parametrize("kind", [each for each in errors.STATUS if issubclass(each, events.EngineError)])
def test_the_status_of_other_errors_fits(kind: type[Exception]):
    error = kind("猫" * 9999, 2.5) if kind is events.ResourceExhausted else kind("猫" * 9999)
    status = errors.status_of(error)
    assert size_of(status.message, [("grpc-status-details-bin", status.SerializeToString())]) < MOST
    assert status.message.endswith("猫...")


def test_violations_that_fit_are_complete():
    violations = [Violation(f"field-{number}", "must be another") for number in range(20)]
    status = errors.status_of(InvalidRequest(violations))
    assert status.message == "; ".join(f"field-{number}: must be another" for number in range(20))


@pytest.mark.parametrize(
    ("indices", "ranges"), [([0], "0"), ([0, 1, 2], "0-2"), ([1, 3], "1,3"), ([0, 1, 4, 6, 7], "0-1,4,6-7")]
)
def test_indices_are_written_as_ranges(indices: list[int], ranges: str):
    assert requests.index_ranges(indices) == ranges


@pytest.fixture(scope="module")
def channel() -> Iterator[grpc.Channel]:
    """Yield a channel with default options to a server of every protocol in this process."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    model = SteppedModel()
    model.allow(1000)

    async def serve() -> tuple[Runtime, grpc.aio.Server, int]:
        runtime = Runtime(Settings(_cli_parse_args=False), lambda: model)
        server = grpc.aio.server(interceptors=runtime.interceptors)
        frontend = runtime.frontend
        pb_grpc.add_TextToImageServiceServicer_to_server(TextToImageServicer(frontend, 30), server)
        oip_grpc.add_GRPCInferenceServiceServicer_to_server(OpenInferenceServicer(frontend), server)
        user_defined_grpc.add_UserDefinedServiceServicer_to_server(InstillServicer(frontend), server)
        public_grpc.add_ModelPublicServiceServicer_to_server(ModelPublicServicer(frontend), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        await runtime.open()
        return runtime, server, port

    async def stop(runtime: Runtime, server: grpc.aio.Server) -> None:
        runtime.engine.stop()
        await server.stop(None)
        assert await runtime.close()

    runtime, server, port = asyncio.run_coroutine_threadsafe(serve(), loop).result(PATIENCE)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        asyncio.run_coroutine_threadsafe(stop(runtime, server), loop).result(PATIENCE)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE)
        loop.close()


def inputs(**parameter: Any) -> list[Struct]:
    given = {"data": {"prompt": " "}, "parameter": {"n": 99, "seed": LONG, "aspect-ratio": [LONG]} | parameter}
    return [json_format.ParseDict(given, Struct()) for _ in range(PROMPTS)]


Call = Callable[[grpc.Channel, list[tuple[str, str]]], object]
_first = pb_grpc.TextToImageServiceStub
_public = public_grpc.ModelPublicServiceStub
_infer = oip_grpc.GRPCInferenceServiceStub


def _instill(channel: grpc.Channel, metadata: list[tuple[str, str]]) -> object:
    sent = user_defined.CallRequest(task_inputs=inputs())
    return user_defined_grpc.UserDefinedServiceStub(channel).__call__(sent, metadata=metadata)


CASES: dict[str, Call] = {
    "Generate": lambda c, m: _first(c).Generate(everything_wrong(), metadata=m),
    "StreamGenerate": lambda c, m: list(_first(c).StreamGenerate(everything_wrong(), metadata=m)),
    "Attach": lambda c, m: list(_first(c).Attach(pb.AttachRequest(request_id="x" * 128), metadata=m)),
    "Attach to what is no name": lambda c, m: list(_first(c).Attach(pb.AttachRequest(request_id=LONG), metadata=m)),
    "Cancel": lambda c, m: _first(c).Cancel(pb.CancelRequest(request_id=LONG), metadata=m),
    "ModelInfer": lambda c, m: _infer(c).ModelInfer(tensors(scalar=False), metadata=m),
    "ModelInfer with one value for all": lambda c, m: _infer(c).ModelInfer(tensors(scalar=True), metadata=m),
    "ModelInfer with unknown names": lambda c, m: _infer(c).ModelInfer(unknown_tensors(), metadata=m),
    "ModelMetadata": lambda c, m: _infer(c).ModelMetadata(oip.ModelMetadataRequest(name=LONG), metadata=m),
    "__call__": _instill,
    "TriggerNamespaceModel": lambda c, m: _public(c).TriggerNamespaceModel(
        public.TriggerNamespaceModelRequest(model_id="stepped", task_inputs=inputs()), metadata=m
    ),
    "TriggerNamespaceLatestModel": lambda c, m: _public(c).TriggerNamespaceLatestModel(
        public.TriggerNamespaceLatestModelRequest(model_id=LONG, task_inputs=inputs()), metadata=m
    ),
}


def failed(channel: grpc.Channel, call: Call, request_id: str) -> tuple[grpc.StatusCode, status_pb2.Status, int]:
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, [("x-request-id", request_id)])
    error: Any = caught.value
    return error.code(), rpc_status.from_call(error), size_of(error.details(), error.trailing_metadata())


@pytest.mark.parametrize("name", CASES)
def test_the_trailers_of_every_method_fit_into_a_clients_limit(channel: grpc.Channel, name: str):
    for number in range(CALLS):
        code, status, size = failed(channel, CASES[name], f"{number}".rjust(128, "x"))
        assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), status
        assert status.code == code.value[0]
        assert size < MOST


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("ModelInfer", {f"steps[0-{PROMPTS - 1}]", f"prompt[0-{PROMPTS - 1}]", "n"}),
        ("ModelInfer with one value for all", {"steps", f"prompt[0-{PROMPTS - 1}]", "n"}),
        (
            "__call__",
            {f"task_inputs[0-{PROMPTS - 1}].{field}" for field in ("parameter.seed", "parameter.aspect-ratio")},
        ),
    ],
)
def test_the_same_violation_in_all_elements_is_reported_once(channel: grpc.Channel, name: str, fields: set[str]):
    _, status, _ = failed(channel, CASES[name], "mine")
    bad = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(bad)
    named = [each.field for each in bad.field_violations]
    assert fields <= set(named)
    assert len(named) == len(set(named)), "one violation for each field"
    assert " more" not in status.message
