"""What a server does on SIGHUP: it reads its files again, or drains when its terminal is gone."""

import fcntl
import hashlib
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from serving import ROOT, Logged, ServerProcess, connect, first_step, request
from tls import LOCAL, Authority

from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

STEADY = ("tests/support/steady_server.py",)


@pytest.fixture
def start(start_server) -> Callable[..., ServerProcess]:
    return lambda *flags, **environment: start_server(*flags, program=STEADY, cold=True, **environment)


def hang_up(server: Logged) -> None:
    server.process.send_signal(signal.SIGHUP)


def test_sighup_reloads_tokens_and_certificates_while_a_job_runs(start, tmp_path: Path):
    authority = Authority(tmp_path / "ours")
    certificate, key = authority.issue("server", *LOCAL)
    tokens = tmp_path / "tokens"
    tokens.write_text(f"one {hashlib.sha256(b'first').hexdigest()}\n")
    tls = ("--tls-certificate", str(certificate), "--tls-key", str(key))
    server = start("--tokens", str(tokens), *tls, STEADY_SECONDS="0.3").wait_until_ready()
    credentials = grpc.ssl_channel_credentials(authority.file.read_bytes())
    with grpc.secure_channel(server.target, credentials, [("grpc.enable_http_proxy", 0)]) as channel:
        stub = pb_grpc.TextToImageServiceStub(channel)
        stream = stub.StreamGenerate(request(), metadata=[("authorization", "Bearer first")])
        first_step(stream)
        hang_up(server)
        server.wait_for_log("INFO .*SIGHUP: reloading")
        server.wait_for_log("INFO .*read the tokens again")
        server.wait_for_log("INFO .*read the certificates again")
        tokens.write_text("nonsense\n")
        hang_up(server)
        server.wait_for_log("WARNING .*the changed tokens cannot be used, keeping the previous ones: line 1")
        assert [event.WhichOneof("event") for event in stream][-1] == "done"
    assert server.process.poll() is None


def test_where_there_is_nothing_to_read_it_says_so_and_serves_on(start, tmp_path: Path):
    ready = tmp_path / "ready"
    server = start("--ready-file", str(ready)).wait_until_ready()
    hang_up(server)
    server.wait_for_log("SIGHUP: no tokens or certificates to reload")
    assert ready.exists()
    assert server.stop() == 0


def test_a_server_that_was_started_with_nohup_does_nothing(start, tmp_path: Path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        server = start().wait_until_ready()
    finally:
        signal.signal(signal.SIGHUP, before)
    hang_up(server)
    with connect(server) as channel:
        list(pb_grpc.TextToImageServiceStub(channel).StreamGenerate(request()))
    assert "SIGHUP" not in server.log


@pytest.fixture
def in_a_terminal(tmp_path: Path) -> Iterator[tuple[Logged, int]]:
    """A server that leads the session of a terminal, as what a window of a terminal runs; and the terminal's other end.

    Its log goes to a pipe, since nobody can read what is written to a terminal that is gone.
    """
    master, slave = pty.openpty()

    def take_the_terminal() -> None:
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, *STEADY, "--listen", "127.0.0.1:0", "--ready-file", str(tmp_path / "ready")],
        cwd=ROOT,
        env=os.environ | {"STEADY_SECONDS": "0.3"},
        stdin=slave,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=take_the_terminal,
    )
    os.close(slave)
    server = Logged(process, process.stderr)
    yield server, master
    process.kill()
    process.wait()


def test_the_end_of_its_terminal_drains_as_sigterm_does(in_a_terminal, tmp_path: Path):
    server, terminal = in_a_terminal
    target = server.wait_for_log(r"lifecycle: serving \S+ on (\S+)")[1]
    with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        stream = pb_grpc.TextToImageServiceStub(channel).StreamGenerate(request())
        first_step(stream)
        os.close(terminal)
        server.wait_for_log("SIGHUP: the terminal is gone")
        server.wait_for_log("draining")
        hang_up(server)  # as a shell does, after the kernel did
        assert [event.WhichOneof("event") for event in stream][-1] == "done"
    assert server.process.wait(60) == 0
    assert not (tmp_path / "ready").exists()


def test_sighup_to_a_server_with_its_terminal_there_is_no_end(in_a_terminal):
    server, terminal = in_a_terminal
    server.wait_for_log("lifecycle: serving")
    hang_up(server)
    server.wait_for_log("SIGHUP: no tokens or certificates to reload")
    assert server.process.poll() is None
    os.close(terminal)
    assert server.process.wait(60) == 0
