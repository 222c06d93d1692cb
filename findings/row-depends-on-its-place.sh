#!/usr/bin/env bash
# Guess: equal rows of one matrix product give equal rows.
# Seen: with MKL's code for AVX2 they do not. It takes six rows at a time and sums up those that are left over in another
#   order: of eight equal rows, the last two differ from the first six. With its code for AVX-512 all are equal.
# With: torch 2.13.0, whose products on an x86-64 are MKL's, on an Intel processor with AVX2; elsewhere MKL takes other code.
# Why it matters: a picture that shares a call with others depends on its place in it, on some processors alone.
# Output seen: equal to the first row: 1 1 1 1 1 1 0 0
set -euo pipefail
grep -q GenuineIntel /proc/cpuinfo || { echo "needs an Intel processor" >&2; exit 2; }
grep -qE '^flags.* avx2( |$)' /proc/cpuinfo || { echo "needs a processor with AVX2" >&2; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages torch==2.13.0 numpy==2.4.6
MKL_ENABLE_INSTRUCTIONS=AVX2 PYTHONPATH=packages timeout 300 "${PYTHON:-python3.11}" - <<'PYTHON'
import sys

import torch

torch.manual_seed(0)
weights, row = torch.randn(64, 64), torch.randn(1, 64)
product = row.expand(8, 64).contiguous() @ weights
equal = [int(torch.equal(each, product[0])) for each in product]
print("equal to the first row:", *equal)
if equal != [1, 1, 1, 1, 1, 1, 0, 0]:
    sys.exit("changed: rows are summed up in another way")
PYTHON
