#!/usr/bin/env bash
# Guess: what torch.compile keeps on disk is looked up by the processor's instructions too, as machine code is.
# Seen: the C++ that it writes is not. A process with fewer instructions finds what one with more has written, and
#   compiles vectors that it does not have: a CppCompileError, where with a folder of its own it computes well.
# With: torch 2.13.0 on an x86-64 with AVX2.
# Why it matters: a cache on a volume that hosts of several kinds share, or that comes in an image, ends the start of a
#   server on the lesser hosts. torch.compiler.config.cache_key_tag can hold the capability.
# Output seen: avx2: right; default with a folder of its own: right; default with the folder of avx2: CppCompileError
set -euo pipefail
grep -qE '^flags.* avx2( |$)' /proc/cpuinfo || { echo "needs a processor with AVX2" >&2; exit 2; }
command -v g++ > /dev/null || { echo "needs g++" >&2; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3.11}" -m pip install -qq --disable-pip-version-check --target packages torch==2.13.0
cat > compute.py <<'PYTHON'
import torch

values = torch.linspace(0, 1, 1000)


def compute(values):
    return (values.cos() * 2).sum() + values


try:
    print("right" if torch.allclose(torch.compile(compute)(values), compute(values)) else "wrong numbers")
except Exception as error:
    print("CppCompileError" if "CppCompileError" in f"{type(error).__name__} {error}" else repr(error))
PYTHON
compute() { # CAPABILITY FOLDER
    env ATEN_CPU_CAPABILITY="$1" TORCHINDUCTOR_CACHE_DIR="$folder/$2" PYTHONPATH=packages \
        timeout 300 "${PYTHON:-python3.11}" compute.py 2> /dev/null
}
first=$(compute avx2 shared)
own=$(compute default own)
shared=$(compute default shared)
echo "avx2: $first; default with a folder of its own: $own; default with the folder of avx2: $shared"
[ "$first $own $shared" = "right right CppCompileError" ] || { echo "changed: processors share no C++" >&2; exit 1; }
