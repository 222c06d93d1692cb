"""What a server process promises from its first moment to its exit code."""

import os
import re
import socket
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import LONG_JOB, PATIENCE, SERVICE, connect, first_step, request

from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def test_the_port_is_open_but_not_serving_until_the_first_image_is_made(start_server):
    server = start_server(cold=True)
    with connect(server) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=SERVICE), timeout=PATIENCE
        )
        assert next(watch).status == NOT_SERVING
        stub = pb_grpc.TextToImageServiceStub(channel)
        for call in (lambda: stub.GetModel(pb.GetModelRequest(), timeout=9), lambda: stub.Generate(request())):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert next(watch).status == SERVING
        assert "warm-up: finished" in server.log
        watch.cancel()


def test_sigterm_rejects_new_calls_finishes_running_ones_and_exits_with_0(start_server):
    server = start_server("--grace-seconds", "600").wait_until_ready()
    with connect(server) as channel:
        stub, health = pb_grpc.TextToImageServiceStub(channel), health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
        assert next(watch).status == SERVING
        running = stub.StreamGenerate(request(sampling={"steps": 150}), timeout=PATIENCE)
        first_step(running)
        server.terminate()
        assert next(watch).status == NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(request(), timeout=PATIENCE)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert [event.WhichOneof("event") for event in running][-2:] == ["choice", "done"]
    assert server.wait() == 0
    assert "Traceback" not in server.log
    assert re.search(r"warm-up: finished after .* s of it after the cancellation; took \d+\.\d\d s$", server.log, re.M)
    assert re.search(r"stopped; jobs: 1 finished; device time \d+\.\d s, 0\.000 s of it wasted, ETA off by", server.log)


@pytest.mark.parametrize("how", ["the grace period ends", "a second signal comes"])
def test_a_call_that_outlives_the_grace_period_hears_unavailable(start_server, how: str):
    server = start_server("--grace-seconds", "0" if how == "the grace period ends" else "600").wait_until_ready()
    with connect(server) as channel:
        running = pb_grpc.TextToImageServiceStub(channel).StreamGenerate(request(**LONG_JOB))
        first_step(running)
        server.terminate()
        if how == "a second signal comes":
            server.wait_for_log("draining")
            server.terminate()
        with pytest.raises(grpc.RpcError) as caught:
            list(running)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert server.wait() == 0
    assert "Traceback" not in server.log


@pytest.mark.parametrize("moment", ["loading the model", "warming up"])
def test_sigterm_before_ready_stops_without_serving(start_server, moment: str):
    server = start_server(cold=True)
    server.wait_for_log(moment)
    server.terminate()
    assert server.wait() == 0
    assert "lifecycle: serving" not in server.log
    assert "ERROR" not in server.log


def test_the_ready_file_holds_the_address_while_the_server_serves(start_server, tmp_path: Path):
    ready = tmp_path / "ready"
    ready.write_text("left by a server that was killed")
    server = start_server("--ready-file", str(ready))
    assert server.target
    assert not ready.exists()
    server.wait_until_ready()
    assert ready.read_text() == f"{server.target}\n"
    assert server.stop() == 0
    assert list(tmp_path.iterdir()) == []


def test_every_flag_is_an_environment_variable_too(start_server):
    server = start_server(T2I_MAX_QUEUE="3", T2I_MODEL_NAME="renamed").wait_until_ready()
    with connect(server) as channel:
        model = pb_grpc.TextToImageServiceStub(channel).GetModel(pb.GetModelRequest(), timeout=9)
    assert (model.limits.max_queue, model.name) == (3, "renamed")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-queue", "0"], "--max-queue: must be at least 1, is '0'"),
        (["--listen", "nowhere"], "--listen: give HOST:PORT"),
        (["--refiner", "somewhere"], "--refiner was given without --base"),
        (["--compile-while-serving"], "--compile-while-serving and --compile-sizes are for"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag; --help lists the flags"),
    ],
)
def test_bad_flags_are_told_in_words_with_exit_code_2(start_server, flags: list[str], words: str):
    server = start_server(*flags)
    assert server.wait() == 2
    assert words in server.log
    assert "Traceback" not in server.log


def test_a_taken_port_ends_the_server_with_3(start_server):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = start_server("--listen", f"127.0.0.1:{port}")
        assert server.wait() == 3
    assert f"cannot listen on 127.0.0.1:{port}: it is in use; stop the other process or give another port" in server.log
    assert "Traceback" not in server.log


def test_a_missing_checkpoint_ends_the_server_with_10_and_one_line(start_server, tmp_path):
    server = start_server("--base", str(tmp_path / "absent"))
    assert server.wait() == 10
    assert "absent does not exist; give the folder that `hf download`" in server.log
    assert "stopped;" not in server.log


def test_two_servers_never_share_a_port(start_server):
    first = start_server()
    assert start_server("--listen", first.target).wait() == 3


@pytest.mark.parametrize("kind", ["in no folder", "a folder"])
def test_unwritable_ready_file_exits_with_4_before_loading(start_server, tmp_path, kind):
    path = {"in no folder": tmp_path / "missing" / "ready", "a folder": tmp_path}[kind]
    server = start_server("--ready-file", str(path), program=("tests/support/steady_server.py",), cold=True)
    assert server.wait() == 4
    assert f"cannot write the ready file {path}: " in server.log
    assert "listening" not in server.log
    assert "Traceback" not in server.log


@pytest.mark.parametrize("kind", ["a pipe", "a link to one"])
def test_ready_file_must_be_a_regular_file_and_others_stay_untouched(start_server, tmp_path, kind):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    path = tmp_path / ("pipe" if kind == "a pipe" else "link")
    server = start_server("--ready-file", str(path), program=("tests/support/steady_server.py",))
    assert server.wait() == 4
    assert f"cannot write the ready file {path}: it is no regular file" in server.log
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "pipe"]


@pytest.mark.parametrize("missing", ["base", "refiner"])
def test_a_folder_without_a_checkpoint_ends_the_server_before_it_serves(start_server, tmp_path: Path, missing: str):
    server = start_server("--base", str(tmp_path), *(["--refiner", str(tmp_path)] if missing == "refiner" else []))
    assert server.wait() >= 10
    assert str(tmp_path) in server.log
    assert "lifecycle: serving" not in server.log
    assert "Traceback" not in server.log


def test_hung_device_exits_with_6(start_server):
    server = start_server(
        "--device-timeout-seconds", "2", program=("tests/support/faulty_server.py",)
    ).wait_until_ready()
    with connect(server) as channel:
        stub, health = pb_grpc.TextToImageServiceStub(channel), health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=PATIENCE)
        assert next(watch).status == SERVING
        calls = [stub.Generate.future(request(prompt), timeout=PATIENCE) for prompt in ("hang", "a cat")]
        assert next(watch).status == NOT_SERVING
        for call in calls:
            assert "the device does not answer" in call.details()
        assert [call.code() for call in calls] == [grpc.StatusCode.ABORTED, grpc.StatusCode.UNAVAILABLE]
    assert server.wait() == 6
    assert "Traceback" not in server.log


def test_device_errors_end_only_the_call_that_met_them(start_server):
    server = start_server("--max-batch", "4", program=("tests/support/faulty_server.py",)).wait_until_ready()
    with connect(server) as channel:
        stub = pb_grpc.TextToImageServiceStub(channel)
        prompts = ("a cat", "broken", "a dog")
        calls = [stub.Generate.future(request(prompt), timeout=PATIENCE) for prompt in prompts]
        assert [call.code() for call in calls] == [
            grpc.StatusCode.OK,
            grpc.StatusCode.INTERNAL,
            grpc.StatusCode.OK,
        ]
        full = stub.Generate.future(request("no memory", sampling={"width": 512, "height": 512}), timeout=PATIENCE)
        assert full.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "do not fit in the device's memory" in full.details()
        assert stub.Generate(request(), timeout=PATIENCE).data.choices
