"""Other gRPC clients, from the oldest supported version to the newest, each with every kind of call.

Their programs are in programs/. A test is skipped, with the reason, where this machine lacks its client.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from grpcurl import GRPCURL, messages
from serving import LONG_JOB, PATIENCE, ROOT, SERVICE, ServerProcess, connect, request

from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

PROGRAMS = ROOT / "tests" / "interoperability" / "programs"
BUF = GRPCURL.with_name("buf")
OLDEST = ("grpcio==1.72.2", "grpcio-status==1.72.2", "grpcio-health-checking==1.72.2", "protobuf==6.30.2")

# Names as in the proto file, which every client accepts.
APPLE = {"data": {"prompt": "a red apple"}, "parameter": {"seed": 7}, "sampling": {"steps": 5}}
BAD = {"data": {"prompt": " "}, "sampling": {"steps": 0}}
LARGE = {  # drawn once: a detached job that is requested again returns its recording
    "data": {"prompt": "noise"},
    "parameter": {"n": 8, "seed": 1},
    "sampling": {"steps": 1, "width": 512, "height": 512, "guidance_scale": 20},
    "output": {"format": "FORMAT_PNG"},
    "request_id": "eight-of-noise",
    "on_disconnect": "ON_DISCONNECT_DETACH",
}


@dataclass(frozen=True)
class Outcome:
    """The outcome of a call as a client reports it: messages with names in snake case, the status and its message."""

    messages: list[dict[str, Any]]
    code: str
    message: str

    @classmethod
    def parse(cls, messages: Iterable[Any], code: str, message: str) -> "Outcome":
        """Accept names in any case, and CANCELED with one L."""
        status = _snake_name(code).upper().replace("CANCELED", "CANCELLED")
        return cls([_snake(each) for each in messages], status, message)

    @property
    def events(self) -> list[str]:
        return [
            next(kind for kind in ("queued", "progress", "choice", "done") if kind in each) for each in self.messages
        ]


def _snake(reported: Any) -> Any:
    if isinstance(reported, dict):
        return {_snake_name(name): _snake(value) for name, value in reported.items()}
    return [_snake(each) for each in reported] if isinstance(reported, list) else reported


def _snake_name(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).replace("-", "_").lower()


class Client:
    """A client that is run as `command TARGET SERVICE/METHOD REQUEST [--cancel]`."""

    def __init__(self, *command: str | Path) -> None:
        self.command = [str(each) for each in command]

    def call(self, server: ServerProcess, method: str, asked: dict[str, Any]) -> Outcome:
        return self._outcome(self._run([*self.command, server.target, method, json.dumps(asked)]))

    def cancel(self, server: ServerProcess, method: str, asked: dict[str, Any]) -> None:
        """Cancel the call after its first step."""
        ended = self._outcome(self._run([*self.command, server.target, method, json.dumps(asked), "--cancel"]))
        assert ended.code == "CANCELLED"
        assert "progress" in ended.events

    def _run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)

    def _outcome(self, ended: subprocess.CompletedProcess[str]) -> Outcome:
        assert ended.returncode == 0, ended.stderr
        *reported, last = map(json.loads, ended.stdout.splitlines())
        return Outcome.parse(reported, last["code"], last["message"])


class Tool(Client):
    """A command-line tool that prints messages as JSON and is cancelled by SIGINT."""

    def __init__(self, command: Callable[[str, str, str], list[str | Path]], error: str) -> None:
        self._command = command
        self._error = error

    def call(self, server: ServerProcess, method: str, asked: dict[str, Any]) -> Outcome:
        ended = self._run(list(map(str, self._command(server.target, method, json.dumps(asked)))))
        if ended.returncode == 0:
            return Outcome.parse(messages(ended.stdout), "OK", "")
        found = re.search(self._error, ended.stderr, re.DOTALL)
        assert found, ended.stderr
        return Outcome.parse(messages(ended.stdout), found["code"], found["message"])

    def cancel(self, server: ServerProcess, method: str, asked: dict[str, Any]) -> None:
        command = self._command(server.target, method, json.dumps(asked))
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout is not None
            assert any('"progress"' in line for line in running.stdout)
            running.send_signal(signal.SIGINT)
            running.stdout.read()
        assert running.returncode != 0


def grpcurl(_: Path) -> Client:
    return Tool(
        lambda target, method, asked: [GRPCURL, "-plaintext", "-d", asked, target, method],
        r"Code: (?P<code>\w+)\n\s*Message: (?P<message>[^\n]*)",
    )


def buf_curl(_: Path) -> Client:
    flags = ("--protocol", "grpc", "--http2-prior-knowledge")
    return Tool(
        lambda target, method, asked: [BUF, "curl", *flags, "-d", asked, f"http://{target}/{method}"],
        r'"code": "(?P<code>\w+)",\s*"message": "(?P<message>[^"]*)"',
    )


def oldest_python(folder: Path) -> Client:
    return _python(folder, *OLDEST)


def newest_python(folder: Path) -> Client:
    return _python(folder)


def _python(folder: Path, *pins: str) -> Client:
    """Generated code in its own environment, with the newest packages that the client allows, except `pins`."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [folder / "bin" / "pip", "install", "--quiet", *pins, ROOT / "clients" / "python"]
    subprocess.run(install, check=True)
    return Client(folder / "bin" / "python", PROGRAMS / "generated.py")


def node(folder: Path) -> Client:
    _needs("node", "nodejs")
    _needs("npm", "npm")
    for each in (PROGRAMS / "node").glob("*.js*"):
        shutil.copy(each, folder)
    install = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error"]
    subprocess.run(install, cwd=folder, check=True)
    return Client("node", folder / "call.js")


def go(folder: Path) -> Client:
    _needs("go", "golang-go")
    gopath = os.environ.get("GOPATH", "/usr/share/gocode")  # the folder of Debian's packages
    for package, path in {
        "golang-google-grpc-dev": "google.golang.org/grpc",
        "golang-github-golang-protobuf-1-5-dev": "google.golang.org/protobuf/types/dynamicpb",
    }.items():
        if not any(Path(each, "src", path).is_dir() for each in gopath.split(os.pathsep)):
            pytest.skip(f"apt-get install {package}")
    environment = os.environ | {"GO111MODULE": "off", "GOPATH": gopath, "GOCACHE": str(folder / "cache")}
    build = ["go", "build", "-o", folder / "call", PROGRAMS / "go" / "call.go"]
    subprocess.run(build, env=environment, check=True)
    return Client(folder / "call")


def _needs(command: str, package: str) -> None:
    if shutil.which(command) is None:
        pytest.skip(f"apt-get install {package}")


_slow = pytest.mark.slow
CLIENTS = [
    pytest.param(grpcurl, id="grpcurl"),
    pytest.param(buf_curl, id="buf curl"),
    pytest.param(oldest_python, id="oldest Python", marks=_slow),
    pytest.param(newest_python, id="newest Python", marks=_slow),
    pytest.param(node, id="Node", marks=_slow),
    pytest.param(go, id="Go", marks=_slow),
]


@pytest.fixture(scope="module", params=CLIENTS)
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return request.param(tmp_path_factory.mktemp("client"))


@pytest.mark.parametrize("service", ["", SERVICE])
def test_health_is_serving(client: Client, server: ServerProcess, service: str):
    assert client.call(server, "grpc.health.v1.Health/Check", {"service": service}) == Outcome(
        [{"status": "SERVING"}], "OK", ""
    )


def test_generate_returns_the_same_image_to_every_client(client: Client, server: ServerProcess):
    outcome = client.call(server, f"{SERVICE}/Generate", APPLE)
    assert outcome.code == "OK", outcome.message
    (answer,) = outcome.messages
    (choice,) = answer["data"]["choices"]
    with connect(server) as channel:
        same = pb_grpc.TextToImageServiceStub(channel).Generate(request(APPLE["data"]["prompt"], **_options(APPLE)))
    assert choice["image"] == same.data.choices[0].image
    assert choice["finish_reason"] == "success"
    assert answer["metadata"]["images"][0]["seed"] == 7


def test_a_stream_has_every_step_then_the_image_then_done(client: Client, server: ServerProcess):
    outcome = client.call(server, f"{SERVICE}/StreamGenerate", APPLE)
    assert outcome.code == "OK", outcome.message
    assert outcome.events == ["queued", *["progress"] * 7, "choice", "done"]
    stages = [each["progress"]["stage"] for each in outcome.messages if "progress" in each]
    assert stages == ["STAGE_ENCODE", *["STAGE_BASE"] * 4, "STAGE_REFINER", "STAGE_DECODE"]
    assert outcome.messages[-2]["choice"]["choice"]["image"].startswith("data:image/jpeg;base64,")


def test_a_cancelled_call_frees_the_device(client: Client, server: ServerProcess, request: pytest.FixtureRequest):
    name = f"given-up-by-{request.node.callspec.id.replace(' ', '-')}"
    client.cancel(server, f"{SERVICE}/StreamGenerate", {"data": {"prompt": "x"}, "request_id": name, **LONG_JOB})
    server.wait_for_log(f"{name}: Cancelled after")


def test_an_error_names_every_bad_field(client: Client, server: ServerProcess):
    for method in ("Generate", "StreamGenerate"):
        outcome = client.call(server, f"{SERVICE}/{method}", BAD)
        assert outcome == Outcome(
            [],
            "INVALID_ARGUMENT",
            "data.prompt: is required and must not be blank; sampling.steps: must be 1 to 150, is 0",
        )


def test_a_large_answer_arrives_whole(client: Client, server: ServerProcess):
    outcome = client.call(server, f"{SERVICE}/Generate", LARGE)
    assert outcome.code == "OK", outcome.message
    (answer,) = outcome.messages
    files = [choice["image"].removeprefix("data:image/png;base64,") for choice in answer["data"]["choices"]]
    assert 2 * 1024 * 1024 < sum(map(len, files)) < 4 * 1024 * 1024  # the default limit of a gRPC client
    reported = [each["sha256"] for each in answer["metadata"]["images"]]
    assert [hashlib.sha256(base64.b64decode(file)).hexdigest() for file in files] == reported


def _options(asked: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in asked.items() if name != "data"}


@pytest.mark.parametrize("client", [pytest.param(oldest_python, id="oldest Python", marks=_slow)], indirect=True)
def test_t2i_works_with_the_oldest_packages(client: Client, server: ServerProcess, tmp_path: Path):
    binaries = Path(client.command[0]).parent
    listed = subprocess.run([binaries / "pip", "list", "--format=json"], check=True, capture_output=True, text=True)
    assert set(OLDEST) <= {f"{each['name']}=={each['version']}" for each in json.loads(listed.stdout)}
    image = tmp_path / "cat.png"
    drawn = subprocess.run(
        [binaries / "t2i", "--target", server.target, "generate", "a cat", "--steps", "2", "-o", image, "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(drawn.stdout)["images"][0]["steps"] == 2
    assert image.read_bytes().startswith(b"\x89PNG")
