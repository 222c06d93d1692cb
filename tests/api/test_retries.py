"""A request that costs a server its device, or its process, costs no other server.

gRPC's libraries and proxies retry calls without headers, so a unary call sends its headers when its jobs are admitted.
The servers are real, around a model of fixed times; the calls are raw, with the retry policy of the Python client.
"""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from proxies import Proxy
from replicas import Replicas
from serving import PATIENCE, RETRIES, RETRY_POLICY, SERVICE, ServerProcess, request
from stepped_model import SteppedModel

from server.api.frontend import Frontend
from server.api.instill import InstillServicer, ModelPublicServicer
from server.api.open_inference import OpenInferenceServicer
from server.engine.engine import Engine
from server.engine.scheduling import QueueLimits
from server.observability.interceptor import TelemetryInterceptor
from server.observability.metrics import Metrics
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


def device_lost(call: Any) -> bool:
    """Return whether the status has the error info of a lost device."""
    lost = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(call)
    return (
        call.code() is grpc.StatusCode.ABORTED
        and status.details[0].Unpack(lost)
        and (lost.reason, lost.domain) == ("DEVICE_LOST", "text_to_image.v1")
    )


# Three servers.


def test_a_call_that_hangs_the_device_ends_one_server_of_three(replicas: Replicas):
    seed = replicas.fresh_seed()
    with replicas.channel() as channel:
        asked = request("hang", parameter={"seed": seed})
        call = pb_grpc.TextToImageServiceStub(channel).Generate.future(asked, timeout=PATIENCE)
        assert device_lost(call), (call.code(), call.details())
        assert "x-request-id" in dict(call.trailing_metadata())
    (gone,) = replicas.that_began(seed)
    assert gone.wait() == 6
    assert len(replicas.alive()) == 2


@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
def test_a_call_that_kills_its_server_ends_one_server_of_three(replicas: Replicas, method: str):
    seed = replicas.fresh_seed()
    with replicas.channel() as channel:
        # Either as a stream, whose errors come where it is read.
        call = channel.unary_stream(f"/{SERVICE}/{method}", pb.GenerateRequest.SerializeToString)(
            request("hang", parameter={"seed": seed}), timeout=PATIENCE
        )
        began = replicas.wait_until_begun(seed)
        call.initial_metadata()  # waits for the headers: a call without them is gRPC's to retry
        began[0].process.send_signal(signal.SIGKILL)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    began[0].wait()
    assert replicas.that_began(seed) == began
    assert len(replicas.alive()) == 2


def test_behind_haproxy_a_call_beyond_its_timeout_begins_once(tmp_path: Path):
    server = ServerProcess(program=("tests/support/steady_server.py",), STEADY_SECONDS="0.1").wait_until_ready()
    proxy = Proxy("haproxy", tmp_path, [server.target], "timeout server 1s")
    try:
        with grpc.insecure_channel(proxy.target, RETRIES) as channel:
            asked = request(parameter={"seed": 4}, sampling={"steps": 150})
            call = pb_grpc.TextToImageServiceStub(channel).Generate.future(asked, timeout=PATIENCE)
            assert call.code() is not grpc.StatusCode.OK
        server.wait_for_log(r"Generate \S+ CANCELLED")
        assert server.log.count("begins: 4\n") == 1
    finally:
        proxy.stop()
        server.stop()


# Every method that begins a job, in this process.


def model_infer() -> oip.ModelInferRequest:
    message = oip.ModelInferRequest(model_name="stepped")
    message.inputs.add(name="prompt", datatype="BYTES", shape=[2]).contents.bytes_contents.extend([b"one", b"two"])
    return message


def of_instill(message: Any) -> Any:
    for prompt in ("one", "two"):
        message.task_inputs.add().update({"data": {"prompt": prompt}})
    return message


METHODS = {
    "text_to_image.v1.TextToImageService/Generate": request(),
    "inference.GRPCInferenceService/ModelInfer": model_infer(),
    "model.ray.v1alpha.UserDefinedService/__call__": of_instill(user_defined.CallRequest()),
    "model.model.v1alpha.ModelPublicService/TriggerNamespaceModel": of_instill(
        public.TriggerNamespaceModelRequest(model_id="stepped")
    ),
    "model.model.v1alpha.ModelPublicService/TriggerNamespaceLatestModel": of_instill(
        public.TriggerNamespaceLatestModelRequest(model_id="stepped")
    ),
}


def call(channel: grpc.aio.Channel, method: str) -> Any:
    """Call a unary method as if it streamed: gRPC delivers the headers of unary calls only at their end."""
    message = METHODS[method]
    return channel.unary_stream(f"/{method}", type(message).SerializeToString)(message)


class InProcessServer:
    """A server in this process, whose model waits for the test, and a channel that retries every error."""

    def __init__(self, jobs: int) -> None:
        self.model = SteppedModel()
        self.engine = Engine(QueueLimits(jobs=jobs))
        self.metrics = Metrics(jobs)

    async def __aenter__(self) -> "InProcessServer":
        await asyncio.wrap_future(self.engine.start(lambda: self.model))
        frontend = Frontend(self.engine, Settings())
        frontend.open(self.model.info)
        self.server = grpc.aio.server(interceptors=[TelemetryInterceptor(self.metrics, None)])
        pb_grpc.add_TextToImageServiceServicer_to_server(TextToImageServicer(frontend, 30), self.server)
        oip_grpc.add_GRPCInferenceServiceServicer_to_server(OpenInferenceServicer(frontend), self.server)
        user_defined_grpc.add_UserDefinedServiceServicer_to_server(InstillServicer(frontend), self.server)
        public_grpc.add_ModelPublicServiceServicer_to_server(ModelPublicServicer(frontend), self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        policy = RETRY_POLICY | {"maxAttempts": 2, "retryableStatusCodes": ["ABORTED", "RESOURCE_EXHAUSTED"]}
        config = {"methodConfig": [{"name": [{}], "retryPolicy": policy}]}
        self.channel = grpc.aio.insecure_channel(
            f"127.0.0.1:{port}", options=[("grpc.service_config", json.dumps(config))]
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self.engine.stop()
        self.model.allow(1000)
        await self.channel.close()
        await self.server.stop(None)
        assert await asyncio.to_thread(self.engine.join, PATIENCE)


@pytest.fixture
async def local() -> AsyncIterator[InProcessServer]:
    async with InProcessServer(jobs=4) as local:
        yield local


@pytest.mark.parametrize("method", METHODS)
async def test_headers_are_sent_on_admission_and_the_status_stays_complete(
    local: InProcessServer, method: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    running = call(local.channel, method)
    await asyncio.wait_for(running.initial_metadata(), PATIENCE)
    assert not running.done()
    await asyncio.to_thread(local.model.calls.get, timeout=PATIENCE)
    local.engine.abandon()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.read()
    assert device_lost(caught.value)
    assert len(ended(caplog)) == 1


@pytest.mark.parametrize("method", list(METHODS)[1:])
async def test_a_call_whose_second_job_is_rejected_sends_no_headers_and_leaves_no_job(
    method: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    async with InProcessServer(jobs=1) as local:
        local.model.allow(1000)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(local.channel, method).read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(ended(caplog)) == 2  # gRPC has made it again
        labels = {"method": method.rpartition("/")[2]}
        assert local.metrics.registry.get_sample_value("t2i_retries_total", labels) == 1
        assert local.engine.statistics().outcomes.keys() <= {"Cancelled"}


def ended(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the log lines of ended calls."""
    return [each.getMessage() for each in caplog.records if each.name == "server.api.grpc_calls"]
