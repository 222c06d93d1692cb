"""The ensemble draws on an x86-64 CPU without AVX, which qemu-user emulates."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from serving import ROOT

QEMU = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
SECONDS = 1800  # an emulated image takes a minute on an idle machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2 * SECONDS),
    pytest.mark.skipif(
        QEMU is None or platform.machine() != "x86_64", reason="needs an x86-64 and Debian's package qemu-user-static"
    ),
]

DRAW = """
import sys
from dataclasses import replace

import numpy
import torch

from server.ensemble import checkpoint
from server import model
from server.domain import default_request
from server.settings import EMBEDDED

ensemble = model.load(checkpoint.inspect(EMBEDDED / "base", EMBEDDED / "refiner"), "cpu", compile="auto")
request = replace(default_request(ensemble.info, "cat napping", 7), steps=2, width=64, height=64)
trajectory = ensemble.plan(request, ensemble.encode(request), 7)
for _ in trajectory.stages:
    ensemble.step([trajectory])
numpy.save(sys.argv[1], ensemble.decode(trajectory))
print(torch.backends.cpu.get_cpu_capability(), ensemble.info.environment.compiled)
"""


def draw(image: Path, *emulator: str) -> tuple[str, np.ndarray]:
    """Draw a small image in a process; return the CPU's capability with the compile mode, and the pixels."""
    command = [*emulator, sys.executable, "-c", DRAW, str(image)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip(), np.load(image).astype(int)


def test_cpu_without_avx_draws_the_same_image(tmp_path: Path):
    assert QEMU is not None
    _, expected = draw(tmp_path / "here.npy")
    capability, drawn = draw(tmp_path / "emulated.npy", QEMU, "-cpu", "Nehalem")
    assert capability == "DEFAULT off"
    assert np.abs(drawn - expected).max() <= 2
    assert expected.std() > 10, "the image is not uniform"
