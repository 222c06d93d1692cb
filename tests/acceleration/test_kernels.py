"""The kernels that GPUs run are compared with their references here too, by Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from serving import ROOT

TRITON = ROOT / ".triton"  # `make .triton/.done`: beside the environment, since with it PyTorch would think of GPUs


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_kernel_computes_what_its_reference_does():
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{TRITON}", "TRITON_INTERPRET": "1"}
    if torch.cuda.is_available():
        env = os.environ | {"PYTHONPATH": str(ROOT)}
    checked = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=",
         "tests/acceleration/kernels.py"],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout[-3000:] + checked.stderr[-1000:]
    assert " passed" in checked.stdout
