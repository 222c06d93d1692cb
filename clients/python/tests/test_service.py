"""The service that `t2i run` starts is watched while it loads and never left behind."""

import sys
import time
from pathlib import Path

import pytest

from text_to_image_client._service import (
    Launch,
    ServiceFailed,
    container_command,
    container_launch,
    local_launch,
    running,
)


def python(code: str) -> Launch:
    return Launch((sys.executable, "-c", code), lambda: None)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "print('loading'); print('no such folder: weights'); exit(10)",
            "ended with status 10: no such folder: weights",
        ),
        ("exit(3)", "ended with status 3: it wrote no log"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL: it wrote no log"),
    ],
)
def test_a_service_that_ends_while_loading_is_noticed_at_once_with_its_last_words(tmp_path, code, message):
    began = time.monotonic()
    with running(python(code), tmp_path) as service, pytest.raises(ServiceFailed) as caught:
        service.wait_until_serving(60)
    assert str(caught.value) == f"the service {message}"
    assert time.monotonic() - began < 30


def test_a_failure_carries_the_whole_log(tmp_path):
    launch = python("print('first'); print('last'); exit(1)")
    with running(launch, tmp_path) as service, pytest.raises(ServiceFailed) as caught:
        service.wait_until_serving(60)
    assert caught.value.log == "first\nlast\n"


def test_a_service_that_never_gets_ready_is_given_up(tmp_path):
    launch, message = python("import time; time.sleep(600)"), r"not ready within 0\.2 s"
    with running(launch, tmp_path) as service, pytest.raises(ServiceFailed, match=message):
        service.wait_until_serving(0.2)
    assert service.process.returncode is not None


def test_a_service_is_stopped_whatever_happens_to_its_user(tmp_path):
    with pytest.raises(KeyboardInterrupt), running(python("import time; time.sleep(600)"), tmp_path) as service:
        raise KeyboardInterrupt
    assert service.process.returncode is not None


def test_an_environment_without_the_service_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "server", None)
    with pytest.raises(ServiceFailed, match="not installed in this environment"):
        local_launch(tmp_path, gpu=False)


@pytest.mark.parametrize(("gpu", "device"), [(False, ()), (True, ("--device", "cuda"))])
def test_the_local_service_takes_a_free_port_and_tells_it_in_its_ready_file(tmp_path: Path, gpu, device):
    launch = local_launch(tmp_path, gpu)
    ready = tmp_path / "ready"
    flags = ("--listen", "127.0.0.1:0", "--ready-file", str(ready))
    assert launch.command == (sys.executable, "-m", "server", *flags, *device)
    assert launch.address() is None
    ready.write_text("127.0.0.1:4711\n")
    assert launch.address() == "127.0.0.1:4711"


def test_a_machine_without_docker_and_podman_is_said_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServiceFailed, match="neither is on the PATH"):
        container_launch("latest", gpu=False)


@pytest.mark.parametrize(
    ("engine", "gpu", "flags"),
    [
        ("/usr/bin/docker", False, ()),
        ("/usr/bin/docker", True, ("--gpus", "all")),
        ("/usr/bin/podman", True, ("--device", "nvidia.com/gpu=all")),
    ],
)
def test_a_container_listens_on_loopback_alone_and_gets_the_gpu_when_asked(engine, gpu, flags):
    command = container_command(engine, "t2i-1", "latest", gpu)
    assert command[:7] == (engine, "run", "--rm", "--name", "t2i-1", "--publish", "127.0.0.1::50051")
    assert command[7 : 7 + len(flags)] == flags
    assert ("T2I_DEVICE=cuda" in command) is gpu
    assert command[-1] == "text-to-image-service:latest"


@pytest.mark.parametrize(
    ("tag", "image"),
    [
        ("v1", "text-to-image-service:v1"),
        ("mine:dev", "mine:dev"),
        ("registry.example/team/mine", "registry.example/team/mine"),
    ],
)
def test_a_bare_tag_belongs_to_the_services_own_image(tag, image):
    assert container_command("docker", "t2i-1", tag, gpu=False)[-1] == image
