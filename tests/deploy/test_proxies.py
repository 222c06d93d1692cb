"""What nginx and HAProxy leave of the service's calls: streams that wait, jobs cut off, large answers, error details.

Both run as Debian ships them, in front of real servers around a model of fixed times, with time limits scaled down.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from bad_requests import everything_wrong, unknown_tensors
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from proxies import Proxy
from serving import PATIENCE, RETRIES, ServerProcess, connect, request

from server.stubs.inference_v2 import open_inference_pb2 as oip
from server.stubs.inference_v2 import open_inference_pb2_grpc as oip_grpc
from text_to_image_client import Done, TextToImage
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

PROXIES = ("nginx", "haproxy")
ONCE = [("grpc.enable_retries", 0)]
CUT_SECONDS = 3
SILENCE = {
    "nginx": f"grpc_read_timeout {CUT_SECONDS}s;",
    "haproxy": f"timeout server {CUT_SECONDS}s\n    timeout client {CUT_SECONDS}s",
}
"""The proxies' settings for ending a stream after so long without a byte."""


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[ServerProcess]:
    server = ServerProcess(*flags, program=("tests/support/steady_server.py",))
    try:
        yield server.wait_until_ready()
    finally:
        server.process.kill()


@contextlib.contextmanager
def through(
    name: str, folder: Path, server: ServerProcess, settings: str = "", options: Sequence[tuple[str, Any]] = ONCE
) -> Iterator[grpc.Channel]:
    """A channel to the server through a proxy of its own. By default gRPC makes no call again on it."""
    proxy = Proxy(name, folder / name, [server.target], settings)
    try:
        with grpc.insecure_channel(proxy.target, options) as channel:
            yield channel
    finally:
        proxy.stop()


@contextlib.contextmanager
def occupied(server: ServerProcess, folder: Path) -> Iterator[Path]:
    """The device is busy until there is the file, which it is at the end at the latest."""
    release, before = folder / "release", len(server.lines)
    with connect(server) as channel:
        asked = request(f"until {release}", parameter={"seed": 1})
        stream = pb_grpc.TextToImageServiceStub(channel).StreamGenerate(asked, timeout=PATIENCE)
        server.wait_for_log("begins: 1", before)
        try:
            yield release
        finally:
            release.touch()
            stream.cancel()


# Streams in which nothing happens.


def test_heartbeats_keep_a_stream_open_beyond_the_timeout_of_the_proxy(tmp_path: Path):
    def follow(channel: grpc.Channel) -> tuple[list[pb.StreamGenerateResponse], list[pb.StreamGenerateResponse]]:
        """The events until the proxy would long have ended the stream, and those from then on."""
        stream = pb_grpc.TextToImageServiceStub(channel).StreamGenerate(request("waits"), timeout=PATIENCE)
        waited, began = [], time.monotonic()
        while time.monotonic() < began + 2 * CUT_SECONDS:
            waited.append(next(stream))
        release.touch()
        return waited, list(stream)

    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving("--heartbeat-seconds", "0.25"))
        release = stack.enter_context(occupied(server, tmp_path))
        channels = [stack.enter_context(through(name, tmp_path, server, SILENCE[name])) for name in PROXIES]
        for waited, rest in ThreadPoolExecutor(2).map(follow, channels):
            assert {each.WhichOneof("event") for each in waited} == {"queued"}
            assert [each.number for each in waited] == sorted(each.number for each in waited)
            assert len(waited) > len({each.number for each in waited})
            assert rest[-1].HasField("done")


def test_proxy_ends_stream_without_heartbeats_but_detached_job_continues(tmp_path: Path):
    def follow(name: str, channel: grpc.Channel) -> tuple[grpc.StatusCode, list[int], list[int]]:
        """The status that the proxy ends the stream with, the numbers of its events and of those after it."""
        stub = pb_grpc.TextToImageServiceStub(channel)
        asked = request("waits", requestId=name, onDisconnect="ON_DISCONNECT_DETACH")
        stream = stub.StreamGenerate(asked, timeout=PATIENCE)
        numbers = []
        with pytest.raises(grpc.RpcError) as cut:
            numbers.extend(event.number for event in stream)
        release.touch()
        rest = list(stub.Attach(pb.AttachRequest(request_id=name, after=numbers[-1]), timeout=PATIENCE))
        assert rest[-1].HasField("done")
        return cut.value.code(), numbers, [event.number for event in rest]

    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving("--heartbeat-seconds", "0"))
        for name in PROXIES:
            (tmp_path / name).mkdir()
            release = stack.enter_context(occupied(server, tmp_path / name))
            channel = stack.enter_context(through(name, tmp_path, server, SILENCE[name]))
            code, before, after = follow(name, channel)
            assert code not in (grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED)
            assert before == sorted(set(before))
            assert after == sorted(set(after))
            assert after[0] > before[-1]


def test_python_client_reattaches_when_nginx_ends_its_stream(tmp_path: Path):
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving("--heartbeat-seconds", "0"))
        release = stack.enter_context(occupied(server, tmp_path))
        proxy = Proxy("nginx", tmp_path / "nginx", [server.target], SILENCE["nginx"])
        stack.callback(proxy.stop)
        client = stack.enter_context(TextToImage(proxy.target, timeout=PATIENCE))
        pool = stack.enter_context(ThreadPoolExecutor(1))
        events = pool.submit(list, client.stream("waits", request_id="cut", on_disconnect="detach"))
        server.wait_for_log("StreamGenerate cut CANCELLED")
        release.touch()
        assert isinstance(events.result()[-1], Done)
        assert server.log.count("StreamGenerate cut ") == 1


# All calls, at the proxies' own limits.


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serving("--kserve") as server:
        yield server


@pytest.fixture(params=PROXIES)
def channel(request: pytest.FixtureRequest, server: ServerProcess, tmp_path: Path) -> Iterator[grpc.Channel]:
    with through(request.param, tmp_path, server) as channel:
        yield channel


def test_an_answer_as_large_as_clients_take_arrives(channel: grpc.Channel, server: ServerProcess):
    asked = request("loud", parameter={"seed": 1}, output={"format": "FORMAT_PNG"})
    with connect(server) as direct:
        sent, arrived = (
            pb_grpc.TextToImageServiceStub(each).Generate(asked, timeout=PATIENCE) for each in (direct, channel)
        )
    assert 4_000_000 < sent.ByteSize() <= 4 * 1024 * 1024
    assert arrived.data == sent.data


def status_of(call: grpc.Call) -> tuple[grpc.StatusCode, str, Any]:
    with pytest.raises(grpc.RpcError) as caught:
        call.result()
    assert "x-request-id" in dict(caught.value.trailing_metadata())
    return caught.value.code(), caught.value.details(), rpc_status.from_call(caught.value)


def names_that_are_unknown() -> oip.ModelInferRequest:
    """A request with more to say of it than an error has room for."""
    message = unknown_tensors()
    message.model_name = "steady"
    return message


REFUSED = {
    "Generate": lambda channel: pb_grpc.TextToImageServiceStub(channel).Generate.future(everything_wrong()),
    "ModelInfer": lambda channel: oip_grpc.GRPCInferenceServiceStub(channel).ModelInfer.future(
        names_that_are_unknown()
    ),
}


@pytest.mark.parametrize("method", REFUSED)
def test_an_error_that_fills_the_trailers_arrives_whole(channel: grpc.Channel, server: ServerProcess, method: str):
    with connect(server) as direct:
        sent, arrived = (status_of(REFUSED[method](each)) for each in (direct, channel))
    bad = error_details_pb2.BadRequest()
    assert arrived[2].details[0].Unpack(bad)
    assert arrived[1].endswith(" more"), "there was more to say"
    assert arrived == sent


def test_the_status_of_a_job_that_fails_arrives_after_the_headers(channel: grpc.Channel):
    call = pb_grpc.TextToImageServiceStub(channel).Generate.future(request("broken"), timeout=PATIENCE)
    code, message, status = status_of(call)
    assert code is grpc.StatusCode.INTERNAL
    assert message == status.message == "the model failed on this request; the server's log has the cause"


@pytest.mark.parametrize("name", PROXIES)
def test_no_call_of_thousands_on_one_connection_is_lost(name: str, server: ServerProcess, tmp_path: Path):
    """nginx closes a connection after a thousand requests, by default, with some of them under way.

    Those that it has not taken any more are made again by gRPC, under the retry policy of the Python client.
    """
    with through(name, tmp_path, server, options=RETRIES) as channel, ThreadPoolExecutor(8) as pool:
        stub = pb_grpc.TextToImageServiceStub(channel)
        calls = pool.map(lambda _: stub.GetModel(pb.GetModelRequest(), timeout=PATIENCE).name, range(2500))
        assert set(calls) == {"steady"}
