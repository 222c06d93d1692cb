"""The server of `t2i run` is watched while it loads, and stopped at the end."""

import sys
import time
from pathlib import Path

import pytest

from text_to_image_client.launcher import (
    ServerCommand,
    ServerStartError,
    container_command,
    container_server,
    container_tool,
    local_server,
    run_server,
)


def python(code: str) -> ServerCommand:
    return ServerCommand((sys.executable, "-c", code), lambda: None)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "print('loading'); print('no such folder: weights'); exit(10)",
            "ended with status 10: no such folder: weights",
        ),
        ("exit(3)", "ended with status 3: its log is empty"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL: its log is empty"),
    ],
)
def test_a_server_that_ends_while_loading_is_reported_at_once(tmp_path, code, message):
    began = time.monotonic()
    with run_server(python(code), tmp_path) as service, pytest.raises(ServerStartError) as caught:
        service.wait_until_serving(60)
    assert str(caught.value) == f"the service {message}"
    assert time.monotonic() - began < 30


def test_a_start_error_has_the_whole_log(tmp_path):
    command = python("print('first'); print('last'); exit(1)")
    with run_server(command, tmp_path) as service, pytest.raises(ServerStartError) as caught:
        service.wait_until_serving(60)
    assert caught.value.log == "first\nlast\n"


def test_a_server_that_never_gets_ready_times_out(tmp_path):
    command, message = python("import time; time.sleep(600)"), r"not ready within 0\.2 s"
    with run_server(command, tmp_path) as service, pytest.raises(ServerStartError, match=message):
        service.wait_until_serving(0.2)
    assert service.process.returncode is not None


def test_the_server_is_stopped_after_an_exception(tmp_path):
    with pytest.raises(KeyboardInterrupt), run_server(python("import time; time.sleep(600)"), tmp_path) as service:
        raise KeyboardInterrupt
    assert service.process.returncode is not None


def test_an_environment_without_the_server_package_is_reported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "server", None)
    with pytest.raises(ServerStartError, match="not installed in this environment"):
        local_server(tmp_path, gpu=False)


@pytest.mark.parametrize(("gpu", "device"), [(False, ()), (True, ("--device", "cuda"))])
def test_the_local_server_reports_its_free_port_in_the_ready_file(tmp_path: Path, gpu, device):
    command = local_server(tmp_path, gpu)
    ready = tmp_path / "ready"
    flags = ("--listen", "127.0.0.1:0", "--ready-file", str(ready))
    assert command.command == (sys.executable, "-m", "server", *flags, *device)
    assert command.address() is None
    ready.write_text("127.0.0.1:4711\n")
    assert command.address() == "127.0.0.1:4711"


def test_a_machine_without_docker_and_podman_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerStartError, match="neither is on the PATH"):
        container_server("latest", gpu=False)


def put(folder: Path, tool: str, script: str) -> None:
    (folder / tool).write_text(f"#!/bin/sh\n{script}\n")
    (folder / tool).chmod(0o755)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        (["docker"], "`docker info` fails"),
        (["podman", "docker"], "`docker info` and `podman info` fail"),
    ],
)
def test_a_container_tool_that_fails_is_reported(monkeypatch, tmp_path, tools, message):
    for tool in tools:
        put(tmp_path, tool, "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerStartError, match=message):
        container_tool()


@pytest.mark.parametrize("docker", [None, "exit 1"])
def test_podman_replaces_a_docker_that_fails(monkeypatch, tmp_path, docker):
    if docker:
        put(tmp_path, "docker", docker)
    put(tmp_path, "podman", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    command = container_server("latest", gpu=False)
    assert command.command[0] == str(tmp_path / "podman")
    assert command.description == "text-to-image-service:latest under podman"


@pytest.mark.parametrize(
    ("tag", "image"),
    [
        ("v1", "text-to-image-service:v1"),
        ("mine:dev", "mine:dev"),
        ("registry.example/team/mine", "registry.example/team/mine"),
    ],
)
def test_a_tag_names_the_services_image_and_a_missing_image_is_reported(monkeypatch, tmp_path, tag, image):
    put(tmp_path, "docker", f'test "$*" = "image inspect {image}" -o "$1" = info')
    monkeypatch.setenv("PATH", str(tmp_path))
    assert container_server(tag, gpu=False).command[-1] == image
    with pytest.raises(ServerStartError, match=f"docker has no image {image}0; build it with `make image`"):
        container_server(f"{tag}0", gpu=False)


@pytest.mark.parametrize(
    ("tool", "gpu", "flags"),
    [
        ("/usr/bin/docker", False, ()),
        ("/usr/bin/docker", True, ("--gpus", "all")),
        ("/usr/bin/podman", True, ("--device", "nvidia.com/gpu=all")),
    ],
)
def test_a_container_listens_on_loopback_and_gets_the_gpu_on_request(tool, gpu, flags):
    command = container_command(tool, "t2i-1", "text-to-image-service:v1", gpu)
    assert command[:7] == (tool, "run", "--rm", "--name", "t2i-1", "--publish", "127.0.0.1::50051")
    assert command[7 : 7 + len(flags)] == flags
    assert ("T2I_DEVICE=cuda" in command) is gpu
    assert command[-1] == "text-to-image-service:v1"
