#!/usr/bin/env bash
# Guess: ATEN_CPU_CAPABILITY=default makes torch compute as on a processor without AVX, and torch.backends.cpu says so.
# Seen: it says DEFAULT, and torch's own kernels are those, but its matrix products come from MKL, which has not heard
#   of the variable and goes on with AVX2 or AVX-512; their bits stay those of the processor. The names are read in
#   small letters alone: with DEFAULT or AVX2, as torch prints them, the variable is ignored, with a warning.
# With: torch 2.13.0 on x86-64.
# Why it matters: a test under each capability that is meant to stand for older processors computes its products with
#   the newest instructions all the same, so it can pass where the older processor differs.
# Output seen: as it is: AVX512; default: DEFAULT, MKL names its instructions as without it: True, products keep their
#   bits: True; DEFAULT: AVX512, ignored: True
set -euo pipefail
grep -qE '^flags.* avx2( |$)' /proc/cpuinfo || { echo "needs a processor with AVX2" >&2; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages torch==2.13.0
cat > compute.py <<'PYTHON'
import hashlib
import warnings

import torch

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print("capability", torch.backends.cpu.get_cpu_capability())
print("ignored", any("ignoring invalid value" in str(each.message) for each in caught))
torch.set_num_threads(1)
matrix = (torch.arange(256 * 256) * 7919 % 1000).float().reshape(256, 256) / 999
print("product", hashlib.sha256(repr((matrix @ matrix).tolist()).encode()).hexdigest())
PYTHON
PYTHONPATH=packages timeout 300 "${PYTHON:-python3.11}" - <<'PYTHON'
import os
import subprocess
import sys


def compute(capability=None):
    environment = {**os.environ, "MKL_VERBOSE": "1"}
    environment.pop("ATEN_CPU_CAPABILITY", None)
    if capability:
        environment["ATEN_CPU_CAPABILITY"] = capability
    done = subprocess.run([sys.executable, "compute.py"], env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    seen = dict(line.split(" ", 1) for line in lines if line.split(" ")[0] in ("capability", "ignored", "product"))
    return seen | {"mkl": next((line for line in lines if line.startswith("MKL_VERBOSE oneMKL")), "")}


own, lowered, capitals = compute(), compute("default"), compute("DEFAULT")
if "Advanced Vector Extensions" not in own["mkl"]:
    print("needs a torch whose matrix products are MKL's", file=sys.stderr)
    sys.exit(2)
mkl, bits = lowered["mkl"].split(" Lin ")[0] == own["mkl"].split(" Lin ")[0], lowered["product"] == own["product"]
print(f"as it is: {own['capability']}; default: {lowered['capability']}, MKL names its instructions as without it: "
      f"{mkl}, products keep their bits: {bits}; DEFAULT: {capitals['capability']}, ignored: {capitals['ignored']}")
if lowered["capability"] != "DEFAULT" or own["capability"] == "DEFAULT" or not mkl or not bits:
    sys.exit("changed: the capability reaches matrix products")
if capitals["ignored"] != "True" or capitals["capability"] != own["capability"]:
    sys.exit("changed: capabilities are read in capitals")
PYTHON
