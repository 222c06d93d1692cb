"""Targets are checked and completed, and loopback targets bypass the proxy."""

import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse

from text_to_image_client import TLS, AsyncTextToImage, ServingStatus, TextToImage, TextToImageError
from text_to_image_client._target import complete_target, is_loopback
from text_to_image_client.cli import main
from text_to_image_client.launcher import ChildServer, ServerStartError


@pytest.mark.parametrize(
    ("target", "completed"),
    [
        ("127.0.0.1:50051", None),
        ("localhost", "localhost:50051"),
        ("images.example.org", "images.example.org:50051"),
        ("images.example.org:443", None),
        ("10.0.0.7", "10.0.0.7:50051"),
        ("[::1]", "[::1]:50051"),
        ("[::1]:1", None),
        ("my_host-2", "my_host-2:50051"),
        ("dns:///images.example.org:50051", None),
        ("ipv4:10.0.0.7:50051,10.0.0.8:50051", None),
        ("unix:/run/t2i.sock", None),
        ("unix-abstract:t2i", None),
    ],
)
def test_a_host_alone_gets_the_default_port(target: str, completed: str | None):
    assert complete_target(target) == (completed or target)
    with TextToImage(target) as client:
        assert client.target == AsyncTextToImage(target).target == (completed or target)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("", "target is empty; give HOST:PORT"),
        ("  ", "target is empty"),
        ("http://localhost:50051", 'without http://: give "localhost:50051"$'),
        ("https://images.example.org/", r'without https://: give "images.example.org", and tls=True'),
        ("grpc://h:1", 'without grpc://: give "h:1"'),
        ("::1", r'needs brackets: "\[::1\]:50051"'),
        ("/run/t2i.sock", 'needs the prefix unix: "unix:/run/t2i.sock"'),
        ("10.0.0.7:1,10.0.0.8:1", 'need the prefix ipv4 or ipv6: "ipv4:10.0.0.7:1,10.0.0.8:1"'),
        ("localhost:", "the port of the target must be 1 to 65535, not ''"),
        ("localhost:0", "must be 1 to 65535"),
        ("localhost:65536", "must be 1 to 65535"),
        ("localhost:http", "target must be HOST:PORT"),
        ("a b:1", "target must be HOST:PORT"),
        ("ftp://x", "target must be HOST:PORT"),
    ],
)
def test_a_bad_target_is_rejected_with_a_correction(target: str, words: str):
    for make in (TextToImage, AsyncTextToImage):
        with pytest.raises(ValueError, match=words):
            make(target)
    result = CliRunner().invoke(main, ["health", "--target", target])
    assert (result.exit_code, "Error: " in result.stderr) == (2, True)
    assert "Traceback" not in result.output


def test_a_target_of_another_type_is_a_type_error():
    with pytest.raises(TypeError, match="target must be a string"):
        TextToImage(50051)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "target",
    [
        *("127.0.0.1:1", "127.9.9.9:1", "localhost:1", "LOCALHOST:1", "[::1]:1", "unix:/x", "unix-abstract:x"),
        *(
            "0.0.0.0:1",
            "[::]:1",
            "dns:///localhost:1",
            "dns:localhost:1",
            "ipv4:127.0.0.1:1,127.0.0.2:1",
            "ipv6:[::1]:1",
            "app.localhost:1",
        ),
    ],
)
def test_loopback_targets_are_recognized(target: str):
    assert is_loopback(target)


@pytest.mark.parametrize(
    "target",
    ["10.0.0.7:1", "images.example.org:1", "ipv4:127.0.0.1:1,10.0.0.7:1", "localhost.example.org:1", "[::2]:1"],
)
def test_other_targets_are_not_loopback(target: str):
    assert not is_loopback(target)


@pytest.fixture
def proxy(monkeypatch):
    """The accepted connections of an HTTP proxy, named by the environment, that never answers."""
    taken = []
    listening = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                taken.append(listening.accept())
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, url)
    for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield taken
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()


async def test_loopback_targets_bypass_the_proxy(service, proxy):
    service.health.set("", HealthCheckResponse.SERVING)
    port = service.target.rpartition(":")[2]
    for target in (service.target, f"localhost:{port}", f"dns:///localhost:{port}", f"ipv4:127.0.0.1:{port}"):
        with TextToImage(target) as client:
            assert client.health(timeout=60) is ServingStatus.SERVING
        async with AsyncTextToImage(target) as client:
            assert await client.health(timeout=60) is ServingStatus.SERVING
    assert CliRunner().invoke(main, ["health", "--target", service.target]).exit_code == 0
    assert proxy == []


def test_other_targets_use_the_proxy(proxy):
    with TextToImage("images.example.org:50051", retries=0) as client, pytest.raises(TextToImageError):
        client.health(timeout=2)
    assert proxy


def test_the_launcher_bypasses_the_proxy_and_reports_the_last_error(service, proxy, tmp_path: Path):
    (tmp_path / "log").write_text("loading\n")
    service.health.set("", HealthCheckResponse.SERVING)
    process = subprocess.Popen(["sleep", "600"])
    try:
        started = ChildServer(process, lambda: service.target, tmp_path / "log")
        assert started.wait_until_serving(60) == service.target
        service.health.set("", HealthCheckResponse.NOT_SERVING)
        with pytest.raises(ServerStartError, match=r"not ready within 0\.5 s: its health is NOT_SERVING"):
            started.wait_until_serving(0.5)
        with pytest.raises(ServerStartError, match=r"within 3 s: 127\.0\.0\.1:1: .*Connection refused"):
            ChildServer(process, lambda: "127.0.0.1:1", tmp_path / "log").wait_until_serving(3)
        with pytest.raises(ServerStartError, match=r"within 0\.2 s: it has no address yet"):
            ChildServer(process, lambda: None, tmp_path / "log").wait_until_serving(0.2)
    finally:
        process.kill()
        process.wait()
    assert proxy == []


async def test_a_socket_file_is_a_target(tmp_path: Path):
    server, servicer = grpc.server(ThreadPoolExecutor(2)), health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    servicer.set("", HealthCheckResponse.SERVING)
    target = f"unix:{tmp_path / 't2i.sock'}"
    server.add_insecure_port(target)
    server.start()
    try:
        with TextToImage(target) as client:
            assert client.health(timeout=60) is ServingStatus.SERVING
        async with AsyncTextToImage(target) as client:
            assert await client.health(timeout=60) is ServingStatus.SERVING
        assert CliRunner().invoke(main, ["--target", target, "health"]).exit_code == 0
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize("make", [TextToImage, AsyncTextToImage])
def test_tls_is_true_or_files_and_nothing_else(make):
    make("127.0.0.1:1", tls=True)
    make("127.0.0.1:1", tls=TLS())
    make("127.0.0.1:1", tls=False)
    with pytest.raises(TypeError, match=r"tls must be True, or TLS with the files of certificates, not 'ca\.pem'"):
        make("127.0.0.1:1", tls="ca.pem")


def test_tls_true_starts_a_handshake():
    """The client sends a TLS record. tests/api/test_security.py tests certificates."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        target = f"127.0.0.1:{listening.getsockname()[1]}"
        with ThreadPoolExecutor(1) as pool, TextToImage(target, tls=True, retries=0) as client:
            asking = pool.submit(client.health, timeout=60)
            connection, _ = listening.accept()
            with connection:
                assert connection.recv(1) == b"\x16"  # a TLS record of the handshake
            asking.exception(60)
