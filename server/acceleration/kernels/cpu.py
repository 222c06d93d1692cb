"""The C++ kernels for x86-64 CPUs with AVX2 and FMA: when they run, and the library that holds them.

They compute in fp32. The result for an image depends neither on its neighbours in the batch nor on the number of
threads. Their sources lie next to the modules that call them; they use no AVX-512, on CPUs that have it neither.
"""

import contextlib
import ctypes
import functools
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from server.acceleration.kernels import cpu_library
from server.acceleration.kernels.cpu_library import BuildError

log = logging.getLogger(__name__)

LANES = 8  # channels in a vector
PANEL = 16  # columns of a weight that lie together

# Per thread: one can warm up while another draws as if there were no kernels.
_active: ContextVar[bool] = ContextVar("active", default=False)
_cache: Path | None = None


def set_cache(folder: Path | None) -> None:
    """Look for the library in a folder, and keep in it what is built from now on."""
    global _cache
    _cache = folder


def is_supported() -> bool:
    """Return whether the CPU has AVX2 and FMA and ATEN_CPU_CAPABILITY does not keep PyTorch from using them."""
    # torch takes the value of the variable for granted, but asks the CPU itself for FMA.
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and torch.cpu._is_avx2_supported()


def prepare() -> None:
    """Find or build the library; without the cache, and with a warning, if that is unusable. Raises BuildError."""
    try:
        library()
    except BuildError as error:
        if _cache is None:
            raise
        set_cache(None)
        try:
            library()
        except BuildError:
            raise error from None
        log.warning("%s; the kernels are not cached", error)


@contextlib.contextmanager
def active() -> Iterator[None]:
    """Let this thread compute by the C++ kernels where they can. Raises BuildError."""
    library()
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)


def is_active() -> bool:
    """Return whether this thread computes by the C++ kernels."""
    return not torch.compiler.is_dynamo_compiling() and _active.get()


def can_run(values: torch.Tensor, channels: int) -> bool:
    """Return whether this thread computes by the C++ kernels and they accept these values and channels."""
    return is_active() and values.device.type == "cpu" and values.dtype == torch.float32 and channels % LANES == 0


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Return the address of a tensor's data."""
    return None if tensor is None else tensor.data_ptr()


def empty_images(batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Return uninitialised images (batch, channels, height, width), channels last."""
    return torch.empty(batch, height, width, channels).permute(0, 3, 1, 2)


def with_batch_stride(bias: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """Return a bias, (channels,) or (batch, channels), with contiguous channels, and its stride from image to image."""
    if bias is None:
        return None, 0
    bias = bias if bias.stride(-1) == 1 else bias.contiguous()
    return bias, bias.stride(0) if bias.ndim == 2 else 0


def library() -> Any:
    """Return the library, found or built. Raises BuildError."""
    return _declare(cpu_library.load(_cache))


@functools.cache
def _declare(library: Any) -> Any:
    """Declare the argument types of the library's functions."""
    address, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    arguments = {
        "winograd": [address] * 3 + [size] + [address] * 2 + [size] * 5 + [number],
        "group_norm": [address] * 2 + [size] + [address] * 3 + [size] * 4 + [ctypes.c_float] + [number] * 2,
        "layer_norm": [address] * 6 + [size] * 2 + [ctypes.c_float, number],
        "attention": [address, size, size] * 3 + [address] + [size] * 4 + [number],
        "linear": [address] * 4 + [size] * 3 + [number],
        "linear_geglu": [address] * 4 + [size] * 3 + [number],
        "geglu": [address] * 2 + [size] * 2 + [number],
    }
    for function, types in arguments.items():
        getattr(library, function).argtypes, getattr(library, function).restype = types, None
    return library
