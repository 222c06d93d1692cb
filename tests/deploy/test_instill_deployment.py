"""What Instill Core deploys: deploy/instill under Ray Serve, by the SDK's own code in the SDK's own environment.

It needs `make instill-model`, the environment .venv-instill, and root on Linux for what stands in for a container
engine: `make test-instill` sees to the first two. The image itself, Core, and a registry between them are not here.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from serving import PATIENCE, ROOT, connect, request

from server.errors import CheckpointError
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

PROGRAMS = ROOT / "tests" / "interoperability" / "programs"
MODEL = ROOT / "out" / "instill"
SDK = ROOT / ".venv-instill"
STAND_IN = ROOT / "tests" / "support" / "docker_stand_in.py"
STARTED = 400  # seconds for Ray to start and the model to be ready on a busy machine
PROTO_SERVICE = "instill.protogen.model.ray.v1alpha.user_defined_pb2_grpc.add_UserDefinedServiceServicer_to_server"
APPLICATION = "instill-ai_text-to-image_v1"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

if not (SDK / ".done").exists() or not (MODEL / "packages").exists():
    pytest.skip("make test-instill", allow_module_level=True)
if os.geteuid() != 0:
    pytest.skip("needs root, for namespaces", allow_module_level=True)


@dataclass(frozen=True)
class Docker:
    """The stand-in with an image of ours."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """That in which the SDK's command finds the stand-in as `docker`."""
        path = os.pathsep.join([str(self.folder), str(SDK / "bin"), os.environ["PATH"]])
        return os.environ | {"STAND_IN": str(self.folder), "PATH": path, "HOME": str(self.folder), "PYTHONPATH": ""}

    def __call__(self, *arguments: str, given: str = "", limit: float = STARTED) -> str:
        command = [sys.executable, str(STAND_IN), *arguments]
        ended = subprocess.run(
            command, env=self.environment, input=given, capture_output=True, text=True, timeout=limit, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def log(self) -> str:
        return "\n".join(path.read_text() for path in self.folder.glob("*.log"))


@pytest.fixture(scope="module")
def docker() -> Iterator[Docker]:
    folder = Path("/tmp/t2i-instill")  # Ray's sockets need a short path
    shutil.rmtree(folder, ignore_errors=True)
    image = folder / "image"
    image.mkdir(parents=True)
    shutil.copy(MODEL / "model.py", image / "_model.py")  # as `instill build` does
    (image / "packages").symlink_to(MODEL / "packages")
    (folder / "docker").write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n')
    (folder / "docker").chmod(0o755)
    libraries = SDK / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    environment = {
        "PATH": os.pathsep.join([str(SDK / "bin"), os.environ["PATH"]]),
        # As the SDK's Dockerfile sets it.
        "PYTHONPATH": str(libraries / "instill/protogen/model/ray/v1alpha"),
        "HOME": str(folder),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "T2I_METRICS_LISTEN": "127.0.0.1:9464",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "100",  # of a machine that is busy with other tests
        "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": "100",
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    yield Docker(folder)
    shutil.rmtree(folder, ignore_errors=True)


def test_instill_build_takes_the_folder(docker: Docker, tmp_path: Path):
    for name in ("instill.yaml", "model.py"):
        shutil.copy(ROOT / "deploy" / "instill" / name, tmp_path)
    (tmp_path / "packages" / "server").mkdir(parents=True)
    built = subprocess.run(
        [SDK / "bin" / "instill", "build", "instill-ai/text-to-image", "--target-arch", "amd64"],
        cwd=tmp_path,
        env=docker.environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert "instill-ai/text-to-image:latest built" in built.stderr
    asked = json.loads((docker.folder / "build.json").read_text())
    assert {"_model.py", "packages", "Dockerfile"} <= set(asked["files"])
    assert {"PYTHON_VERSION=-py311", "RAY_VERSION=2.47.0"} <= set(asked["arguments"])


def test_what_was_cloned_into_the_documented_folders_is_what_is_served(docker: Docker):
    """Empty ones are refused by the service by their names, where without them the embedded ensemble is served."""
    folders = [docker.folder / "image" / f"stable-diffusion-xl-{name}-1.0" for name in ("base", "refiner")]
    for folder in folders:
        folder.mkdir()
    start = "import pathlib, sys, _model; sys.exit(_model.start(pathlib.Path('ready')).wait())"
    ended = subprocess.run(
        [SDK / "bin" / "python", "-c", start],
        cwd=docker.folder / "image",
        env=docker.environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    for folder in folders:
        folder.rmdir()
    assert ended.returncode == CheckpointError.exit_code, ended.stderr
    assert str(folders[0]) in ended.stderr


@pytest.mark.parametrize("flags", [(), ("-g",)], ids=["on a processor", "with a device"])
def test_instill_run_prints_what_t2i_run_prints(docker: Docker, flags: tuple[str, ...]):
    given = ["-i", '{"prompt": "cat napping"}']
    instill = [SDK / "bin" / "instill", "run", "instill-ai/text-to-image", *flags, *given]
    theirs = subprocess.run(
        instill, env=docker.environment, capture_output=True, text=True, timeout=STARTED, check=False
    )
    t2i = [sys.executable, "-m", "text_to_image_client", "run", *given]
    ours = subprocess.run(t2i, cwd=ROOT, capture_output=True, text=True, timeout=STARTED, check=True)
    assert said(theirs.stderr) == [line for line in said(ours.stdout) if line != "Outputs:"], docker.log()
    (output,) = json.loads(ast.literal_eval(theirs.stdout))
    (same,) = json.loads(re.search(r"^\[\n.*^\]$", ours.stdout, re.MULTILINE | re.DOTALL)[0])
    for each in (output, same):
        (choice,) = each["data"]["choices"]
        assert choice["finish-reason"] == "success"
        assert choice["image"].startswith("data:image/jpeg;base64,/9j/7gAOQWRvY")


def said(log: str) -> list[str]:
    """The lines of Instill's logger, without their times."""
    lines = re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\.\d{3} INFO     \[Instill\] (.*)$", log, re.MULTILINE)
    assert lines
    return lines


@pytest.fixture(scope="module")
def core(docker: Docker) -> Iterator[str]:
    """A container with Ray started as Core has it and the model deployed as Core does it; its name."""
    start = (
        f"ray start --head && serve start --grpc-port 9000 --grpc-servicer-functions {PROTO_SERVICE} && "
        "touch started && sleep inf"
    )
    url = "http://127.0.0.1:8265/api/serve/applications/"
    application = {"name": APPLICATION, "import_path": "_model:entrypoint", "route_prefix": f"/{APPLICATION}"}
    wanted = json.dumps({"applications": [application | {"runtime_env": {}}]})
    deploy = ("curl", "-s", "--fail-with-body", "-X", "PUT", "-H", "Content-Type: application/json", "-d", wanted, url)
    docker("run", "-d", "--name", "core", "ray", "bash", "-c", start)
    try:
        docker("exec", "core", "sh", "-c", "until test -e started; do sleep 1; done")
        docker("exec", "core", *deploy)
        until = time.monotonic() + STARTED
        while (state := deployed(docker, url))["status"] != "RUNNING":
            assert state["status"] != "DEPLOY_FAILED", state["message"]
            assert time.monotonic() < until, docker.log()
            time.sleep(1)
        yield "core"
    finally:
        docker("stop", "core")


def deployed(docker: Docker, url: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(docker("exec", "core", "curl", "-sf", url))
    return found["applications"][APPLICATION]  # type: ignore[no-any-return]


def call(docker: Docker, core: str, **asked: Any) -> dict[str, Any]:
    given = json.dumps({"application": APPLICATION, **asked})
    program = str(PROGRAMS / "instill_sdk.py")
    return json.loads(docker("exec", core, "python", program, "127.0.0.1:9000", given=f"{given}\n").splitlines()[-1])


def test_core_gets_an_output_for_each_input_as_the_schema_has_it(docker: Docker, core: str):
    inputs = [
        {"data": {"prompt": "a red apple"}, "parameter": {"seed": 7.0, "n": 2.0, "unknown": 1}},
        {"data": {"prompt": "a blue heart", "model": "any"}},
    ]
    drawn = call(docker, core, task_inputs=inputs)
    assert drawn["invalid"] == []
    assert [len(each["data"]["choices"]) for each in drawn["task_outputs"]] == [2, 1]
    assert call(docker, core, task_inputs=inputs)["task_outputs"] == drawn["task_outputs"]


def test_core_is_told_what_is_wrong_by_the_services_own_status(docker: Docker, core: str):
    assert call(docker, core, task_inputs=[{"data": {"prompt": " "}}]) == {
        "status": "INVALID_ARGUMENT",
        "message": "task_inputs[0].data.prompt: is required and must not be blank",
    }


def test_more_than_four_megabytes_pass_through_ray(docker: Docker, core: str):
    drawn = call(docker, core, task_inputs=[{"data": {"prompt": "x"}, "unread": "x" * 5_000_000}])
    assert drawn["invalid"] == []
    assert drawn["bytes"][0] > 4 * 1024 * 1024


def test_a_call_that_is_given_up_at_its_deadline_frees_the_device(docker: Docker, core: str):
    asked = [{"data": {"prompt": "x"}, "parameter": {"n": 8}}]
    assert call(docker, core, task_inputs=asked, timeout=3)["status"] == "DEADLINE_EXCEEDED"
    ended = 't2i_requests_total{code="CANCELLED",method="__call__"}'
    docker("exec", core, "sh", "-c", f"until curl -s 127.0.0.1:9464/metrics | grep -F '{ended}'; do sleep 0.1; done")


def test_dead_service_is_replaced_and_callers_may_retry(docker: Docker, core: str):
    docker("exec", core, "sh", "-c", "kill -KILL $(pgrep --full '[p]ython.* -m server')")
    until = time.monotonic() + STARTED
    while "task_outputs" not in (found := call(docker, core, task_inputs=[{"data": {"prompt": "x"}}])):
        assert found["status"] == "UNAVAILABLE"
        assert time.monotonic() < until, docker.log()
        time.sleep(1)
    assert found["invalid"] == []


def test_what_the_sdk_reads_and_writes_is_what_the_service_does(docker: Docker, core: str):
    """By the helpers that a model of the SDK would use, on the same message and the same images."""
    given = {"data": {"prompt": "a red apple"}, "parameter": {"aspect-ratio": "16:9", "n": 2, "seed": 7}}
    drawn = call(docker, core, task_inputs=[given])["task_outputs"]
    asked = json.dumps({"task_inputs": [given], "task_outputs": drawn})
    told = json.loads(
        docker("exec", core, "python", str(PROGRAMS / "instill_helpers.py"), given=f"{asked}\n").splitlines()[-1]
    )
    assert told["read"] == [{"prompt": "a red apple", "negative_prompt": "", "aspect_ratio": "16:9", "n": 2, "seed": 7}]
    assert told["written"] == drawn


# Core's public API, which the service has a part of itself.


def test_programs_that_draw_with_the_sdk_draw_with_the_service(start_server, tmp_path: Path):
    digest = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"  # of "secret"
    (tmp_path / "tokens").write_text(f"one {digest}\n")
    server = start_server("--instill", "--tokens", str(tmp_path / "tokens")).wait_until_ready()

    def drawn(model: str, token: str = "secret", **parameter: Any) -> subprocess.CompletedProcess[str]:
        asked = {"model": model, "task_inputs": [{"data": {"prompt": "cat napping"}, "parameter": parameter}]}
        return subprocess.run(
            [SDK / "bin" / "python", PROGRAMS / "instill_public.py", server.target, token],
            env=os.environ | {"HOME": str(tmp_path), "PYTHONPATH": ""},
            input=json.dumps(asked) + "\n",
            capture_output=True,
            text=True,
            timeout=STARTED,
            check=False,
        )

    ended = drawn("mini-sdxl-emoji", seed=7)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout.splitlines()[-1])
    assert (told["live"], told["ready"]) == ("SERVING_STATUS_SERVING",) * 2
    assert told["tasks"] == ["TASK_TEXT_TO_IMAGE"] * 2
    with connect(server) as channel:
        same = pb_grpc.TextToImageServiceStub(channel).Generate(
            request("cat napping", parameter={"seed": 7}, output={"format": "FORMAT_JPEG_RGB"}),
            metadata=[("authorization", "Bearer secret")],
            timeout=PATIENCE,
        )
    output = {"data": {"choices": [{"finish-reason": "success", "image": same.data.choices[0].image}]}}
    assert told["outputs"] == [[output]] * 2

    for ended, code, words in (
        (drawn("another"), "NOT_FOUND", '"mini-sdxl-emoji" is the model that is served here'),
        (drawn("mini-sdxl-emoji", n=99), "INVALID_ARGUMENT", "task_inputs[0].parameter.n"),
        (drawn("mini-sdxl-emoji", token="another"), "UNAUTHENTICATED", "token"),
    ):
        assert ended.returncode == 1
        assert f"StatusCode.{code}" in ended.stderr
        assert words in ended.stderr
