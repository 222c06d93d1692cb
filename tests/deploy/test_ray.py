"""The service on Ray Serve: real Ray, the shipped configuration, generated clients and grpcurl through Ray's ingress.

In an environment of its own: `make test-ray`.
"""

import copy
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
import tiny_ensemble
import yaml
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from serving import LONG_JOB, RETRIES, ROOT, SERVICE, ServerProcess, digests, first_step, request

from server.stubs.model_ray_v1alpha import user_defined_pb2 as user_defined
from server.stubs.model_ray_v1alpha import user_defined_pb2_grpc as user_defined_grpc
from text_to_image_client import DeadlineExceeded, InvalidRequest, NotFound, TextToImage
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

pytest.importorskip("ray", reason="Ray is in an environment of its own: make test-ray")

from ray.serve.schema import ServeDeploySchema
from ray_serving import PATIENCE, RayServe, configuration

pytestmark = pytest.mark.timeout(1200)

GRPCURL = Path(sys.executable).parent / "grpcurl"
FOLDER = ROOT / "deploy" / "ray"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base, refiner = tiny_ensemble.save(tmp_path_factory.mktemp("ensemble"))
    return {"T2I_BASE": str(base), "T2I_REFINER": str(refiner), "T2I_MODEL_NAME": "tiny"}


@pytest.fixture(scope="module")
def ray(weights: dict[str, str]) -> Iterator[RayServe]:
    """Two replicas of a tiny ensemble."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # a short name, as sockets below it need
    two = {"autoscaling_config": None, "num_replicas": 2}
    variables = weights | {"T2I_METRICS_LISTEN": "127.0.0.1:0"}
    ray = RayServe(folder, lambda ports: configuration(ports, variables, **two))
    try:
        ray.wait_for_log(r"(?s)(replica: serving.*){2}")
        with TextToImage(ray.target, timeout=PATIENCE) as client:
            assert client.model().name == "tiny"
        yield ray
    finally:
        ray.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def stub(ray: RayServe) -> Iterator[pb_grpc.TextToImageServiceStub]:
    with grpc.insecure_channel(ray.target) as channel:
        yield pb_grpc.TextToImageServiceStub(channel)


def grpcurl(target: str, *arguments: str, data: str | None = None) -> str:
    given = ["-d", data] if data is not None else []
    command = [GRPCURL, "-plaintext", *given, target, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout


# What is shipped, as far as it can be seen without Ray running.


def unknown_fields(model: Any, given: Any, at: str = "") -> list[str]:
    """Those that Ray would pass over in silence."""
    known = {field.alias or name: name for name, field in model.model_fields.items()}
    found = [f"{at}{name}" for name in given if name not in known]
    for name, value in given.items():
        nested = getattr(model, known.get(name, ""), None)
        for part, piece in [(nested, value)] if isinstance(value, dict) else []:
            if hasattr(type(part), "model_fields"):
                found += unknown_fields(part, piece, f"{at}{name}.")
        if isinstance(value, list) and nested and hasattr(type(nested[0]), "model_fields"):
            for part, piece in zip(nested, value, strict=True):
                found += unknown_fields(part, piece, f"{at}{name}.")
    return found


@pytest.mark.parametrize("name", ["cpu.yaml", "gpu.yaml"])
def test_a_configuration_has_only_what_ray_knows(name: str):
    shipped = yaml.safe_load((FOLDER / name).read_text("utf-8"))
    assert unknown_fields(ServeDeploySchema.model_validate(shipped), shipped) == []


def test_what_ray_does_not_know_is_noticed():
    shipped = yaml.safe_load((FOLDER / "gpu.yaml").read_text("utf-8"))
    wrong = copy.deepcopy(shipped)
    wrong["applications"][0]["deployments"][0]["max_ongoing_request"] = 1
    assert unknown_fields(ServeDeploySchema.model_validate(wrong), wrong) == [
        "applications.deployments.max_ongoing_request"
    ]


# Two replicas.


def test_events_stream_and_bytes_equal_the_bare_servers(
    stub: pb_grpc.TextToImageServiceStub, weights: dict[str, str], start_server
):
    asked = request("a cat", parameter={"seed": 5}, sampling={"steps": 10}, output={"raw": True})
    began = time.monotonic()
    events, times = [], []
    for event in stub.StreamGenerate(asked, timeout=PATIENCE):
        events.append(event)
        times.append(time.monotonic() - began)
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    kinds = [event.WhichOneof("event") for event in events]
    while kinds[:2] == ["queued", "queued"]:  # the wait has changed, as on a busy machine
        del kinds[0]
    assert kinds == ["queued", *["progress"] * 12, "choice", "done"]
    assert len({round(each, 3) for each in times}) > 6  # they do not come in one go

    server: ServerProcess = start_server(OMP_NUM_THREADS="1", **weights).wait_until_ready()
    with grpc.insecure_channel(server.target) as channel:
        answer = pb_grpc.TextToImageServiceStub(channel).Generate(asked, timeout=PATIENCE)
    assert digests([event.choice.choice for event in events if event.HasField("choice")]) == digests(
        list(answer.data.choices)
    )
    through_ray = stub.Generate(asked, timeout=PATIENCE)
    assert through_ray.data == answer.data
    assert through_ray.metadata.fingerprint == answer.metadata.fingerprint


@pytest.mark.smoke
def test_a_cancelled_call_frees_the_device_within_a_step(ray: RayServe, stub: pb_grpc.TextToImageServiceStub):
    stream = stub.StreamGenerate(request(requestId="given-up", **LONG_JOB))
    first_step(stream)
    last = next(stream).progress
    stream.cancel()
    calls = int(ray.wait_for_log(r"given-up: Cancelled after (\d+) model calls")[1])
    # One call encodes the prompt; one may be in flight, and others were made while this test was not looking.
    assert calls < 1 + last.step + 20, f"{calls} calls after step {last.step}"
    assert calls < 1200


def test_a_cancelled_call_without_events_frees_the_device_too(ray: RayServe, stub: pb_grpc.TextToImageServiceStub):
    addresses = re.findall(r"metrics on (http://\S+)", "\n".join(ray.lines))
    assert len(addresses) == 2
    drawing = stub.Generate.future(request(requestId="given-up-whole", **LONG_JOB))
    while not any('t2i_queue_jobs{state="running"} 1.0' in scraped(each) for each in addresses):
        assert not drawing.done(), drawing
    drawing.cancel()
    assert int(ray.wait_for_log(r"given-up-whole: Cancelled after (\d+) model calls")[1]) < 1200


def scraped(address: str) -> str:
    with urlopen(address, timeout=PATIENCE) as answer:
        return str(answer.read(), "utf-8")


def test_a_client_that_vanishes_frees_the_device(ray: RayServe):
    with grpc.insecure_channel(ray.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stream = pb_grpc.TextToImageServiceStub(channel).StreamGenerate(request(requestId="gone", **LONG_JOB))
        first_step(stream)
    ray.wait_for_log(r"gone: Cancelled after \d+ model calls")


def test_ingress_survives_streams_broken_off_at_any_moment(ray: RayServe, stub: pb_grpc.TextToImageServiceStub):
    ingress = ray.processes("ProxyActor")
    for number in range(60):
        stream = stub.StreamGenerate(request(sampling={"steps": 20}), timeout=PATIENCE)
        for _ in range(number % 6):
            next(stream)
        stream.cancel()
    assert stub.Generate(request(sampling={"steps": 2}), timeout=PATIENCE).data.choices
    assert ray.processes("ProxyActor") == ingress


@pytest.mark.smoke
def test_deadline_reaches_the_engine_which_rejects_jobs_that_miss_it(ray: RayServe):
    with TextToImage(ray.target, retries=0) as client, pytest.raises(DeadlineExceeded, match="cannot be met"):
        client.generate("a cat", n=8, steps=150, timeout=5)


def test_errors_bring_their_details_from_calls_and_from_streams(ray: RayServe):
    with TextToImage(ray.target) as client:
        for call in (lambda: client.generate("a cat", steps=1000), lambda: list(client.stream("a cat", steps=1000))):
            with pytest.raises(InvalidRequest) as caught:
                call()
            assert [each.field for each in caught.value.violations] == ["sampling.steps"]


def test_names_of_a_call_pass_and_come_back(ray: RayServe, stub: pb_grpc.TextToImageServiceStub):
    trace = "0af7651916cd43dd8448eb211c80319c"
    metadata = (("x-request-id", "from-the-shop-17"), ("traceparent", f"00-{trace}-b7ad6b7169203331-01"))
    _, call = stub.GetModel.with_call(pb.GetModelRequest(), metadata=metadata)
    assert dict(call.trailing_metadata())["x-request-id"] == "from-the-shop-17"
    ray.wait_for_log(rf"GetModel OK .*request_id=from-the-shop-17 trace_id={trace}")


def test_what_is_no_message_is_the_callers_fault(ray: RayServe):
    with grpc.insecure_channel(ray.target) as channel:
        for method in ("Generate", "GetModel"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(f"/{SERVICE}/{method}")(b"\xff\xff\xff\xff", timeout=PATIENCE)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.unary_stream(f"/{SERVICE}/StreamGenerate")(b"\xff\xff\xff\xff", timeout=PATIENCE))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.smoke
def test_grpcurl_lists_calls_and_asks_for_health(ray: RayServe):
    assert SERVICE in grpcurl(ray.target, "list").split()
    answer = json.loads(grpcurl(ray.target, f"{SERVICE}/Generate", data='{"data": {"prompt": "cat napping"}}'))
    (choice,) = answer["data"]["choices"]
    assert choice["finish-reason"] == "success"
    assert choice["image"].startswith("data:image/jpeg;base64,")
    with grpc.insecure_channel(ray.target) as channel:  # which reflection does not list
        for method, word in (("Healthz", b"success"), ("ListApplications", b"text-to-image")):
            assert word in channel.unary_unary(f"/ray.serve.RayServeAPIService/{method}")(b"", timeout=PATIENCE)


def test_instills_call_has_the_images_of_our_own(ray: RayServe, stub: pb_grpc.TextToImageServiceStub):
    asked = request("a cat", parameter={"seed": 0}, output={"format": "FORMAT_JPEG_RGB"})
    drawn = stub.Generate(asked, timeout=PATIENCE).data.choices[0].image
    bad = {"data": {"prompt": ""}}
    with grpc.insecure_channel(ray.target) as channel:
        call = user_defined_grpc.UserDefinedServiceStub(channel).__call__
        sent = user_defined.CallRequest()
        sent.task_inputs.add().update({"data": {"prompt": "a cat", "model": "tiny"}})
        (made,) = call(sent, timeout=PATIENCE).task_outputs
        assert made["data"]["choices"][0]["image"] == drawn
        sent.task_inputs.add().update(bad)
        with pytest.raises(grpc.RpcError) as refused:
            call(sent, timeout=PATIENCE)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "task_inputs[1].data.prompt" in refused.value.details()


def test_the_ingress_listens_on_every_address_in_plaintext(ray: RayServe):
    (proxy,) = ray.processes("ProxyActor")
    listening = {each.laddr for each in proxy.net_connections() if each.status == "LISTEN"}
    assert ("::", ray.ports[1]) in listening


def test_a_detached_job_is_found_on_its_own_replica_alone(ray: RayServe):
    with TextToImage(ray.target) as client:
        client.generate("a cat", steps=2, request_id="mine", on_disconnect="detach")
        outcomes = set()
        for _ in range(60):
            try:
                outcomes.add(len(list(client.attach("mine"))) > 0)
            except NotFound:
                outcomes.add(False)
        assert outcomes == {True, False}


def test_a_lost_replica_is_unavailable_and_another_takes_its_place(ray: RayServe, stub: pb_grpc.TextToImageServiceStub):
    def outcome(number: int) -> str:
        stream = stub.StreamGenerate(request(requestId=f"lost-{number}", **LONG_JOB))
        try:
            first_step(stream)
            started.append(number)
            for _ in stream:
                pass
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
        return "finished"

    def unary_outcome() -> str:
        """Of a call that gRPC would make again, had the ingress not sent its headers."""
        with grpc.insecure_channel(ray.target, RETRIES) as channel:
            # As if the answer were a stream: gRPC hands the headers of others over at their end.
            method = channel.unary_stream(f"/{SERVICE}/Generate", pb.GenerateRequest.SerializeToString)
            call = method(request(requestId="lost", **LONG_JOB))
            call.initial_metadata()
            started.append(4)
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            return f"{caught.value.code().name}: {caught.value.details()}"

    started: list[int] = []
    before = len(ray.lines)
    with ThreadPoolExecutor(5) as pool:
        calls = [pool.submit(unary_outcome), *(pool.submit(outcome, number) for number in range(4))]
        while len(started) < 2 or 4 not in started:
            time.sleep(0.05)
        replicas = ray.processes("ServeReplica")
        assert len(replicas) == 2
        for each in replicas:
            each.kill()
        outcomes = {call.result() for call in calls}
    assert outcomes == {"UNAVAILABLE: the replica that had this call is gone; try again"}
    ray.wait_for_log(r"(?s)(replica: serving.*){2}", before)
    with TextToImage(ray.target, timeout=PATIENCE) as client:
        assert client.generate("a cat", steps=2).images


def test_lost_ingress_is_unavailable_and_returns_while_its_jobs_run_on(ray: RayServe):
    (proxy,) = ray.processes("ProxyActor")
    with grpc.insecure_channel(ray.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stream = pb_grpc.TextToImageServiceStub(channel).StreamGenerate(request(requestId="cut-off", **LONG_JOB))
        first_step(stream)
        proxy.kill()
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    ray.wait_for_log(r"cut-off: finished after \d+ model calls")
    with grpc.insecure_channel(ray.target) as channel:
        grpc.channel_ready_future(channel).result(PATIENCE)
    with TextToImage(ray.target, timeout=PATIENCE) as client:
        assert client.model().name == "tiny"


# What `serve deploy` makes of it: one replica that others join under load, tokens, and a device that fails.


@pytest.fixture(scope="module")
def changed(ray: RayServe, weights: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> RayServe:
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text(f"alice {hashlib.sha256(b'a-token').hexdigest()}\n")
    quick = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2}
    quick |= {"upscale_delay_s": 1, "downscale_delay_s": 5, "metrics_interval_s": 1, "look_back_period_s": 2}
    own = configuration(ray.ports, weights | {"T2I_TOKENS": str(tokens)}, autoscaling_config=quick)
    faulty = configuration(
        ray.ports,
        weights | {"T2I_DEVICE_TIMEOUT_SECONDS": "5", "T2I_MAX_IMAGES": "24"},
        autoscaling_config=None,
        num_replicas=1,
        health_check_period_s=1,
    )["applications"][0]
    own["applications"].append(
        faulty | {"name": "faulty", "route_prefix": "/f", "import_path": "ray_faulty:application"}
    )
    before = len(ray.lines)
    ray.deploy(own)
    ray.wait_for_log(r"(?s)(replica: serving.*){2}", before)
    return ray


APPLICATION = ("application", "text-to-image")
TOKEN = ("authorization", "Bearer a-token")


def test_tokens_are_asked_for(changed: RayServe, stub: pb_grpc.TextToImageServiceStub):
    def code(*metadata: tuple[str, str]) -> grpc.StatusCode:
        try:
            stub.GetModel(pb.GetModelRequest(), metadata=(APPLICATION, *metadata), timeout=PATIENCE)
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    while code(TOKEN) == grpc.StatusCode.NOT_FOUND:  # the ingress has not heard of the change yet
        time.sleep(0.1)
    assert code(TOKEN) == grpc.StatusCode.OK
    assert code() == grpc.StatusCode.UNAUTHENTICATED
    assert code(("authorization", "Bearer another")) == grpc.StatusCode.UNAUTHENTICATED


def test_replicas_come_and_go_with_the_calls_and_none_fails(changed: RayServe, stub: pb_grpc.TextToImageServiceStub):
    before = len(changed.lines)

    def draw(number: int) -> int:
        asked = request(f"cat {number}", sampling={"steps": 100})
        # Of sixteen long jobs the last is refused by a slow machine if it has no more time than another call.
        return len(stub.Generate(asked, metadata=(APPLICATION, TOKEN), timeout=3 * PATIENCE).data.choices)

    def came(pattern: str) -> bool:
        return re.search(pattern, "\n".join(changed.lines[before:])) is not None

    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(draw, number) for number in range(8)]
        while not came("replica: serving"):  # all the time that the second one needs to start, and a while longer
            if sum(not call.done() for call in calls) < 8:
                calls.append(pool.submit(draw, len(calls)))
            time.sleep(0.02)
        calls += [pool.submit(draw, number) for number in range(8)]
        # and while one of them goes, with fewer callers
        trickle = 0
        while not came("runtime: stopped"):
            assert draw(trickle) == 1
            trickle += 1
        assert {call.result() for call in calls} == {1}


def test_more_than_four_megabytes_pass_both_ways(changed: RayServe):
    loud = {"parameter": {"n": 24}, "sampling": {"steps": 1, "width": 64, "height": 64}}
    loud["output"] = {"format": "FORMAT_PNG", "maxMessageBytes": 64_000_000}
    faulty = (("application", "faulty"),)
    with grpc.insecure_channel(changed.target, [("grpc.max_receive_message_length", -1)]) as channel:
        stub = pb_grpc.TextToImageServiceStub(channel)
        answer = stub.Generate(request("loud", **loud), metadata=faulty, timeout=PATIENCE)
        assert len(answer.data.choices) == 24
        assert answer.ByteSize() > 4 * 1024 * 1024
        with pytest.raises(grpc.RpcError, match=r"data\.prompt") as caught:
            stub.Generate(request("x" * 5_000_000), metadata=faulty, timeout=PATIENCE)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_hung_device_replaces_its_replica(changed: RayServe, stub: pb_grpc.TextToImageServiceStub):
    faulty = ("application", "faulty")
    before = len(changed.lines)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(request("hang"), metadata=(faulty,), timeout=PATIENCE)
    assert caught.value.code() == grpc.StatusCode.ABORTED
    assert "device does not answer" in caught.value.details()
    lost = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(caught.value).details[0].Unpack(lost)
    assert lost.reason == "DEVICE_LOST"
    changed.wait_for_log("replica: serving", before)
    assert stub.Generate(request(sampling={"steps": 2}), metadata=(faulty,), timeout=PATIENCE).data.choices
