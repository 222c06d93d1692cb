"""Linear layers on a CPU: PyTorch's, one image at a time, or by C++ with packed weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from server.acceleration.kernels import cpu

_MAX_PACKED_WEIGHTS = 1 << 19  # a packed weight is a copy


def linear(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, image_count: int = 1) -> torch.Tensor:
    """Return a linear layer (..., outputs) of values (rows, ..., channels) of `image_count` images.

    On a CPU each image is a product of its own, compiled or not: MKL takes some rows at a time, six in its AVX2 code,
    and sums the last few rows of a product in another order.
    """
    if image_count == 1 or values.device.type != "cpu":
        return F.linear(values, weight, bias)
    if torch.compiler.is_dynamo_compiling():
        return torch.cat([F.linear(rows, weight, bias) for rows in values.chunk(image_count)])
    result = values.new_empty(*values.shape[:-1], len(weight))
    for source, target in zip(values.chunk(image_count), result.chunk(image_count), strict=True):
        rows, out = source.reshape(-1, values.shape[-1]), target.view(-1, len(weight))
        if bias is None:
            torch.mm(rows, weight.t(), out=out)
        else:
            torch.addmm(bias, rows, weight.t(), out=out)
    return result


class PackedLinear:
    """A linear layer by C++, with its weight copied into the order in which the kernel reads it.

    It is for fp32 on a CPU that `cpu.is_supported()` accepts.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.stack(torch.split(weight.detach().t(), cpu.PANEL, dim=1))
        self._bias = None if bias is None else bias.detach()

    @staticmethod
    def supports(weight: torch.Tensor) -> bool:
        """Return whether the kernel computes a layer of this weight (outputs, channels), and faster than PyTorch."""
        is_fp32_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
        return is_fp32_on_cpu and weight.shape[0] % (2 * cpu.PANEL) == 0 and weight.numel() <= _MAX_PACKED_WEIGHTS

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Return (..., outputs) of values (..., channels)."""
        return self._apply(cpu.library().linear, values, self._weight.shape[0] * cpu.PANEL)

    def geglu(self, values: torch.Tensor) -> torch.Tensor:
        """Return GEGLU of the layer, (..., outputs / 2), of values (..., channels)."""
        return self._apply(cpu.library().linear_geglu, values, self._weight.shape[0] * cpu.PANEL // 2)

    def _apply(self, function: Any, values: torch.Tensor, width: int) -> torch.Tensor:
        values = values.contiguous()
        channels = values.shape[-1]
        result = torch.empty(*values.shape[:-1], width)
        function(
            values.data_ptr(),
            self._weight.data_ptr(),
            cpu.pointer(self._bias),
            result.data_ptr(),
            values.numel() // channels,
            channels,
            width,
            torch.get_num_threads(),
        )
        return result
