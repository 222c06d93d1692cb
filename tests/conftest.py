"""Fixtures that several test modules share: a tiny ensemble, this machine's devices, mounts and replicas."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from replicas import Replicas

# torch takes seconds to import, and many tests do without it: fixtures import what needs it.


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    import tiny_ensemble

    return tiny_ensemble.save(tmp_path_factory.mktemp("ensemble"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with the argument `device` on each device of this machine, unless it names devices itself."""
    given = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "device" in metafunc.fixturenames and not any("device" in names for names in given):
        from server.ensemble import devices

        names = [name for name, is_there in devices.AVAILABLE.items() if is_there()]
        metafunc.parametrize("device", names, scope="module")


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
