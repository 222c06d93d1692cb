"""What a U-Net and a decoder do beside their other products, in C++ for an x86-64 CPU: `cpu_kernels.cpp`.

The functions are those of `kernels`, in fp32, each one pass over its bytes, and a 3 x 3 convolution: Winograd's
F(4 x 4, 3 x 3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015. Its tiles of 6 x 6 pixels
are transformed in registers and multiplied while they are in the cache. Its rounding error is 2e-6 of a result's size.
What an image comes to depends neither on its neighbours nor on the number of threads. Their instructions are AVX2 and
FMA, on CPUs with AVX-512 too.
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
from torch import nn

from server.acceleration import cpu_library
from server.acceleration.cpu_library import CannotBuild

log = logging.getLogger(__name__)

_LANES, _PANEL = 8, 16  # channels are in vectors, weights in panels of so many columns
_MOST = 1 << 19  # weights of a linear layer: there is a copy of them
_FEWEST = 32  # channels, of which fewer products are the faster
_MOST_TRANSFORMED = 1 << 17  # weights of one place of a 3 x 3 kernel: transformed, they are four times as large, 19 MB
# Lavin and Gray's transform of a line of 3 weights. That of a 3 x 3 kernel transforms its lines and then its columns.
_WEIGHTS = torch.tensor([
    [1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
], dtype=torch.float64)  # fmt: skip

# Of each thread its own: one can warm up while another makes images as if there were no kernels.
_running: ContextVar[bool] = ContextVar("running", default=False)
_folder: Path | None = None


def keep_in(folder: Path | None) -> None:
    """Let what is built from now on be kept in a folder, and taken from there by later processes."""
    global _folder
    _folder = folder


def suit() -> bool:
    """Whether the CPU has the kernels' instructions, and torch is not kept from them by ATEN_CPU_CAPABILITY."""
    # torch asks the CPU for FMA too, but takes what the variable says at its word.
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and torch.cpu._is_avx2_supported()


def prepare() -> None:
    """Find or build the kernels, without the cache if that cannot be used, which is warned of. Raises CannotBuild."""
    try:
        _library()
    except CannotBuild as error:
        cache = _folder
        if cache is None:
            raise
        keep_in(None)
        try:
            _library()
        except CannotBuild:
            raise error from None
        log.warning("%s; what is built is not kept", error)


@contextlib.contextmanager
def running() -> Iterator[None]:
    """While this lasts this thread computes by kernels what they can compute. Raises CannotBuild."""
    _library()
    token = _running.set(True)
    try:
        yield
    finally:
        _running.reset(token)


def run() -> bool:
    """Whether this thread computes by kernels."""
    return not torch.compiler.is_dynamo_compiling() and _running.get()


def compute(values: torch.Tensor, channels: int) -> bool:
    """Whether this thread computes what is made of such values, of so many channels, by kernels."""
    return run() and values.device.type == "cpu" and values.dtype == torch.float32 and channels % _LANES == 0


class Winograd:
    """A 3 x 3 convolution with a border of zeros by fewer products."""

    def __init__(self, layer: nn.Conv2d) -> None:
        transformed = _transformed(layer.weight.detach())
        self._weight = torch.stack(torch.split(transformed, _PANEL, dim=2), dim=1)

    @staticmethod
    def computes(layer: nn.Conv2d) -> bool:
        """Whether it computes this convolution, and that gains."""
        whole = layer.in_channels % _LANES == 0 and layer.out_channels % _PANEL == 0
        return whole and _fits(layer)

    def __call__(self, images: torch.Tensor, bias: torch.Tensor | None, kept: torch.Tensor | None) -> torch.Tensor:
        """Of images (batch, channels, height, width), plus a bias and what is `kept` where there are any.

        The bias is (outputs,), or of each image another, (batch, outputs); `kept` and the result are (batch, outputs,
        height, width).
        """
        images = images.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = images.shape
        outputs = self._weight.shape[1] * _PANEL
        result = _images(batch, outputs, height, width)
        if kept is not None:
            kept = kept.contiguous(memory_format=torch.channels_last)
        bias, stride = _by_image(bias)
        _library().winograd(
            images.data_ptr(), self._weight.data_ptr(), _at(bias), stride, _at(kept), result.data_ptr(),
            batch, height, width, channels, outputs, torch.get_num_threads(),
        )  # fmt: skip
        return result


class Linear:
    """A linear layer whose weights lie as they are read."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.stack(torch.split(weight.detach().t(), _PANEL, dim=1))
        self._bias = None if bias is None else bias.detach()

    @staticmethod
    def computes(weight: torch.Tensor) -> bool:
        """Whether it computes a layer of this weight, (outputs, channels), and that gains."""
        usual = weight.device.type == "cpu" and weight.dtype == torch.float32
        return usual and weight.shape[0] % (2 * _PANEL) == 0 and weight.numel() <= _MOST

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Of values (..., channels)."""
        return self._made(_library().linear, values, self._weight.shape[0] * _PANEL)

    def gated(self, values: torch.Tensor) -> torch.Tensor:
        """What `kernels.gated_gelu` makes of that, half as wide."""
        return self._made(_library().gated_linear, values, self._weight.shape[0] * _PANEL // 2)

    def _made(self, function: Any, values: torch.Tensor, width: int) -> torch.Tensor:
        values = values.contiguous()
        result = torch.empty(*values.shape[:-1], width)
        channels = values.shape[-1]
        function(
            values.data_ptr(), self._weight.data_ptr(), _at(self._bias), result.data_ptr(),
            values.numel() // channels, channels, width, torch.get_num_threads(),
        )  # fmt: skip
        return result


def group_norm(
    images: torch.Tensor,
    shift: torch.Tensor | None,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool,
) -> torch.Tensor:
    """As `kernels.group_norm` without a border."""
    images = images.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = images.shape
    result = _images(batch, channels, height, width)
    shift, stride = _by_image(shift)
    _library().group_norm(
        images.data_ptr(), _at(shift), stride, weight.data_ptr(), bias.data_ptr(), result.data_ptr(), batch,
        height * width, channels, groups, eps, silu, torch.get_num_threads(),
    )  # fmt: skip
    return result


def layer_norm(
    values: torch.Tensor, more: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.layer_norm`."""
    values = values.contiguous()
    total = values
    if more is not None:
        more, total = more.contiguous(), torch.empty_like(values)
    result = torch.empty_like(values)
    width = values.shape[-1]
    _library().layer_norm(
        values.data_ptr(), _at(more), weight.data_ptr(), bias.data_ptr(), total.data_ptr(), result.data_ptr(),
        values.numel() // width, width, eps, torch.get_num_threads(),
    )  # fmt: skip
    return total, result


def attend(width: int) -> bool:
    """Whether `attention` is for heads of so many channels."""
    return width == 2 * _PANEL


def attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, heads: int) -> torch.Tensor:
    """As `kernels.cross_attention`, of any number of tokens."""
    (batch, places, inner), tokens = queries.shape, keys.shape[1]
    result = torch.empty(batch, places, inner)
    read = [each if each.stride(2) == 1 else each.contiguous() for each in (queries, keys, values)]
    given = [number for each in read for number in (each.data_ptr(), each.stride(0), each.stride(1))]
    _library().attention(*given, result.data_ptr(), batch, heads, places, tokens, torch.get_num_threads())
    return result


def gated_gelu(values: torch.Tensor) -> torch.Tensor:
    """As `kernels.gated_gelu`."""
    values = values.contiguous()
    width = values.shape[-1] // 2
    result = torch.empty(*values.shape[:-1], width)
    _library().gated_gelu(
        values.data_ptr(), result.data_ptr(), values.numel() // (2 * width), width, torch.get_num_threads()
    )  # fmt: skip
    return result


def _transformed(weight: torch.Tensor) -> torch.Tensor:
    """Transform weights (outputs, channels, 3, 3) to (36, channels, outputs)."""
    outputs, channels = weight.shape[:2]
    places = torch.einsum("ij,ocjk,lk->ilco", _WEIGHTS, weight.double(), _WEIGHTS)
    return places.reshape(36, channels, outputs).to(weight.dtype).contiguous()


def _fits(layer: nn.Conv2d) -> bool:
    """Whether a layer is a 3 x 3 convolution in fp32 on a CPU that has enough channels and not too many weights."""
    enough = min(layer.in_channels, layer.out_channels) >= _FEWEST
    fits = enough and layer.in_channels * layer.out_channels <= _MOST_TRANSFORMED
    shaped = layer.kernel_size == (3, 3) and layer.padding == (1, 1) and layer.stride == (1, 1)
    usual = layer.dilation == (1, 1) and layer.groups == 1 and layer.weight.dtype == torch.float32
    return fits and shaped and usual and layer.weight.device.type == "cpu"


def _images(batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    return torch.empty(batch, height, width, channels).permute(0, 3, 1, 2)


def _at(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _by_image(bias: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """With channels that lie side by side, and how far those of one image are from those of the next."""
    if bias is None:
        return None, 0
    bias = bias if bias.stride(-1) == 1 else bias.contiguous()
    return bias, bias.stride(0) if bias.ndim == 2 else 0


def _library() -> Any:
    return _typed(cpu_library.load(_folder))


@functools.cache
def _typed(library: Any) -> Any:
    """The library, whose functions know their arguments."""
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    arguments = {
        "winograd": [pointer] * 3 + [size] + [pointer] * 2 + [size] * 5 + [number],
        "group_norm": [pointer] * 2 + [size] + [pointer] * 3 + [size] * 4 + [ctypes.c_float] + [number] * 2,
        "layer_norm": [pointer] * 6 + [size] * 2 + [ctypes.c_float, number],
        "attention": [pointer, size, size] * 3 + [pointer] + [size] * 4 + [number],
        "linear": [pointer] * 4 + [size] * 3 + [number],
        "gated_linear": [pointer] * 4 + [size] * 3 + [number],
        "gated_gelu": [pointer] * 2 + [size] * 2 + [number],
    }
    for function, types in arguments.items():
        getattr(library, function).argtypes, getattr(library, function).restype = types, None
    return library
