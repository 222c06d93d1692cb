"""Addresses: all addresses of a name or none, socket files, several at once, both address families."""

import ast
import asyncio
import errno
import os
import re
import signal
import socket
import stat
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import ValidationError
from serving import PATIENCE, ROOT, ServerProcess

from server.api import addresses
from server.api.standard_services import HealthServicer
from server.errors import BindError
from server.observability import metrics
from server.observability.metrics import Metrics
from server.settings import Settings
from text_to_image_client import ServingStatus, TextToImage

SERVING = health_pb2.HealthCheckResponse.SERVING
STEADY = ("tests/support/steady_server.py",)


def has(host: str) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as tried:
            tried.bind((host, 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has("::1"), reason="this machine has no IPv6")


@pytest.fixture
def start(start_server) -> Callable[..., ServerProcess]:
    return lambda *flags, **environment: start_server(*flags, program=STEADY, cold=True, **environment)


@pytest.fixture(params=["127.0.0.1", "::1"])
def taken(request: pytest.FixtureRequest) -> Iterator[int]:
    """Yield a port that another server has on one address of localhost only."""
    with socket.socket(socket.AF_INET6 if ":" in request.param else socket.AF_INET) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind((request.param, 0))
        other.listen()
        yield other.getsockname()[1]


def health(target: str) -> int:
    with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE, wait_for_ready=True).status


@pytest.fixture
def two_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolve localhost to 127.0.0.1 and ::1, as on most machines; some have only the former."""
    real = socket.getaddrinfo

    def found(host, port, *arguments, **options):
        if host != "localhost":
            return real(host, port, *arguments, **options)
        return [*real("::1", port, *arguments, **options), *real("127.0.0.1", port, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", found)


@needs_ipv6
@pytest.mark.usefixtures("two_families")
class TestHostWithTwoAddresses:
    @pytest.mark.parametrize("host", ["localhost", "0.0.0.0", "[::]"])
    def test_is_not_bound_if_one_address_is_in_use(self, taken, host):
        bound: list[str] = []
        with pytest.raises(BindError, match=rf"cannot listen on .*:{taken}: .* is in use; stop the other process"):
            addresses.bind(f"{host}:{taken}", bound.append)
        with pytest.raises(BindError, match=f":{taken}: .* is in use; "):
            Metrics(1).listen(f"{host}:{taken}")
        assert bound == []

    @pytest.mark.parametrize("flag", ["--listen", "--health-listen", "--metrics-listen"])
    def test_an_address_in_use_ends_the_server_with_exit_code_3(self, start, taken, flag):
        server = start(flag, f"[::]:{taken}")
        assert server.wait() == 3
        assert f"cannot listen on [::]:{taken}: " in server.log
        assert " is in use; stop the other process or give another port" in server.log
        assert "Traceback" not in server.log

    async def test_both_addresses_are_served_at_the_same_port(self):
        server = grpc.aio.server()
        health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(("",)), server)
        port = addresses.bind("localhost:0", server.add_insecure_port).removeprefix("localhost:")
        await server.start()
        for target in (f"127.0.0.1:{port}", f"[::1]:{port}"):
            assert await asyncio.to_thread(health, target) == SERVING
        await server.stop(None)

    def test_an_absent_address_family_is_left_out(self, monkeypatch):
        real = addresses._socket

        def without_ipv6(host: str, port: int) -> socket.socket:
            if ":" in host:
                raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
            return real(host, port)

        monkeypatch.setattr(addresses, "_socket", without_ipv6)
        ((host, port),) = addresses.literal_addresses("localhost:0")
        assert (host, port) == ("127.0.0.1", 0)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("no-such-host.invalid:0", "cannot listen on no-such-host.invalid:0: "),
        ("192.0.2.1:0", "cannot listen on 192.0.2.1:0: no address of this machine"),
        ("\u2603" * 70 + ":0", "no name of a host"),
    ],
    ids=["unknown", "of another machine", "no name"],
)
def test_bind_errors_give_the_reason(address, words):
    with pytest.raises(BindError, match=words):
        addresses.bind(address, lambda _: pytest.fail("nothing is to be bound"))


class TestSocketFiles:
    def test_a_unix_socket_is_served_and_its_file_removed_at_the_end(self, start, tmp_path: Path):
        path, ready = tmp_path / "t2i.sock", tmp_path / "ready"
        server = start("--listen", f"unix:{path}", "--ready-file", str(ready), "--instill").wait_until_ready()
        assert server.target == ready.read_text().strip() == f"unix:{path}"
        assert health(server.target) == SERVING
        assert stat.S_ISSOCK(path.stat().st_mode)
        with TextToImage(server.target) as client:
            assert client.health() is ServingStatus.SERVING
            assert client.generate("a cat").images
        assert server.stop() == 0
        assert list(tmp_path.iterdir()) == []

    def test_the_file_of_a_killed_server_is_replaced_that_of_a_running_one_is_not(self, start, tmp_path: Path):
        path = tmp_path / "t2i.sock"
        killed = start("--listen", f"unix:{path}").wait_until_ready()
        killed.process.send_signal(signal.SIGKILL)
        killed.wait()
        assert path.exists()
        running = start("--listen", f"unix:{path}").wait_until_ready()
        third = start("--listen", f"unix:{path}")
        assert third.wait() == 3
        assert f"cannot listen on unix:{path}: it is in use; stop the other process or give another path" in third.log
        assert health(running.target) == SERVING

    def test_the_umask_decides_who_may_call(self, tmp_path: Path):
        before = os.umask(0o117)
        try:
            server = grpc.server(None)
            addresses.bind(f"unix:{tmp_path}/t2i.sock", server.add_insecure_port)
            assert stat.S_IMODE((tmp_path / "t2i.sock").stat().st_mode) == 0o660
        finally:
            os.umask(before)
            server.stop(None)

    @pytest.mark.parametrize("kind", ["no folder", "a file", "a folder"])
    def test_an_unusable_path_ends_the_server_with_exit_code_3_and_the_reason(self, tmp_path: Path, kind):
        path = tmp_path / "missing" / "t2i.sock" if kind == "no folder" else tmp_path / "t2i.sock"
        if kind == "a file":
            path.write_text("somebody's")
        elif kind == "a folder":
            path.mkdir()
        server = grpc.server(None)
        words = "No such file or directory" if kind == "no folder" else "the file is there and is no socket"
        with pytest.raises(BindError, match=f"cannot listen on unix:{path}: {words}"):
            addresses.bind(f"unix:{path}", server.add_insecure_port)
        server.stop(None)
        assert kind != "a file" or path.read_text() == "somebody's"


@pytest.mark.parametrize("flag", ["--listen", "--health-listen"])
def test_a_server_that_cannot_bind_all_addresses_leaves_no_file(start, tmp_path: Path, flag):
    path = tmp_path / "t2i.sock"
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        flags = (
            ("--listen", f"unix:{path},{taken}") if flag == "--listen" else ("--listen", f"unix:{path}", flag, taken)
        )
        server = start(*flags)
        assert server.wait() == 3
    assert f"cannot listen on {taken}: it is in use; stop the other process or give another port" in server.log
    assert list(tmp_path.iterdir()) == []


def test_all_addresses_are_served_and_in_the_ready_file(start, tmp_path: Path):
    path, ready = tmp_path / "t2i.sock", tmp_path / "ready"
    server = start("--listen", f"127.0.0.1:0,unix:{path},127.0.0.1:0", "--ready-file", str(ready)).wait_until_ready()
    bound = ready.read_text().splitlines()
    assert ",".join(bound) == server.target
    assert len(set(bound)) == 3
    assert {health(each) for each in bound} == {SERVING}


@pytest.mark.parametrize(
    ("listen", "words"),
    [
        ("", "give HOST:PORT"),
        ("127.0.0.1:0,", "give HOST:PORT"),
        ("127.0.0.1:0,nowhere", "give HOST:PORT"),
        ("unix:", "give unix:PATH"),
        ("unix:/" + "x" * 107, "at most 107 bytes"),
    ],
)
def test_invalid_addresses_are_rejected(listen, words):
    with pytest.raises(ValidationError, match=words):
        Settings(listen=listen)


@pytest.mark.parametrize(
    ("listen", "are_taken"),
    [("unix:/run/t2i.sock", True), ("127.0.0.1:1,unix:t2i.sock", True), ("127.0.0.1:1,0.0.0.0:2", False)],
)
def test_tokens_without_tls_need_local_addresses(listen, are_taken):
    if are_taken:
        assert Settings(listen=listen, tokens="t")
    else:
        with pytest.raises(ValidationError, match="anyone who reads a token"):
            Settings(listen=listen, tokens="t")


class TestMetrics:
    @pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0"])
    @needs_ipv6
    def test_a_wildcard_serves_both_address_families(self, start, address):
        server = start("--metrics-listen", address)
        self.read_by_both(server.wait_for_log(r"metrics on http://(\S+)/metrics")[1])

    @needs_ipv6
    @pytest.mark.usefixtures("two_families")
    def test_a_name_serves_all_of_its_addresses(self):
        self.read_by_both(Metrics(32).listen("localhost:0"))

    def read_by_both(self, address: str) -> None:
        port = address.rpartition(":")[2]
        for host in ("127.0.0.1", "[::1]"):
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"http://{host}:{port}/metrics", timeout=PATIENCE) as answer:
                assert b"t2i_queue_limit_jobs 32.0" in answer.read()

    def test_metrics_listen_on_the_given_address_only(self):
        bound = Metrics(1).listen("127.0.0.1:0")
        port = int(bound.rpartition(":")[2])
        assert bound == f"127.0.0.1:{port}"
        if has("::1"):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("::1", port), PATIENCE)

    def test_an_interrupted_scrape_is_logged_in_one_line(self, monkeypatch, capfd):
        caught = threading.Event()
        monkeypatch.setattr(metrics.log, "warning", lambda *_: caught.set())
        host, _, port = Metrics(1).listen("127.0.0.1:0").rpartition(":")
        with socket.create_connection((host, int(port)), PATIENCE) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert caught.wait(PATIENCE)
        assert capfd.readouterr().err == ""


def channels_and_options() -> Iterator[tuple[str, str, str]]:
    """Yield the file, the call and the file's text of every channel in benches and deployments."""
    for path in sorted([*(ROOT / "bench").glob("*.py"), *(ROOT / "deploy").rglob("*.py")]):
        text = path.read_text("utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("insecure_channel", "urlopen")):
                yield path.name, ast.unparse(node), text


@pytest.mark.parametrize(("file", "call", "text"), [*channels_and_options()], ids=lambda each: each[:40])
def test_benches_and_deployments_use_no_proxy_for_loopback(file, call, text):
    """http_proxy applies to all hosts, and the proxy's own 127.0.0.1 is another one."""
    shared = (ROOT / "bench" / "serving.py").read_text("utf-8")
    without_proxy = {
        name
        for name, value in re.findall(r"^([A-Z]+) = (\[[^=]*?\])(?:  #.*)?$", shared + "\n" + text, re.MULTILINE)
        if "enable_http_proxy" in value or "LOCAL" in value
    }
    assert set(re.findall(r"[A-Z]{2,}", call)) & without_proxy, f"{file}: {call}"
