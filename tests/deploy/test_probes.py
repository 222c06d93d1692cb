"""A probe made of Debian's gRPC for Go asks as the kubelet does, of a server that asks all others for certificates."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import tls
from serving import LONG_JOB, PATIENCE, ROOT, SERVICE, ServerProcess, first_step, request

from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

pytestmark = pytest.mark.slow

GRPC_OF_DEBIAN = Path("/usr/share/gocode/src/google.golang.org/grpc")
SERVING, NOT_SERVING = (0, "SERVING"), (1, "NOT_SERVING")

Probe = Callable[[str], tuple[int, str]]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("go") is None or not GRPC_OF_DEBIAN.exists():
        pytest.skip("needs Debian's packages golang-go and golang-google-grpc-dev")
    program = tmp_path_factory.mktemp("probe") / "probe"
    subprocess.run(
        ["go", "build", "-o", program, ROOT / "tests" / "deploy" / "probe" / "main.go"],
        env=os.environ | {"GO111MODULE": "off", "GOPATH": "/usr/share/gocode"},
        timeout=PATIENCE,
        check=True,
    )
    return program


def probing(program: Path, server: ServerProcess) -> Probe:
    """Probes for a service on the server's health port: the exit code, and the status or what went wrong."""
    target = server.wait_for_log(r"health checks on (\S+)")[1]

    def probe(service: str) -> tuple[int, str]:
        asked = subprocess.run([program, target, service], capture_output=True, text=True, check=False)
        return asked.returncode, asked.stdout.strip()

    return probe


@pytest.fixture
def authority(tmp_path: Path) -> tls.Authority:
    return tls.Authority(tmp_path / "authority")


def test_probes_tell_loading_serving_draining_and_dead_apart(start_server, program: Path, authority: tls.Authority):
    certificate, key = authority.issue("server", *tls.LOCAL)
    server: ServerProcess = start_server(
        *("--tls-certificate", str(certificate), "--tls-key", str(key)),
        *("--tls-client-ca", str(authority.file), "--health-listen", "127.0.0.1:0"),
    )
    probe = probing(program, server)
    assert server.target
    assert (probe(SERVICE), probe("")) == (NOT_SERVING, NOT_SERVING)

    server.wait_until_ready()
    assert (probe(SERVICE), probe("")) == (SERVING, SERVING)
    assert probe("no.such.Service") == (2, "rpc error: code = NotFound desc =")

    with tls.channel(server.target, authority.file, authority.issue("client", "client")) as channel:
        running = pb_grpc.TextToImageServiceStub(channel).StreamGenerate(request(**LONG_JOB))
        first_step(running)
        server.terminate()
        server.wait_for_log("draining")
        assert probe(SERVICE) == NOT_SERVING
        server.terminate()
        assert server.wait() == 0
    code, words = probe(SERVICE)
    assert (code, "connection refused" in words) == (2, True)


def test_a_port_with_mutual_tls_cannot_be_probed(start_server, program: Path, authority: tls.Authority):
    """Which is why there is another one for health."""
    certificate, key = authority.issue("server", *tls.LOCAL)
    server: ServerProcess = start_server(
        *("--tls-certificate", str(certificate), "--tls-key", str(key), "--tls-client-ca", str(authority.file)),
    )
    asked = subprocess.run([program, server.target, ""], capture_output=True, text=True, check=False)
    assert asked.returncode == 2
