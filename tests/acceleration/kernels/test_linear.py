"""Linear layers by C++ equal PyTorch's."""

import pytest
import torch
from kernel_comparison import relative_error
from torch import nn

from server.acceleration.kernels import cpu, geglu
from server.acceleration.kernels.linear import PackedLinear


@pytest.mark.skipif(not cpu.is_supported(), reason="the C++ kernels are not for this CPU")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "channels", "outputs"), [((2, 256), 160, 480), ((1,), 10, 32), ((3, 7), 640, 64)])
def test_packed_linear(rows: tuple[int, ...], channels: int, outputs: int, bias: bool):
    layer, values = nn.Linear(channels, outputs, bias=bias), torch.randn(*rows, channels)
    packed = PackedLinear(layer.weight, layer.bias)
    assert relative_error(packed(values), layer.double()(values.double())) < 1e-6
    assert relative_error(packed.geglu(values), geglu.geglu(layer(values.double()))) < 2e-6


@pytest.mark.parametrize(
    ("shape", "dtype", "supported"),
    [
        ((160, 160), torch.float32, True),
        ((48, 64), torch.float32, False),
        ((1024, 1024), torch.float32, False),
        ((160, 160), torch.bfloat16, False),
    ],
)
def test_packed_linear_supports_whole_panels_of_moderate_size(
    shape: tuple[int, int], dtype: torch.dtype, supported: bool
):
    assert PackedLinear.supports(torch.empty(shape, dtype=dtype)) is supported
