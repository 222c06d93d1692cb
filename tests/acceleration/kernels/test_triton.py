"""Triton's interpreter compares every Triton kernel with its reference where there is no GPU."""

import os
import subprocess
import sys

import pytest
import torch
from serving import ROOT

TRITON = (
    ROOT / ".triton"
)  # `make .triton/.done`: outside the environment, where PyTorch would look for GPUs because of it


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ or torch.cuda.is_available(), reason="Triton runs in this process")
def test_triton_kernels_equal_their_references_by_the_interpreter():
    completed = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "triton", "tests/acceleration/kernels"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{TRITON}", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-1000:]
    assert " passed" in completed.stdout
