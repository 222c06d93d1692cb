"""Describe the environment that decides the bytes of an image, in addition to its request and the weights.

On one processor the bytes were seen to change with the instruction set, the number of threads that share a sum (in
fp32) and the precision. Versions and TF32 change the arithmetic. The reference image, which runtime.py adds, shows what
a process cannot read, such as the instruction set that MKL or oneDNN has chosen.
"""

import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import features

from server import __version__
from server.domain import CODING_VERSION, Environment

_PACKAGES = ("diffusers", "transformers", "tokenizers", "pillow")
_CODECS = ("libjpeg_turbo", "webp", "zlib", "zlib_ng")


def environment(device: str, precision: str, max_batch: int) -> Environment:
    """Describe the environment of eager networks on a device (cuda, mps or cpu), with `max_batch` images in a call."""
    return Environment(
        versions=_versions(device),
        hardware=torch.cuda.get_device_name() if device == "cuda" else _processor(),
        precision=precision,
        fp32_math=_fp32_math(device),
        threads=torch.get_num_threads() if device == "cpu" else 0,
        max_batch=max_batch,
        compiled="off",
    )


def _versions(device: str) -> dict[str, str]:
    # torch.__version__ ends with the build, "+cpu" or "+cu130"; the package's metadata need not.
    versions = {"server": __version__, "torch": str(torch.__version__)}
    versions |= {package: version(package) for package in _PACKAGES}
    versions |= {codec: found for codec in _CODECS if (found := features.version(codec))}
    versions["coding"] = CODING_VERSION
    if device == "cuda":
        cudnn: Any = torch.backends.cudnn
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(cudnn.version())}
    return versions


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: *(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return f"{named[1] if named else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _fp32_math(device: str) -> str:
    backends: Any = torch.backends
    by_device = {
        "cuda": (backends.cuda.matmul, backends.cudnn.conv),
        "cpu": (backends.mkldnn.matmul, backends.mkldnn.conv),
    }
    if device not in by_device:
        return "matmul ieee, convolution ieee"
    matmul, convolution = (each.fp32_precision.replace("none", "ieee") for each in by_device[device])
    return f"matmul {matmul}, convolution {convolution}"
