"""scripts/build_image.py takes a tool that works, and lets pip in the build look where it looks outside."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving import ROOT

DEAD = "exit 1"
# `info` succeeds; `build` tells its arguments and what is in the secret that is pip's configuration.
ALIVE = """
[ "$1" = info ] && exit 0
echo "$(basename "$0")" "$@"
for word in "$@"; do case "$word" in id=pip.conf,src=*) cat "${word#*src=}" ;; esac; done
"""


@pytest.fixture
def build(tmp_path: Path):
    def build(tools: dict[str, str], *arguments: str, **pip: str) -> subprocess.CompletedProcess[str]:
        for tool, script in tools.items():
            (tmp_path / tool).write_text(f"#!/bin/bash\n{script}\n")
            (tmp_path / tool).chmod(0o755)
        for tool in ("bash", "basename", "cat", "git"):
            (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        environment |= {"PATH": str(tmp_path), "PIP_CONFIG_FILE": os.devnull} | pip
        return subprocess.run(
            [sys.executable, ROOT / "scripts" / "build_image.py", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return build


@pytest.mark.parametrize(
    ("tools", "taken"),
    [
        ({"docker": ALIVE, "podman": ALIVE, "buildah": ALIVE}, "docker"),
        ({"docker": DEAD, "podman": ALIVE, "buildah": ALIVE}, "podman"),
        ({"docker": DEAD, "podman": DEAD, "buildah": ALIVE}, "buildah"),
        ({"buildah": ALIVE}, "buildah"),
    ],
)
def test_the_first_tool_that_works_is_taken_and_named(build, tools: dict[str, str], taken: str):
    built = build(tools, "--tag", "mine:1", "--variant", "cuda", "--build-arg", "BASE=b")
    assert built.returncode == 0, built.stderr
    assert built.stdout.startswith(f"{taken} build ")
    assert "--build-arg VARIANT=cuda" in built.stdout
    assert f"--tag mine:1 --build-arg BASE=b {ROOT}\n" in built.stdout
    assert f"{taken} has built mine:1\n" in built.stdout


@pytest.mark.parametrize("tools", [{}, {"docker": DEAD}])
def test_a_machine_where_none_works_is_said_so(build, tools: dict[str, str]):
    built = build(tools)
    assert built.returncode == 1
    assert built.stderr == "none of docker, podman, buildah is installed and works here; run `TOOL info` to see why\n"


def test_a_build_that_fails_is_a_failure(build):
    assert build({"podman": '[ "$1" = info ]'}).returncode == 1


@pytest.mark.parametrize("tool", ["docker", "podman"])
def test_pip_in_the_build_is_told_what_pip_is_told_here(build, tmp_path: Path, tool: str):
    built = build(
        {tool: ALIVE},
        PIP_INDEX_URL="https://me:hunter2@index.example/simple",
        PIP_FIND_LINKS=f"{tmp_path} https://links.example",
        PIP_CERT="/etc/ssl/authority.crt",
    )
    command, _, configuration = built.stdout.partition("\n")
    assert "hunter2" not in command + built.stderr
    assert "--secret id=pip.crt,src=/etc/ssl/authority.crt" in command
    assert "cert = /etc/pip.crt\n" in configuration
    assert "index-url = https://me:hunter2@index.example/simple\n" in configuration
    # docker's builds see no folder of the machine.
    assert (f"--volume={tmp_path}:{tmp_path}:ro" in command) is (tool == "podman")
    links = f"{tmp_path} https://links.example" if tool == "podman" else "https://links.example"
    assert f"find-links = {links}\n" in configuration


def test_without_anything_to_tell_there_is_no_secret(build):
    assert "--secret" not in build({"podman": ALIVE}).stdout
