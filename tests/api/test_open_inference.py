"""The Open Inference Protocol: its messages, real servers, and Triton's own client."""

import base64
import io
import json
import math
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpcurl import grpcurl
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from refusals import refused
from scraping import scrape
from serving import LONG_JOB, PATIENCE, ROOT, ServerProcess, connect, first_step, request

from server import __version__
from server.api import errors, open_inference
from server.api.images import ImageTooLarge
from server.stubs.inference_v2 import open_inference_pb2 as oip
from server.stubs.inference_v2 import open_inference_pb2_grpc as oip_grpc
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

SERVICE = "inference.GRPCInferenceService"
Tensor = oip.ModelInferRequest.InferInputTensor
Parameter = oip.InferParameter


@pytest.fixture(scope="module")
def kserve() -> Iterator[ServerProcess]:
    server = ServerProcess("--kserve", "--metrics-listen", "127.0.0.1:0").wait_until_ready()
    yield server
    assert server.stop() == 0, server.log
    assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def channel(kserve: ServerProcess) -> Iterator[grpc.Channel]:
    with connect(kserve) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> oip_grpc.GRPCInferenceServiceStub:
    return oip_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture
def own_stub(channel: grpc.Channel) -> pb_grpc.TextToImageServiceStub:
    return pb_grpc.TextToImageServiceStub(channel)


@pytest.fixture(scope="module")
def model(channel: grpc.Channel) -> str:
    return pb_grpc.TextToImageServiceStub(channel).GetModel(pb.GetModelRequest(), timeout=PATIENCE).name


def texts(name: str, *values: str) -> Tensor:
    contents = oip.InferTensorContents(bytes_contents=[value.encode() for value in values])
    return Tensor(name=name, datatype="BYTES", shape=[len(values)], contents=contents)


def asked(*inputs: Tensor, model: str = "mini", **parameters: int | str | float) -> oip.ModelInferRequest:
    fields = {int: "int64_param", str: "string_param", float: "double_param", bool: "bool_param"}
    return oip.ModelInferRequest(
        model_name=model,
        inputs=inputs,
        parameters={name: Parameter(**{fields[type(value)]: value}) for name, value in parameters.items()},
    )


def raw(*inputs: tuple[str, str, list[int], bytes]) -> oip.ModelInferRequest:
    message = oip.ModelInferRequest()
    for name, datatype, shape, data in inputs:
        message.inputs.add(name=name, datatype=datatype, shape=shape)
        message.raw_input_contents.append(data)
    return message


def packed(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def torn_prompt() -> Tensor:
    """Return a prompt that does not match its shape."""
    return Tensor(name="prompt", datatype="BYTES", shape=[9], contents={"bytes_contents": [b"a cat"]})


def unreadable(message: oip.ModelInferRequest) -> Sequence[errors.Violation]:
    try:
        return open_inference.read(message, 8).violations
    except errors.InvalidRequest as error:
        return error.violations


class TestRequests:
    """Reading of tensors and parameters, without a server."""

    def test_every_input_and_parameter_has_its_place_in_our_contract(self):
        message = raw(
            ("prompt", "BYTES", [1], packed("a cat 🐈".encode())),
            ("seed", "UINT64", [1], np.uint64(2**32 - 1).tobytes()),
            ("steps", "INT8", [1, 1], np.int8(9).tobytes()),
            ("guidance_scale", "FP32", [1], np.float32(4.2).tobytes()),
            ("high_noise_frac", "FP16", [1], np.float16(0.7).tobytes()),
            ("width", "UINT16", [1], np.uint16(64).tobytes()),
        )
        message.id = "mine"
        for name, value in {"negative_prompt": "dogs", "scheduler": "heun", "format": "webp_lossless"}.items():
            message.parameters[name].string_param = value
        for name, value in {"n": 2, "height": 96, "quality": 80, "max_message_bytes": 99_999}.items():
            message.parameters[name].uint64_param = value
        message.parameters["priority"].uint64_param = 4
        (made,) = open_inference.read(message, 8).messages
        assert made == pb.GenerateRequest(
            request_id="mine",
            priority=-1,
            data=pb.TaskData(prompt="a cat 🐈"),
            parameter=pb.TaskParameter(negative_prompt="dogs", n=2, seed=2**32 - 1),
            sampling=pb.Sampling(
                steps=9, guidance_scale=4.2, high_noise_frac=0.7, scheduler="heun", width=64, height=96
            ),
            output=pb.Output(format=pb.FORMAT_WEBP_LOSSLESS, quality=80, raw=True, max_message_bytes=99_999),
        )

    def test_an_input_has_one_element_for_all_prompts_or_one_for_each(self):
        seeds = Tensor(name="seed", datatype="INT64", shape=[2, 1])
        seeds.contents.int64_contents.extend([5, 6])
        message = asked(texts("prompt", "a", "b"), seeds, texts("aspect_ratio", "16:9"), steps=3)
        requests = open_inference.read(message, 8).messages
        assert [(each.data.prompt, each.parameter.seed) for each in requests] == [("a", 5), ("b", 6)]
        assert {(each.parameter.aspect_ratio, each.sampling.steps) for each in requests} == {("16:9", 3)}

    @pytest.mark.parametrize(
        ("message", "field", "words"),
        [
            (asked(texts("prompt", "a", "b", "c"), texts("scheduler", "x", "y")), "scheduler", "one for each of 3"),
            (asked(texts("prompt", *"abcdefghi")), "prompt", "at most 8 elements, has 9"),
            (asked(texts("prompt", "a"), texts("prompt", "b")), "prompt", "must be given once"),
            (asked(texts("prompt", "a"), prompt="b"), "prompt", "an input or a parameter, not both"),
            (asked(texts("prompt", "a"), colour="red"), "colour", "is not known here"),
            (asked(texts("prompt", "a"), **{"x" * 999: "red"}), "x" * 64 + "...", "is not known here"),
            (asked(texts("prompt", "a"), seed=-1), "seed", "cannot be -1"),
            (asked(texts("prompt", "a"), seed="7"), "seed", "must be an integer"),
            (asked(texts("prompt", "a"), seed=True), "seed", "must be an integer"),
            (asked(texts("prompt", "a"), seed=7.0), "seed", "must be an integer"),
            (asked(texts("prompt", "a"), guidance_scale="much"), "guidance_scale", "must be a number"),
            (asked(texts("prompt", "a"), scheduler=3), "scheduler", "must be text, BYTES"),
            (asked(texts("prompt", "a"), format="gif"), "format", "cannot be gif"),
            (asked(texts("prompt", "a"), **{f"p{number}": 1 for number in range(99)}), "parameters", "at most 20"),
            (asked(texts("prompt", "a"), timeout=-1), "timeout", "must be a whole number of microseconds"),
            (asked(texts("prompt", "a"), timeout="1 s"), "timeout", "must be a whole number of microseconds"),
            (asked(texts("prompt", "a"), timeout=True), "timeout", "must be a whole number of microseconds"),
            (asked(texts("prompt", "a"), priority=-1), "priority", "1 is the highest, 3 the default, 5 the lowest"),
            (asked(texts("prompt", "a"), priority="high"), "priority", "1 is the highest"),
            (asked(texts("prompt", "a"), texts("priority", "1")), "priority", "must be a parameter, not an input"),
            (asked(texts("prompt", "a"), sequence_id=7), "sequence_id", "there are no sequences"),
            (asked(texts("prompt", "a"), sequence_id="x"), "sequence_id", "there are no sequences"),
            (asked(texts("prompt", "a"), sequence_end=True), "sequence_end", "there are no sequences"),
            (
                asked(
                    Tensor(name="prompt", datatype="BYTES", shape=[1], parameters={"shared_memory_region": Parameter()})
                ),
                "prompt",
                "shared memory is not used here",
            ),
            (
                oip.ModelInferRequest(
                    outputs=[{"name": "image", "parameters": {"classification": Parameter(int64_param=3)}}]
                ),
                "image",
                "has no classes",
            ),
            (asked(texts("prompt", "a", "b"), texts("n", "1", "2")), "n", "must have one element, for all prompts"),
            (raw(("prompt", "BYTES", [2], packed(b"a"))), "prompt", "as its shape says, 2, has 1"),
            (raw(("prompt", "BYTES", [1], b"\xff\0\0\0a")), "prompt", "ends too early"),
            (raw(("prompt", "BYTES", [1], packed(b"a") + b"\1")), "prompt", "ends too early"),
            (raw(("prompt", "BYTES", [1], packed(b"\xff"))), "prompt", "must be UTF-8"),
            (raw(("prompt", "BYTES", [1, 2], packed(b"a", b"b"))), "prompt", "must be of shape [b] or [b, 1]"),
            (raw(("prompt", "BYTES", [], packed(b"a"))), "prompt", "must be of shape [b] or [b, 1]"),
            (raw(("prompt", "BYTES", [0], b"")), "prompt", "must be of shape [b] or [b, 1]"),
            (raw(("prompt", "TEXT", [1], packed(b"a"))), "prompt", "must be of a datatype among BOOL, INT8"),
            (raw(("seed", "UINT32", [1], b"\1\2\3")), "seed", "must be whole elements of UINT32, has 3 bytes"),
            (asked(Tensor(name="seed", datatype="FP16", shape=[1])), "seed", "must be in raw_input_contents"),
            (
                oip.ModelInferRequest(inputs=[texts("prompt", "a")], raw_input_contents=[b"", b""]),
                "raw_input_contents",
                "must have 1 entries",
            ),
            (
                oip.ModelInferRequest(inputs=[texts("prompt", "a")], raw_input_contents=[packed(b"a")]),
                "prompt",
                "in raw_input_contents or in contents, not both",
            ),
            (
                asked(Tensor(name="prompt", datatype="BYTES", shape=[1], parameters={"x": Parameter()})),
                "prompt",
                "must be without parameters",
            ),
            (
                oip.ModelInferRequest(inputs=[texts("prompt", "a")], outputs=[{"name": "picture"}]),
                "picture",
                "must be one of image, finish_reason, seed, metadata",
            ),
        ],
    )
    def test_unreadable_values_are_reported_by_name(self, message, field, words):
        violations = unreadable(message)
        assert words in {each.field: each.description for each in violations}[field]
        assert len(str(errors.InvalidRequest(violations))) < 1000

    @pytest.mark.parametrize(
        ("level", "priority"), [(0, 0), (1, 2), (2, 1), (3, 0), (4, -1), (5, -2), (6, -2), (2**64 - 1, -2)]
    )
    def test_priorities_are_levels_of_the_protocol(self, level: int, priority: int):
        message = asked(texts("prompt", "a"))
        message.parameters["priority"].uint64_param = level
        (made,) = open_inference.read(message, 8).messages
        assert made.priority == priority

    @pytest.mark.parametrize(("microseconds", "seconds"), [(0, math.inf), (1, 1e-6), (2_500_000, 2.5)])
    def test_a_timeout_is_in_microseconds(self, microseconds: int, seconds: float):
        assert open_inference.read(asked(texts("prompt", "a"), timeout=microseconds), 8).timeout == seconds

    def test_parameters_of_clients_without_a_meaning_are_ignored(self):
        plain = asked(texts("prompt", "a"))
        message = asked(texts("prompt", "a"), sequence_id=0, sequence_start=False, binary_data_output=True)
        message.inputs[0].parameters["binary_data_size"].int64_param = 5
        message.outputs.add(name="image").parameters["binary_data"].bool_param = True
        assert open_inference.read(message, 8) == open_inference.read(plain, 8)

    def test_any_id_becomes_a_request_id_that_is_safe_in_the_log(self):
        message = asked(texts("prompt", "a"))
        message.id = "my req #1\n" + "é" * 200
        (made,) = open_inference.read(message, 8).messages
        assert made.request_id == ("my_req__1_" + "_" * 200)[:128]

    def test_all_violations_of_all_tensors_are_reported_at_once(self):
        violations = unreadable(asked(texts("prompt", "a", "b"), seed=-1, format="gif", steps="few"))
        assert {each.field for each in violations} == {"seed", "format", "steps"}


def test_an_answer_too_large_by_its_metadata_is_an_error():
    answer = pb.GenerateResponse(data=pb.ResultData(choices=[pb.Choice(raw=b"image")]))
    answer.metadata.images.add().request.data.prompt = "\0" * 1000
    assert len(open_inference.response(oip.ModelInferRequest(), [answer], 10_000).outputs) == 4
    with pytest.raises(ImageTooLarge, match=r"raise max_message_bytes, .* or leave out the output metadata"):
        open_inference.response(oip.ModelInferRequest(), [answer], 6000)


class TestModelInfer:
    def test_images_have_the_same_bytes_as_by_our_contract(self, stub, own_stub, model):
        made = stub.ModelInfer(
            asked(texts("prompt", "a red apple"), model=model, seed=7, steps=3, n=2), timeout=PATIENCE
        )
        same = request("a red apple", parameter={"seed": 7, "n": 2}, sampling={"steps": 3}, output={"raw": True})
        answer = own_stub.Generate(same, timeout=PATIENCE)
        outputs = {each.name: each for each in made.outputs}
        assert list(outputs) == ["image", "finish_reason", "seed", "metadata"]
        assert list(outputs["image"].contents.bytes_contents) == [each.raw for each in answer.data.choices]
        assert list(outputs["finish_reason"].contents.bytes_contents) == [b"success"] * 2
        assert list(outputs["seed"].contents.uint_contents) == [7, 8]
        assert [list(each.shape) for each in made.outputs] == [[1, 2], [1, 2], [1, 2], [1]]
        (metadata,) = outputs["metadata"].contents.bytes_contents
        assert json.loads(metadata)["images"][1]["sha256"] == answer.metadata.images[1].sha256
        assert (made.model_name, made.model_version) == (model, "1")

    def test_violations_of_all_prompts_are_reported_at_once_in_the_protocols_names(self, stub, model):
        prompts = texts("prompt", "a cat", " ")
        wrong = asked(prompts, model=model, steps=0, aspect_ratio="1:9", quality=0, scheduler="fast")
        code, said = refused(lambda: stub.ModelInfer(wrong, timeout=PATIENCE))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert set(said) == {"prompt[1]", "steps", "aspect_ratio", "quality", "scheduler"}
        assert said["prompt[1]"] == "is required and must not be blank"

    @pytest.mark.parametrize("prompt", [texts("prompt", "a cat"), torn_prompt()])
    def test_unreadable_values_and_violations_are_reported_together(self, stub, model, prompt):
        wrong = asked(prompt, texts("seed", "1", "2"), model=model, steps=0, width="wide", stpes=3, priority=-1)
        code, said = refused(lambda: stub.ModelInfer(wrong, timeout=PATIENCE))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        torn = {"prompt"} if prompt.shape == [9] else set()
        assert set(said) == {"seed", "steps", "width", "stpes", "priority"} | torn

    def test_the_image_limit_holds_for_all_prompts_together(self, stub, model):
        code, said = refused(
            lambda: stub.ModelInfer(asked(texts("prompt", *"abc"), model=model, n=3), timeout=PATIENCE)
        )
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert said == {"n": "must make at most 8 images of all prompts, makes 9"}

    def test_another_model_or_version_is_not_found(self, stub, model):
        for name, version in (("other", ""), (model, "2")):
            other = asked(texts("prompt", "x"), model=name)
            other.model_version = version
            assert refused(lambda: stub.ModelInfer(other, timeout=PATIENCE))[0] == grpc.StatusCode.NOT_FOUND  # noqa: B023
            look = oip.ModelMetadataRequest(name=name, version=version)
            assert refused(lambda: stub.ModelMetadata(look, timeout=9))[0] == grpc.StatusCode.NOT_FOUND  # noqa: B023

    def test_images_of_all_prompts_share_one_message_and_are_coded_smaller_to_fit(self, stub, model):
        wish = {"n": 2, "seed": 1, "steps": 2, "format": "png", "max_message_bytes": 300_000}
        made = stub.ModelInfer(asked(texts("prompt", *["noise"] * 4), model=model, **wish))
        images = [Image.open(io.BytesIO(each)) for each in made.outputs[0].contents.bytes_contents]
        assert [each.size for each in images] == [(256, 256)] * 8
        assert 50_000 < made.ByteSize() <= 300_000
        for each in made.outputs[3].contents.bytes_contents:
            assert "CODE_IMAGE_RECODED" in {warning["code"] for warning in json.loads(each)["warnings"]}

    def test_if_one_prompt_is_not_admitted_the_others_are_cancelled(self, start_server, model):
        server = start_server("--kserve", "--max-queue", "2").wait_until_ready()
        with connect(server) as channel:
            three = asked(texts("prompt", *"abc"), model=model, steps=150)
            three.id = "three"
            code, _ = refused(lambda: oip_grpc.GRPCInferenceServiceStub(channel).ModelInfer(three, timeout=None))
            assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
            server.wait_for_log(r"(?s)three: Cancelled.*three: Cancelled")

    def test_calls_appear_in_metrics_and_log(self, kserve, stub, model):
        def count() -> float:
            return scrape(kserve)("t2i_requests_total", method="ModelInfer", code="OK")

        before = count()
        named = asked(texts("prompt", "x"), model=model, steps=1)
        named.id = "named-by-its-caller"
        answer, call = stub.ModelInfer.with_call(named, metadata=[("x-request-id", "call-17")], timeout=PATIENCE)
        assert answer.id == "named-by-its-caller"
        assert dict(call.trailing_metadata())["x-request-id"] == "call-17"
        assert count() == before + 1
        kserve.wait_for_log(r"ModelInfer named-by-its-caller OK .* \[request_id=call-17 job=named-by-its-caller\]")

    def test_any_id_is_echoed_and_logged_in_a_safe_form(self, kserve, stub, model):
        named = asked(texts("prompt", "x"), model=model, steps=1)
        named.id = "my req #1"
        assert stub.ModelInfer(named, timeout=PATIENCE).id == "my req #1"
        kserve.wait_for_log(r"ModelInfer my_req__1 OK .* job=my_req__1\]")

    def test_a_timeout_is_a_deadline_for_the_images(self, stub, model):
        code, _ = refused(lambda: stub.ModelInfer(asked(texts("prompt", "x"), model=model, steps=150, timeout=200_000)))
        assert code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED)
        generous = asked(texts("prompt", "x"), model=model, steps=1, timeout=PATIENCE * 1_000_000)
        assert stub.ModelInfer(generous, timeout=PATIENCE).outputs

    def test_the_warning_of_a_lowered_priority_has_the_protocols_levels(self, stub, model):
        made = stub.ModelInfer(asked(texts("prompt", "x"), model=model, steps=1, priority=1), timeout=PATIENCE)
        (metadata,) = (json.loads(each) for each in made.outputs[3].contents.bytes_contents)
        assert metadata["warnings"] == [
            {
                "code": "CODE_PRIORITY_LOWERED",
                "field": "priority",
                "message": "level 1 became 3, the highest that is allowed here",
            },
            *(each for each in metadata["warnings"] if each["code"] != "CODE_PRIORITY_LOWERED"),
        ]

    def test_any_tensor_is_answered_with_a_status_and_a_message(self, stub, model):
        """Send inputs and parameters of every kind, and an unknown output, so that no image is made."""
        names = st.sampled_from([*open_inference._INPUTS, *open_inference._PARAMETERS, "other"])
        tensors = st.builds(
            Tensor,
            name=names,
            datatype=st.sampled_from([*open_inference._DATATYPES, "BF16"]),
            shape=st.lists(st.integers(-1, 3), max_size=3),
            contents=st.none()
            | st.builds(
                oip.InferTensorContents,
                bytes_contents=st.lists(st.binary(max_size=9), max_size=3),
                int64_contents=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
                fp32_contents=st.lists(st.floats(width=32), max_size=3),
            ),
        )
        values = st.builds(Parameter, int64_param=st.integers(-9, 2**40)) | st.builds(Parameter, string_param=st.text())

        @settings(max_examples=300, deadline=None, database=None)
        @given(
            st.lists(tensors, max_size=5),
            st.dictionaries(names, values | st.builds(Parameter, double_param=st.floats()), max_size=5),
            st.lists(st.binary(max_size=20), max_size=5),
        )
        def send(inputs, parameters, raw_contents) -> None:
            sent = oip.ModelInferRequest(model_name=model, inputs=inputs, parameters=parameters)
            sent.outputs.add(name="nothing")
            sent.raw_input_contents.extend(raw_contents)
            code, said = refused(lambda: stub.ModelInfer(sent, timeout=PATIENCE))
            assert code == grpc.StatusCode.INVALID_ARGUMENT
            assert said

        send()


class TestServer:
    def test_health_reflection_and_metadata_list_it_if_it_is_on(self, kserve, channel, stub):
        assert SERVICE in grpcurl(kserve, "list").stdout.split()
        assert "rpc ModelInfer (" in grpcurl(kserve, "describe", SERVICE).stdout
        health = health_pb2_grpc.HealthStub(channel)
        status = health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=9).status
        assert status == health_pb2.HealthCheckResponse.SERVING
        metadata = stub.ServerMetadata(oip.ServerMetadataRequest(), timeout=9)
        assert (metadata.name, metadata.version) == ("text-to-image-service", __version__)

    def test_it_is_off_by_default(self, server):
        with connect(server) as channel:
            code, _ = refused(
                lambda: oip_grpc.GRPCInferenceServiceStub(channel).ServerLive(oip.ServerLiveRequest(), timeout=9)
            )
        assert code == grpc.StatusCode.UNIMPLEMENTED
        assert SERVICE not in grpcurl(server, "list").stdout

    def test_it_is_live_before_it_is_ready_and_while_it_drains(self, start_server, model):
        server = start_server("--kserve", "--grace-seconds", "600")
        with connect(server) as channel:
            stub = oip_grpc.GRPCInferenceServiceStub(channel)

            def state() -> tuple[bool, bool, bool]:
                return (
                    stub.ServerLive(oip.ServerLiveRequest(), timeout=9).live,
                    stub.ServerReady(oip.ServerReadyRequest(), timeout=9).ready,
                    stub.ModelReady(oip.ModelReadyRequest(name=model), timeout=9).ready,
                )

            assert state() == (True, False, False)
            code, _ = refused(lambda: stub.ModelInfer(asked(texts("prompt", "x"), model=model), timeout=9))
            assert code == grpc.StatusCode.UNAVAILABLE
            server.wait_until_ready()
            assert state() == (True, True, True)
            running = pb_grpc.TextToImageServiceStub(channel).StreamGenerate(request(**LONG_JOB))
            first_step(running)
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            server.terminate()
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert state() == (True, False, False)
            running.cancel()
        assert server.wait() == 0

    def test_only_liveness_and_readiness_need_no_token(self, start_server, tmp_path, model):
        digest = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"  # of "secret"
        (tmp_path / "tokens").write_text(f"one {digest}\n")
        server = start_server("--kserve", "--tokens", str(tmp_path / "tokens"))
        with connect(server) as channel:
            stub = oip_grpc.GRPCInferenceServiceStub(channel)
            assert stub.ServerLive(oip.ServerLiveRequest(), timeout=9).live
            assert stub.ServerReady(oip.ServerReadyRequest(), timeout=9) is not None
            for name in ("ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer"):
                call = channel.unary_unary(f"/{SERVICE}/{name}")
                assert refused(lambda: call(b"", timeout=9))[0] == grpc.StatusCode.UNAUTHENTICATED  # noqa: B023
            metadata = [("authorization", "Bearer secret")]
            server.wait_until_ready()
            drawn = asked(texts("prompt", "x"), model=model, steps=1)
            assert stub.ModelInfer(drawn, metadata=metadata, timeout=PATIENCE).outputs


@pytest.fixture(scope="module")
def triton(
    tmp_path_factory: pytest.TempPathFactory, kserve: ServerProcess, model: str
) -> Callable[[str], "subprocess.Popen[str]"]:
    """Run a case of tests/interoperability/programs/triton.py, with NVIDIA's client in an environment of its own."""
    folder = tmp_path_factory.mktemp("triton")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "tritonclient[grpc]==2.73.0"], check=True)

    def run(case: str) -> "subprocess.Popen[str]":
        program = Path(ROOT, "tests", "interoperability", "programs", "triton.py")
        command = [str(python), str(program), kserve.target, model, case]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    return run


def outcome(program: "subprocess.Popen[str]") -> dict:
    output, _ = program.communicate(timeout=PATIENCE)
    assert program.returncode == 0
    return json.loads(output.splitlines()[-1])


@pytest.mark.slow
class TestTriton:
    def test_triton_finds_the_server_the_model_and_the_tensors(self, triton):
        found = outcome(triton("look"))
        assert (found["live"], found["ready"]) == (True, True)
        assert found["models"] == [True, False, False]
        assert found["server"] == ["text-to-image-service", __version__]
        assert found["versions"] == ["1"]
        assert found["inputs"]["prompt"] == ["BYTES", -1]
        assert set(found["inputs"]) == set(open_inference._INPUTS)
        assert found["outputs"]["image"] == ["BYTES", -1, -1]
        assert found["extensions"] == ["schedule_policy"]

    def test_triton_gets_the_images_of_our_contract(self, triton, own_stub):
        drawn = outcome(triton("draw"))
        same = request(
            "a red apple",
            parameter={"seed": 7, "negative-prompt": "blue"},
            sampling={"guidanceScale": 4.2, "steps": 3},
            output={"format": "FORMAT_PNG", "raw": True},
        )
        (choice,) = own_stub.Generate(same, timeout=PATIENCE).data.choices
        assert [base64.b64decode(each) for each in drawn["images"]] == [choice.raw]
        assert (drawn["id"], drawn["shape"], drawn["finish_reasons"]) == ("from-triton", [1, 1], ["success"])
        assert drawn["metadata"][0]["requestId"] == "from-triton"

    def test_triton_gets_several_images_for_each_of_two_prompts(self, triton):
        drawn = outcome(triton("batch"))
        assert (drawn["shape"], drawn["seeds"]) == ([2, 2], [[7, 8], [40, 41]])
        images = [Image.open(io.BytesIO(base64.b64decode(each))) for each in drawn["images"]]
        assert [each.format for each in images] == ["WEBP"] * 4
        assert len(set(drawn["images"])) == 4
        prompts = [each["images"][0]["request"]["data"]["prompt"] for each in drawn["metadata"]]
        assert prompts == ["a red apple", "a blue heart"]

    def test_triton_gets_only_the_requested_outputs(self, triton):
        assert outcome(triton("choose")) == {"outputs": ["seed"], "seeds": [[0]]}

    def test_tritons_parameters_have_tritons_meaning(self, triton):
        found = outcome(triton("policy"))
        assert found["id"] == "my req #1"
        assert "level 1 became 3, the highest that is allowed here" in found["warnings"]
        status, message = found["late"]
        assert status in ("StatusCode.RESOURCE_EXHAUSTED", "StatusCode.DEADLINE_EXCEEDED")
        assert "deadline" in message
        status, message = found["sequence"]
        assert status == "StatusCode.INVALID_ARGUMENT"
        assert "sequence_id: must be left out" in message

    def test_triton_gets_all_violations(self, triton):
        found = outcome(triton("errors"))
        assert {name: status for name, (status, _) in found.items()} == {
            "model": "StatusCode.NOT_FOUND",
            "prompt": "StatusCode.INVALID_ARGUMENT",
            "many": "StatusCode.INVALID_ARGUMENT",
            "deadline": "StatusCode.DEADLINE_EXCEEDED",
        }
        assert found["prompt"][1] == "prompt: is required and must not be blank"
        assert "colour: is not known here" in found["many"][1]
        assert "the deadline cannot be met" in found["deadline"][1]

    def test_a_cancelled_call_frees_the_device(self, triton, kserve):
        program = triton("cancel")
        assert program.stdout.readline() == "begun\n"
        while not scrape(kserve)("t2i_queue_jobs", state="running"):
            pass  # each look is an HTTP request; without a job, the test's timeout ends it
        output, _ = program.communicate("\n", timeout=PATIENCE)
        assert json.loads(output)["status"] == "StatusCode.CANCELLED"
        kserve.wait_for_log("to-be-cancelled: Cancelled after")
