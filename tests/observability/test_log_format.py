"""With --log-format json every line is JSON, whoever writes it; and no start or end leaves a file behind."""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from serving import PATIENCE, ROOT, Logged, ServerProcess, connect, first_step, request

from server.observability.stderr_lines import line_of
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

STEADY = ("tests/support/steady_server.py",)

NOISE = """
import ctypes, logging, os, sys, threading, warnings
sys.path.insert(0, "tests/support")
import steady_server

class Undying:
    def __del__(self):
        raise RuntimeError("noise of a finalizer")

def load(settings):
    os.write(2, b"libgomp: noise of a library\\n")
    print("noise of a print", file=sys.stderr, flush=True)
    warnings.warn("noise of a warning")
    logging.getLogger("elsewhere").error("noise of logging")
    thread = threading.Thread(target=lambda: 1 / 0, name="noisy")
    thread.start()
    thread.join()
    Undying()
    if "crash" in os.environ.get("STEADY_NOISE", ""):
        ctypes.string_at(0)
    if "raise" in os.environ.get("STEADY_NOISE", ""):
        raise LookupError("noise of a bug")
    return steady_server.load(settings)

steady_server.program.load = load
sys.exit(steady_server.program.main())
"""


@pytest.fixture
def start(start_server) -> Callable[..., ServerProcess]:
    def started(*flags: str, program: tuple[str, ...] = STEADY, **environment: str) -> ServerProcess:
        return start_server("--log-format", "json", *flags, program=program, cold=True, **environment)

    return started


def objects(server: Logged) -> list[dict[str, str]]:
    """The lines of a server that has ended, every one of which must be JSON."""
    lines = [json.loads(line) for line in server.lines]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    return lines


def found(lines: list[dict[str, str]], words: str) -> list[tuple[str, str]]:
    """Logger and level of the lines that have these words in their message or exception."""
    return [(each["logger"], each["level"]) for each in lines if words in each["message"] + each.get("exception", "")]


def test_lines_of_libraries_threads_finalizers_and_warnings_are_json(start):
    server = start(program=("-c", NOISE), GRPC_VERBOSITY="debug", GRPC_TRACE="http").wait_until_ready()
    with connect(server) as channel:
        list(pb_grpc.TextToImageServiceStub(channel).StreamGenerate(request()))
    assert server.stop() == 0
    lines = objects(server)
    assert found(lines, "libgomp: noise of a library") == [("stderr", "warning")]
    assert found(lines, "noise of a print") == [("stderr", "warning")]
    assert found(lines, "noise of a warning")[0] == ("py.warnings", "warning")
    assert found(lines, "noise of logging") == [("elsewhere", "error")]
    assert ("server.observability.logs", "critical") in found(lines, "ZeroDivisionError")
    assert found(lines, "noise of a finalizer") == [("server.observability.logs", "error")]
    of_grpc = [each for each in lines if ".cc:" in each["message"]]
    assert of_grpc, "gRPC's own lines are asked for by the environment"
    assert {each["logger"] for each in of_grpc} == {"stderr"}


def test_library_lines_below_the_level_are_dropped(start):
    server = start("--log-level", "error", program=("-c", NOISE), GRPC_VERBOSITY="debug", GRPC_TRACE="http")
    server.wait_for_log("noise of a finalizer")
    server.stop()
    assert {each["level"] for each in objects(server)} <= {"error", "critical"}


def test_a_crash_of_the_interpreter_is_json_to_its_last_line(start):
    server = start(program=("-c", NOISE), STEADY_NOISE="crash")
    assert server.wait() < 0
    lines = objects(server)
    assert found(lines, "Fatal Python error: Segmentation fault") == [("stderr", "warning")]
    assert found(lines, "in load")


@pytest.mark.parametrize("form", ["json", "text"])
def test_an_unexpected_error_is_logged_with_its_traceback_and_exit_code_1(start, form):
    server = start("--log-format", form, program=("-c", NOISE), STEADY_NOISE="raise")
    assert server.wait() == 1
    if form == "json":
        assert ("server.observability.logs", "critical") in found(objects(server), "LookupError: noise of a bug")
    assert "noise of a bug" in server.log


def test_grpc_lines_keep_their_level():
    levels = {"I1201 13:00:00.000000 1 a.cc:1] x": "info", "E1201 13:00:00.0 1 a.cc:1] x": "error", "oops": "warning"}
    assert {text: line_of(text)["level"] for text in levels} == levels


def test_the_log_says_of_device_time_what_the_metric_says(start):
    server = start("--metrics-listen", "127.0.0.1:0", STEADY_SECONDS="0.2").wait_until_ready()
    with connect(server) as channel:
        stream = pb_grpc.TextToImageServiceStub(channel).StreamGenerate(request(requestId="left"))
        first_step(stream)
        stream.cancel()
        server.wait_for_log("left: Cancelled")
    metrics = server.wait_for_log(r"metrics on (http://[^\s\"]+)")[1]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    wasted, deadline = "0.0", time.monotonic() + PATIENCE
    while float(wasted) == 0 and time.monotonic() < deadline:  # it is counted a moment after that line
        with opener.open(metrics, timeout=PATIENCE) as answer:
            (wasted,) = (line.split()[1] for line in answer.read().decode().splitlines() if 'use="wasted"' in line)
    assert float(wasted) > 0
    assert server.stop() == 0
    assert f"{float(wasted):.3f} s of it wasted" in server.log
    assert "nobody" not in server.log


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_server_without_a_stderr_serves_and_ends_as_any_other(tmp_path: Path, form: str):
    ready = tmp_path / "ready"
    command = [sys.executable, *STEADY, "--listen", "127.0.0.1:0", "--ready-file", str(ready), "--log-format", form]
    process = subprocess.Popen(["bash", "-c", 'exec "$0" "$@" 2>&-', *command], cwd=ROOT)
    try:
        deadline = time.monotonic() + PATIENCE
        while not ready.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert ready.exists()
        process.terminate()
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()


def test_a_ready_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path):
    """No file may grow in that process, which is what a full disk comes to."""
    limited = ["bash", "-c", 'ulimit -f 0; exec "$0" "$@"', sys.executable, *STEADY, "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(
        [*limited, "--ready-file", str(tmp_path / "ready")], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    server = Logged(process, process.stderr)
    server.wait_for_log("cannot write the ready file .*: File too large")
    assert process.wait(PATIENCE) == 4
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_server_left_of_its_ready_file_is_removed(start, tmp_path: Path):
    ready = tmp_path / "ready"
    for left in (ready, tmp_path / "ready.new"):
        left.write_text("127.0.0.1:1\n")
    server = start("--ready-file", str(ready)).wait_until_ready()
    assert [each.name for each in tmp_path.iterdir()] == ["ready"]
    assert ready.read_text() == f"{server.target}\n"
    assert server.stop() == 0
    assert list(tmp_path.iterdir()) == []
