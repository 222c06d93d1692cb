"""The container image: really built, and run as strictly as a cluster may have it."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import PATIENCE, ROOT, first_step, request

from server import __version__
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

IMAGE = "localhost/text-to-image-service:tested"
DEBIAN = "localhost/debian-python:tested"
BUILD_SECONDS = 1200
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

pytestmark = [pytest.mark.slow, pytest.mark.timeout(BUILD_SECONDS)]


@dataclass(frozen=True)
class Podman:
    """podman as this machine has it."""

    environment: dict[str, str]

    def __call__(self, *arguments: str, check: bool = True, timeout: float = PATIENCE) -> str:
        ended = self.run(*arguments, timeout=timeout)
        assert ended.returncode == 0 or not check, ended.stderr
        return ended.stdout.strip()

    def run(self, *arguments: str, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["podman", *arguments], env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Podman:
    """podman, with the settings that a machine without systemd needs, and one that may not raise its limits."""
    missing = [tool for tool in ("podman", "runc", "mmdebstrap") if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and Debian's packages podman, runc and mmdebstrap; not here: {missing or 'root'}")
    limits = ", ".join(
        f'"{name}={min(4096, resource.getrlimit(number)[1])}"'
        for name, number in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC))
    )
    settings = tmp_path_factory.mktemp("podman") / "containers.conf"
    settings.write_text(
        f'[containers]\ndefault_ulimits = [{limits}]\nlog_driver = "k8s-file"\n'
        '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\n'
    )
    podman = Podman({**os.environ, "CONTAINERS_CONF": str(settings), "BUILDAH_ISOLATION": "chroot"})
    if (answer := podman.run("info")).returncode != 0:
        pytest.skip(f"podman does not work here: {answer.stderr}")
    return podman


@pytest.fixture(scope="module")
def image(podman: Podman) -> Iterator[str]:
    """The image, built on a base of Debian's packages, since a registry may not be in reach."""
    subprocess.run([ROOT / "scripts" / "debian-base.sh", DEBIAN], env=podman.environment, timeout=600, check=True)
    # torch is taken from where pip finds it on this machine. Layers for a next build would take as long as this one.
    arguments = f"--tool podman --layers=false --build-arg BASE={DEBIAN} --build-arg TORCH_CPU_INDEX="
    subprocess.run(
        ["make", "image", f"PYTHON={sys.executable}", f"IMAGE={IMAGE}", f"ARGS={arguments}"],
        cwd=ROOT,
        env=podman.environment,
        timeout=BUILD_SECONDS,
        check=True,
    )
    yield IMAGE
    podman("rmi", "--force", IMAGE, DEBIAN)


STRICTLY = (
    *("--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp", "--cap-drop", "ALL"),
    *("--security-opt", "no-new-privileges", "--volume", f"{ROOT / 'weights'}:/models:ro"),
)


@pytest.fixture
def container(podman: Podman, image: str) -> Iterator[str]:
    """The image running as strictly as a cluster may have it, with its weights from a folder of the host."""
    experts = ("T2I_BASE=/models/base", "T2I_REFINER=/models/refiner")
    variables = (*experts, "T2I_CONTENT_FILTER=open-nsfw", "T2I_GRACE_SECONDS=120")
    given = [word for variable in variables for word in ("--env", variable)]
    name = podman("run", "--detach", *STRICTLY, *given, "--publish", "127.0.0.1::50051", image)
    yield name
    podman("rm", "--force", name)


def inside(podman: Podman, image: str, script: str) -> str:
    """What a shell script prints in the image."""
    return podman("run", "--rm", *STRICTLY, "--network=none", "--entrypoint", "sh", image, "-c", script)


def watch(channel: grpc.Channel) -> Iterator[health_pb2.HealthCheckResponse]:
    return health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(), timeout=PATIENCE, wait_for_ready=True
    )


def test_it_serves_from_a_read_only_root_and_drains_when_it_is_stopped(podman: Podman, container: str):
    with grpc.insecure_channel(podman("port", container, "50051/tcp")) as channel:
        health = watch(channel)
        next(answer for answer in health if answer.status == SERVING)
        podman("healthcheck", "run", container)
        stub = pb_grpc.TextToImageServiceStub(channel)
        assert stub.GetModel(pb.GetModelRequest(), timeout=PATIENCE).content_filter.name.startswith("open-nsfw")
        answer = stub.Generate(request(parameter={"seed": 7}), timeout=PATIENCE)
        environment = answer.metadata.environment
        assert environment.compiled.startswith("blocks") == environment.hardware.endswith(("AVX2", "AVX512")), (
            "it draws by the kernels that were built with it, wherever these suit"
        )
        assert answer.data.choices[0].image.startswith("data:image/jpeg;base64,/9j/4AAQSkZJRg")

        running = stub.StreamGenerate(request(sampling={"steps": 40}))
        first_step(running)
        podman("kill", "--signal", "TERM", container)
        assert next(health).status == NOT_SERVING
        with pytest.raises(grpc.RpcError) as refused:
            stub.Generate(request(), timeout=PATIENCE)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        assert [event.WhichOneof("event") for event in running][-2:] == ["choice", "done"]
    assert podman("wait", container) == "0"
    assert "Traceback" not in podman("logs", container)


def test_container_runs_unprivileged_and_writes_only_its_tmp(podman: Podman, image: str):
    assert inside(podman, image, "id -u; id -g") == "10001\n10001"
    write = "for folder in / /srv /opt/venv /models /tmp; do touch $folder/x 2> /dev/null && echo $folder; done; true"
    assert inside(podman, image, write) == "/tmp"


def test_it_has_neither_a_compiler_nor_pip(podman: Podman, image: str):
    look = "for tool in cc c++ gcc g++ clang tcc as ld make pip pip3; do command -v $tool; done; true"
    assert inside(podman, image, look) == ""
    assert inside(podman, image, "command -v t2i") == "/opt/venv/bin/t2i", "it looks where there is something"


def test_it_has_what_traces_need(podman: Podman, image: str):
    look = "from server.observability.traces import traces_from_environment as traces; print(traces() is not None)"
    collector = "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4317"
    assert inside(podman, image, f"{collector} python -c '{look}'") == "True"


def test_it_says_what_it_is_and_keeps_nothing_of_how_it_was_built(podman: Podman, image: str):
    (told,) = json.loads(podman("inspect", image))
    labels = told["Labels"]
    assert labels["org.opencontainers.image.title"] == "text-to-image-service"
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.revision"]
    assert labels["org.opencontainers.image.base.name"] == DEBIAN
    assert told["Config"]["StopSignal"] == "SIGTERM"
    assert told["Healthcheck"]["Test"] == ["CMD", "t2i", "--target", "127.0.0.1:50051", "health"]
    assert inside(podman, image, "find / -xdev -name 'pip.c*' 2> /dev/null; true") == ""


def test_t2i_run_draws_in_the_image(podman: Podman, image: str):
    command = (sys.executable, "-m", "text_to_image_client", "run", "-t", image, "-i", '{"prompt": "cat napping"}')
    ended = subprocess.run(
        command, env=podman.environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == f"{image} under podman\n"
    assert '"image": "data:image/jpeg;base64,' in ended.stdout
    assert podman("ps", "--all", "--quiet", "--filter", f"ancestor={image}") == ""
