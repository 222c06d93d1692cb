"""Fixtures that several test modules share: a tiny ensemble, this machine's devices, mounts and replicas."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_ensemble
from replicas import Replicas

from server import model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_ensemble.save(tmp_path_factory.mktemp("ensemble"))


@pytest.fixture(scope="module", params=[name for name, is_there in model._DEVICES.items() if is_there()])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes folders that are mounted with options of mount(8); needs root, and a machine that allows it."""
    folders: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mounted-{len(folders)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("needs root and a machine on which it may mount")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def all_replicas() -> Iterator[Replicas]:
    replicas = Replicas()
    yield replicas
    for each in replicas.alive():
        each.process.kill()


@pytest.fixture
def replicas(all_replicas: Replicas) -> Replicas:
    all_replicas.replace()
    return all_replicas
