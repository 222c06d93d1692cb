"""Instill's services: inputs and outputs, real servers, and the stubs of Instill's own SDK."""

import base64
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpcurl import grpcurl
from PIL import Image
from refusals import refused
from scraping import scrape
from serving import LONG_JOB, PATIENCE, ROOT, ServerProcess, connect, first_step, request

from server.api import errors, instill
from server.domain import ASPECT_RATIOS
from server.stubs.model_model_v1alpha import model_public_pb2 as public
from server.stubs.model_model_v1alpha import model_public_pb2_grpc as public_grpc
from server.stubs.model_ray_v1alpha import user_defined_pb2 as user_defined
from server.stubs.model_ray_v1alpha import user_defined_pb2_grpc as user_defined_grpc
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

SERVICE = "model.ray.v1alpha.UserDefinedService"
PROGRAM = ROOT / "tests" / "interoperability" / "programs" / "instill_sdk.py"
SCHEMA = json.loads(PROGRAM.with_name("text_to_image_schema.json").read_text("utf-8"))

# Version 0.18.0 asks for these and a good deal more, among it Ray, which its stubs do without.
SDK = ("instill-sdk==0.18.0", "protobuf==4.25.8", "grpcio>=1.59,<2", "typing-extensions")


RGB = {"format": "FORMAT_JPEG_RGB"}  # what Instill's own answers are, and so those of these methods


def made(given: dict[str, Any]) -> Struct:
    return json_format.ParseDict(given, Struct())


def task(prompt: str = "a cat", **parameter: Any) -> dict[str, Any]:
    return {"data": {"prompt": prompt}, "parameter": parameter}


class TestRequests:
    """Reading of inputs, without a server."""

    def test_every_field_has_its_place_in_our_contract(self):
        parameter = {"aspect-ratio": "16:9", "negative-prompt": "dogs", "n": 2, "seed": 2**32 - 1}
        (read,), _ = instill.read([made(task("a cat", **parameter))], 8)
        assert read == pb.GenerateRequest(
            data=pb.TaskData(prompt="a cat"),
            parameter=pb.TaskParameter(aspect_ratio="16:9", negative_prompt="dogs", n=2, seed=2**32 - 1),
            output=pb.Output(format=pb.FORMAT_JPEG_RGB),
        )

    @pytest.mark.parametrize(
        "given",
        [
            {"data": {"prompt": "x"}},
            {"data": {"prompt": "x"}, "parameter": {}},
            {"data": {"prompt": "x"}, "parameter": None},
            {"data": {"prompt": "x"}, "parameter": {"n": 0}},
            {"data": {"prompt": "x"}, "parameter": {"n": 0.0, "seed": 0.0, "aspect-ratio": None}},
        ],
    )
    def test_defaults_are_those_of_the_schema(self, given):
        (read,), _ = instill.read([made(given)], 8)
        parameter = SCHEMA["input"]["properties"]["parameter"]["properties"]
        assert (read.parameter.n, read.parameter.seed) == (parameter["n"]["default"], parameter["seed"]["default"])
        assert not read.parameter.HasField("aspect_ratio")
        assert read.parameter.negative_prompt == ""

    def test_the_aspect_ratios_are_those_of_the_schema(self):
        parameter = SCHEMA["input"]["properties"]["parameter"]["properties"]
        assert set(parameter["aspect-ratio"]["enum"]) == set(ASPECT_RATIOS)

    @pytest.mark.parametrize(
        ("given", "field", "words"),
        [
            ({"data": "x"}, "data", "must be an object"),
            ({"data": {"prompt": 3}}, "data.prompt", "must be a string"),
            (task(n=1.5), "parameter.n", "must be a whole number of 0 to 4294967295"),
            (task(n=-1), "parameter.n", "must be a whole number of 0 to 4294967295"),
            (task(n="two"), "parameter.n", "must be a whole number of 0 to 4294967295"),
            (task(n=""), "parameter.n", "must be a whole number of 0 to 4294967295"),
            (task(n="1.5"), "parameter.n", "must be a whole number of 0 to 4294967295"),
            (task(n="-1"), "parameter.n", "must be a whole number of 0 to 4294967295"),
            (task(seed="4294967296"), "parameter.seed", "must be a whole number of 0 to 4294967295"),
            (
                task(**{"aspect-ratio": "1:1", "aspect_ratio": "16:9"}),
                "parameter.aspect-ratio",
                "is given twice, as aspect-ratio and aspect_ratio, with different values; leave one out",
            ),
            (task(n=True), "parameter.n", "must be a whole number of 0 to 4294967295"),
            (task(seed=2**32), "parameter.seed", "must be a whole number of 0 to 4294967295"),
            (task(**{"aspect-ratio": 1}), "parameter.aspect-ratio", "must be a string"),
            (task(**{"negative-prompt": ["x"]}), "parameter.negative-prompt", "must be a string"),
            ({"data": {"prompt": "x"}, "parameter": [1]}, "parameter", "must be an object"),
        ],
    )
    def test_unreadable_values_are_reported_by_name(self, given, field, words):
        _, unreadable = instill.read([made(task()), made(given)], 8)
        assert unreadable == [errors.Violation(f"task_inputs[1].{field}", words)]

    @pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e300])
    def test_numbers_that_json_cannot_express_are_rejected(self, number):
        given = made(task(n=1))
        given.fields["parameter"].struct_value.fields["n"].number_value = number
        _, (unreadable,) = instill.read([given], 8)
        assert "must be a whole number" in unreadable.description

    @pytest.mark.parametrize(
        "spelled",
        [
            {"aspect_ratio": "16:9", "negative_prompt": "dogs", "n": 2.0, "seed": 7.0},
            {"aspect-ratio": "16:9", "negative_prompt": "dogs", "n": "2", "seed": "7"},
            {"aspect-ratio": "16:9", "aspect_ratio": "16:9", "negative-prompt": "dogs", "n": " 2.0 ", "seed": "007"},
            {"aspect_ratio": None, "aspect-ratio": "16:9", "negative_prompt": "dogs", "n": 2, "seed": 7},
        ],
    )
    def test_keys_with_underscores_and_numbers_as_text_are_accepted(self, spelled, caplog):
        parameter = {"aspect-ratio": "16:9", "negative-prompt": "dogs", "n": 2, "seed": 7}
        assert instill.read([made(task("x", **spelled))], 8) == instill.read([made(task("x", **parameter))], 8)
        assert not caplog.records

    def test_unknown_keys_are_ignored_with_one_bounded_warning(self, caplog):
        unknown = {f"key-{number}": 1 for number in range(1000)} | {"x" * 999: 1, "with\nnewline": 1}
        given = {"data": {"prompt": "x", "steps": 3}, "parameter": unknown, "stream": True}
        assert instill.read([made(given)], 8) == instill.read([made({"data": {"prompt": "x"}})], 8)
        (record,) = caplog.records
        assert "1004 that are not known here" in record.getMessage()
        assert len(record.getMessage()) < 1000
        assert "\n" not in record.getMessage()

    def test_cores_name_of_the_model_is_ignored(self, caplog):
        given = {"data": {"prompt": "x", "model": "instill-ai/stable-diffusion-xl"}}
        assert instill.read([made(given)], 8) == instill.read([made({"data": {"prompt": "x"}})], 8)
        assert not caplog.records

    def test_more_inputs_than_the_limit_of_images_are_rejected(self):
        with pytest.raises(errors.InvalidRequest, match="task_inputs: must be at most 8, are 9"):
            instill.read([made(task())] * 9, 8)


@pytest.fixture(scope="module")
def core() -> Iterator[ServerProcess]:
    server = ServerProcess(
        "--instill", "--metrics-listen", "127.0.0.1:0", program=("tests/support/faulty_server.py",), PYTHONPATH=_path()
    ).wait_until_ready()
    yield server
    assert server.stop() == 0, server.log
    assert "Traceback" not in server.log


def _path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(scope="module")
def channel(core: ServerProcess) -> Iterator[grpc.Channel]:
    with connect(core) as channel:
        yield channel


def call(
    channel: grpc.Channel, *inputs: dict[str, Any], timeout: float = PATIENCE, **options: Any
) -> list[dict[str, Any]]:
    sent = user_defined.CallRequest(task_inputs=map(made, inputs))
    answer = user_defined_grpc.UserDefinedServiceStub(channel).__call__(sent, timeout=timeout, **options)
    return [json_format.MessageToDict(each) for each in answer.task_outputs]


def images(output: dict[str, Any]) -> list[str]:
    return [choice["image"] for choice in output["data"]["choices"]]


class TestCall:
    def test_images_have_the_same_bytes_as_by_our_contract_in_order(self, channel):
        drawn = call(channel, task("a red apple", n=2, seed=7), task("a blue heart", seed=3))
        own_stub = pb_grpc.TextToImageServiceStub(channel)
        for output, prompt, parameter in zip(
            drawn, ("a red apple", "a blue heart"), ({"seed": 7, "n": 2}, {"seed": 3}), strict=True
        ):
            same = own_stub.Generate(request(prompt, parameter=parameter, output=RGB), timeout=PATIENCE)
            assert output == {
                "data": {"choices": [{"finish-reason": "success", "image": each.image} for each in same.data.choices]}
            }

    def test_no_input_gives_no_output(self, channel):
        assert call(channel) == []

    def test_violations_of_all_inputs_are_reported_at_once(self, channel):
        wrong = {"data": {}}, task("x", n=99), task("x", **{"aspect-ratio": "1:9"})
        code, said = refused(lambda: call(channel, *wrong))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert said["task_inputs[0].data.prompt"] == "is required and must not be blank"
        assert said["task_inputs[1].parameter.n"] == "must be 1 to 8, is 99"
        assert said["task_inputs[2].parameter.aspect-ratio"].startswith("must be one of ")
        assert len(said) == 3

    def test_unreadable_values_and_violations_are_reported_together(self, channel):
        wrong = {"data": "x", "parameter": {"n": 99}}, task("", n="two"), task(3, **{"aspect-ratio": "1:9"})
        code, said = refused(lambda: call(channel, *wrong))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert set(said) == {
            "task_inputs[0].data",
            "task_inputs[0].parameter.n",
            "task_inputs[1].data.prompt",
            "task_inputs[1].parameter.n",
            "task_inputs[2].data.prompt",
            "task_inputs[2].parameter.aspect-ratio",
        }
        assert said["task_inputs[1].data.prompt"] == "is required and must not be blank"
        assert said["task_inputs[2].data.prompt"] == "must be a string"

    def test_the_image_limit_holds_for_all_inputs_together(self, channel):
        code, said = refused(lambda: call(channel, task(n=5), task(n=4)))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert said == {"task_inputs": "must make at most 8 images of all prompts, makes 9"}

    def test_an_infeasible_deadline_is_rejected(self, channel):
        code, _ = refused(lambda: call(channel, task(n=8), timeout=0.3))
        assert code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED)

    def test_if_one_input_is_not_admitted_the_others_are_cancelled(self, start_server):
        server = start_server("--instill", "--max-queue", "2").wait_until_ready()
        with connect(server) as channel:
            code, _ = refused(lambda: call(channel, task(n=2), task(n=2), task(n=2)))
            assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
            server.wait_for_log(r"(?s)Cancelled.*Cancelled")

    def test_if_one_input_fails_the_others_are_cancelled(self, core, channel):
        sent = [task("broken"), task("x", n=7)]
        code, _ = refused(lambda: call(channel, *sent, metadata=[("x-request-id", "fails")]))
        assert code == grpc.StatusCode.INTERNAL
        core.wait_for_log(r"__call__ \S+ INTERNAL .*request_id=fails")
        core.wait_for_log(r"Cancelled after .*request_id=fails")

    def test_images_that_the_content_filter_replaced_are_marked(self, start_server):
        server = start_server(
            "--instill", "--content-filter", "own_filters:Blueness", PYTHONPATH=_path() + f":{ROOT}/tests/support"
        )
        server.wait_until_ready()
        with connect(server) as channel:
            blue, red = call(channel, task("a blue heart", seed=3), task("a red apple", seed=7))
        assert [each["data"]["choices"][0]["finish-reason"] for each in (blue, red)] == ["content_filtered", "success"]
        grey = Image.open(io.BytesIO(base64.b64decode(images(blue)[0].partition(",")[2])))
        assert grey.getextrema() == ((128, 128),) * 3

    def test_calls_appear_in_metrics_and_log(self, core, channel):
        def count() -> float:
            return scrape(core)("t2i_requests_total", method="__call__", code="OK")

        before = count()
        call(channel, {**task("x"), "stream": True}, metadata=[("x-request-id", "call-17")])
        assert count() == before + 1
        core.wait_for_log(r"ignored keys of the task's inputs, 1 .*'stream' \[request_id=call-17")
        core.wait_for_log(r"__call__ \S+ OK .* \[request_id=call-17 job=")


def trigger(stub: public_grpc.ModelPublicServiceStub, *inputs: dict[str, Any], model: str = "mini-sdxl-emoji") -> Any:
    sent = public.TriggerNamespaceModelRequest(
        namespace_id="instill-ai", model_id=model, version="v1", task_inputs=map(made, inputs)
    )
    return stub.TriggerNamespaceModel(sent, timeout=PATIENCE)


class TestPublicApi:
    """The methods of Core's public API. The SDK's client calls them in test_instill_deployment.py."""

    @pytest.fixture
    def stub(self, channel: grpc.Channel) -> public_grpc.ModelPublicServiceStub:
        return public_grpc.ModelPublicServiceStub(channel)

    def test_both_methods_have_the_outputs_of_cores_call(self, channel, stub):
        inputs = (task("a red apple", seed=7),)
        latest = public.TriggerNamespaceLatestModelRequest(
            namespace_id="instill-ai", model_id="mini-sdxl-emoji", task_inputs=map(made, inputs)
        )
        for answer in (trigger(stub, *inputs), stub.TriggerNamespaceLatestModel(latest, timeout=PATIENCE)):
            assert answer.task == public.TASK_TEXT_TO_IMAGE
            assert [json_format.MessageToDict(each) for each in answer.task_outputs] == call(channel, *inputs)

    def test_another_model_is_not_found(self, stub):
        with pytest.raises(grpc.RpcError, match='"mini-sdxl-emoji" is the model that is served here') as caught:
            trigger(stub, task(), model="another")
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND

    def test_violations_have_the_names_of_the_inputs(self, stub):
        code, said = refused(lambda: trigger(stub, task(), {"data": {}}))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert "task_inputs[1].data.prompt" in said


class TestServer:
    def test_health_and_reflection_list_it_if_it_is_on(self, core, channel):
        assert SERVICE in grpcurl(core, "list").stdout.split()
        assert "rpc __call__ (" in grpcurl(core, "describe", SERVICE).stdout
        health = health_pb2_grpc.HealthStub(channel)
        status = health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=9).status
        assert status == health_pb2.HealthCheckResponse.SERVING

    def test_it_is_off_by_default(self, server):
        with connect(server) as channel:
            assert refused(lambda: call(channel, task()))[0] == grpc.StatusCode.UNIMPLEMENTED
        assert SERVICE not in grpcurl(server, "list").stdout

    def test_it_is_unavailable_until_the_model_is_ready_and_when_the_server_drains(self, start_server):
        server = start_server("--instill", "--grace-seconds", "600")
        with connect(server) as channel:
            assert server.target
            assert refused(lambda: call(channel, task()))[0] == grpc.StatusCode.UNAVAILABLE
            asked = public_grpc.ModelPublicServiceStub(channel).Readiness(public.ReadinessRequest(), timeout=PATIENCE)
            assert asked == public.ReadinessResponse(health_check_response={"status": "SERVING_STATUS_NOT_SERVING"})
            server.wait_until_ready()
            running = pb_grpc.TextToImageServiceStub(channel).StreamGenerate(request(**LONG_JOB))
            first_step(running)
            server.terminate()
            server.wait_for_log("draining")
            assert refused(lambda: call(channel, task()))[0] == grpc.StatusCode.UNAVAILABLE
            running.cancel()
        assert server.wait() == 0

    def test_calls_need_a_token(self, start_server, tmp_path):
        digest = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"  # of "secret"
        (tmp_path / "tokens").write_text(f"one {digest}\n")
        server = start_server("--instill", "--tokens", str(tmp_path / "tokens")).wait_until_ready()
        with connect(server) as channel:
            assert refused(lambda: call(channel, task()))[0] == grpc.StatusCode.UNAUTHENTICATED
            assert call(channel, task(), metadata=[("authorization", "Bearer secret")])

    def test_probes_of_the_public_api_need_no_token(self, start_server, tmp_path):
        (tmp_path / "tokens").write_text(f"one {'0' * 64}\n")
        server = start_server("--instill", "--tokens", str(tmp_path / "tokens")).wait_until_ready()
        serving = public.HealthCheckResponse(status="SERVING_STATUS_SERVING")
        with connect(server) as channel:
            stub = public_grpc.ModelPublicServiceStub(channel)
            assert stub.Liveness(public.LivenessRequest(), timeout=PATIENCE).health_check_response == serving
            assert stub.Readiness(public.ReadinessRequest(), timeout=PATIENCE).health_check_response == serving
            assert refused(lambda: trigger(stub, task()))[0] == grpc.StatusCode.UNAUTHENTICATED

    def test_undecodable_bytes_are_invalid_argument(self, channel):
        raw = channel.unary_unary(f"/{SERVICE}/__call__")
        assert refused(lambda: raw(b"\xff\xff", timeout=9))[0] == grpc.StatusCode.INVALID_ARGUMENT


Call = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def sdk(tmp_path_factory: pytest.TempPathFactory) -> Call:
    """Run tests/interoperability/programs/instill_sdk.py, with Instill's SDK in an environment of its own."""
    folder = tmp_path_factory.mktemp("instill")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, "jsonschema>=4.20,<5"], check=True)
    subprocess.run([*install, "--no-deps", *SDK], check=True)

    def run(*arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [python, PROGRAM, *arguments],
            env=os.environ | {"HOME": str(folder), "PYTHONPATH": ""},  # the SDK writes its logs there
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    return run


def output_of(program: "subprocess.Popen[str]", *, asked: dict[str, Any] | None = None) -> Any:
    said, _ = program.communicate(f"{json.dumps(asked)}\n" if asked else None, timeout=PATIENCE)
    assert program.returncode == 0
    return json.loads(said.splitlines()[-1])


@pytest.mark.slow
class TestSdk:
    def test_the_sdks_messages_equal_ours(self, sdk):
        ours = {
            message.full_name: [
                [each.name, each.number, each.is_repeated, each.message_type.full_name] for each in message.fields
            ]
            for message in user_defined.DESCRIPTOR.message_types_by_name.values()
        }
        assert output_of(sdk()) == ours

    def test_the_sdk_gets_the_images_of_our_contract_in_its_schema(self, sdk, core, channel):
        inputs = [task("a red apple", n=1.0, seed=7.0), {"data": {"prompt": "a red apple", "model": "any"}}]
        drawn = output_of(sdk(core.target), asked={"task_inputs": inputs, "application": "instill-ai_sdxl_latest"})
        assert drawn["invalid"] == []
        own_stub = pb_grpc.TextToImageServiceStub(channel)
        for output, seed in zip(drawn["task_outputs"], (7, 0), strict=True):
            same = own_stub.Generate(request("a red apple", parameter={"seed": seed}, output=RGB), timeout=PATIENCE)
            assert images(output) == [same.data.choices[0].image]

    def test_messages_of_more_than_4_mib_pass_both_ways(self, sdk, core):
        loud = {**task("loud", n=2), "unread": "x" * 5_000_000}
        drawn = output_of(sdk(core.target), asked={"task_inputs": [loud]})
        assert drawn["invalid"] == []
        assert min(drawn["bytes"]) > 4 * 1024 * 1024
        for image in images(drawn["task_outputs"][0]):
            assert image.startswith("data:image/jpeg;base64,/9j/7gAOQWRvY")
            assert Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))).size == (1024, 1024)

    def test_the_sdk_gets_all_violations(self, sdk, core):
        assert output_of(sdk(core.target), asked={"task_inputs": [{"data": {"prompt": " "}}]}) == {
            "status": "INVALID_ARGUMENT",
            "message": "task_inputs[0].data.prompt: is required and must not be blank",
        }
        late = output_of(sdk(core.target), asked={"task_inputs": [task(n=8)], "timeout": 0.3})
        assert late["status"] in ("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")

    def test_a_cancelled_call_frees_the_device(self, sdk, core):
        program = sdk(core.target)
        program.stdin.write(json.dumps({"task_inputs": [task(n=4), task(n=4)], "cancel": True}) + "\n")
        program.stdin.flush()
        assert program.stdout.readline() == "begun\n"
        before = core.log.count("Cancelled after")
        while not scrape(core)("t2i_queue_jobs", state="running"):
            pass  # each look is an HTTP request; without a job, the test's timeout ends it
        said, _ = program.communicate("\n", timeout=PATIENCE)
        assert json.loads(said)["status"] == "CANCELLED"
        core.wait_for_log("(?s)" + "Cancelled after.*" * (before + 2))
