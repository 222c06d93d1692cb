"""The convolutions of fused residual blocks and upsampling: by cuDNN or oneDNN, by a kernel, or in fp8."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import nn

from server.acceleration.kernels import convolution, cpu, fp8, pointwise, tiles
from server.acceleration.kernels.winograd import WinogradConvolution
from server.acceleration.per_image import PerImageLayer
from server.acceleration.quantization import Quantizable


class Convolution(nn.Module):
    """A convolution of cuDNN with its bias added by a kernel.

    PyTorch lets cuDNN add the bias in a pass that is much slower than its bytes take.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer, self.bias = layer, layer.bias
        layer.bias = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Convolve images (batch, channels, height, width)."""
        return pointwise.add_bias(self.layer(images), self.bias)  # type: ignore[arg-type]  # only layers with a bias are replaced


class QuantizableConvolution(Quantizable):
    """A convolution by PyTorch's `layer`, or by a kernel, which reads images with a padding of zeros.

    A quantized one always uses the kernel. One that uses the kernel has no `layer`.
    """

    layer: nn.Module | None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    @property
    def uses_kernel(self) -> bool:
        """Whether a kernel computes every call."""
        return self.layer is None

    def use_kernel(self) -> None:
        """Use the kernel from now on. The weight stays in place, in the channels-last order of `fuse_layers`."""
        if self.layer is not None:
            self.weight = self.layer.get_parameter("weight")
            self._dtype = self.weight.dtype
            self.layer = None

    def quantize(self, scale: torch.Tensor) -> None:
        """Multiply in fp8 from now on, with a weight scale for each output channel."""
        self.use_kernel()
        weight, phases = self.weight.detach(), tiles.phase_count(self.weight.shape[-1])
        largest = weight.abs().amax(dim=(1, 2, 3)).float().view(phases, -1).amax(dim=0)  # per output channel
        scales = (largest / fp8.E4M3_MAX).clamp(min=torch.finfo(torch.float32).tiny)
        self._quantize(scale, weight, scales.repeat(phases)[:, None, None, None])
        self.weight_scale = scales


class ResnetConvolution(QuantizableConvolution, PerImageLayer):
    """A 3 x 3 convolution of a residual network, without a bias of its own.

    The kernel computes it for those image sizes for which it is faster. On a CPU it is a Winograd convolution while
    the C++ kernels run.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer)
        self._cpu_kernel: WinogradConvolution | None = None

    def reads_padding(self, images: torch.Tensor) -> bool:
        """Whether it reads images of this shape, (batch, channels, height, width), with a padding of zeros."""
        if self.uses_winograd:
            return False
        return self.uses_kernel or self._is_faster_by_kernel(images)

    def _is_faster_by_kernel(self, images: torch.Tensor) -> bool:
        if not isinstance(self.layer, nn.Conv2d) or not convolution.supports(images.device, images.dtype):
            return False
        batch, _, height, width = images.shape
        return tiles.fills_one_wave(batch * height * width, self.layer.in_channels, self.layer.out_channels)

    @property
    def uses_winograd(self) -> bool:
        """Whether this thread runs it as a Winograd convolution."""
        return self._cpu_kernel is not None and cpu.is_active()

    def forward(
        self,
        images: torch.Tensor,
        padding: bool,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Convolve images, padded if `padding`, and add the bias and the residual if given.

        The bias has shape (channels,) or (batch, channels); the residual has that of the result.
        """
        self._record(images)
        if self._cpu_kernel is not None and self.uses_winograd:
            return self._cpu_kernel(images, bias, residual)
        if self.layer is None:
            return convolution.convolve(images, self.weight, bias, self._dtype, residual, self.scale, self.weight_scale)
        if padding:
            return convolution.convolve(images, self.layer.get_parameter("weight"), bias, images.dtype, residual)
        if images.device.type == "cpu":  # oneDNN adds a bias at no cost
            changed: torch.Tensor = F.conv2d(images, self.layer.get_parameter("weight"), bias, padding=1)
            return changed if residual is None else changed.add_(residual)
        changed = self.layer(images)
        return changed if bias is None else pointwise.add_bias(changed, bias, residual)

    def use_cpu_kernel(self) -> None:
        """Run as a Winograd convolution from now on, where that is faster and while the C++ kernels run."""
        if isinstance(self.layer, nn.Conv2d) and WinogradConvolution.supports(self.layer):
            self._cpu_kernel = WinogradConvolution(self.layer)


class Upsample(QuantizableConvolution):
    """A 3 x 3 convolution of images that are enlarged to twice their sides, or to `output_size`.

    An enlarged image has four equal pixels for every pixel of the small one, so only 2 x 2 of the 3 x 3 inputs of an
    output pixel differ. Each of the four phases is a convolution of the small image by 2 x 2 weights, sums of the
    3 x 3, with 16 of 36 multiplications. At an odd size the last pixels border on zeros instead of their equals: the
    3 x 3 convolution computes that case.
    """

    def __init__(self, layer: Upsample2D, device: str) -> None:
        super().__init__(_transposed(layer.conv) if device == "cpu" else _by_phases(layer.conv))
        self.conv, self.bias = layer.conv, layer.conv.bias

    def forward(self, hidden_states: torch.Tensor, output_size: Sequence[int] | None = None) -> torch.Tensor:
        """Enlarge and convolve images (batch, channels, height, width)."""
        self._record(hidden_states)
        result: torch.Tensor
        if output_size is not None and tuple(output_size) != tuple(2 * side for side in hidden_states.shape[2:]):
            result = self.conv(F.interpolate(hidden_states, size=output_size, mode="nearest"))
        elif self.layer is None:
            images = pointwise.pad(hidden_states, self.scale)
            result = convolution.convolve(
                images, self.weight, self.bias, self._dtype, None, self.scale, self.weight_scale
            )
        else:
            result = self.layer(hidden_states)
            if not isinstance(self.layer, nn.ConvTranspose2d):
                result = pointwise.interleave_phases(result, self.bias)
        return result

    def use_kernel(self) -> None:
        """Use the kernel from now on."""
        if isinstance(self.layer, nn.ConvTranspose2d):
            self.layer = _by_phases(self.conv)
        super().use_kernel()


def _by_phases(layer: nn.Conv2d) -> nn.Conv2d:
    """Make the convolution whose output `pointwise.interleave_phases` turns into that of the enlarged image.

    The weights are summed in fp32.
    """

    def pairs(weight: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, middle, last = weight.unbind(dim)
        return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)

    weight = layer.weight.detach()
    phases = [phase for lines in pairs(weight.float(), 2) for phase in pairs(lines, 3)]
    made = nn.Conv2d(weight.shape[1], 4 * len(weight), 2, padding=1, bias=False, device="meta")
    last = torch.cat(phases).to(weight.dtype, memory_format=torch.channels_last)
    made.weight = nn.Parameter(last, requires_grad=False)
    return made


def _transposed(layer: nn.Conv2d) -> nn.ConvTranspose2d:
    """Make the same convolution as a transposed one with its bias, which oneDNN computes by phases in one pass."""
    outputs, channels, _, _ = layer.weight.shape
    phases = _by_phases(layer).weight.view(2, 2, outputs, channels, 2, 2)
    made = nn.ConvTranspose2d(channels, outputs, 4, stride=2, padding=1, device="meta")
    weight = phases.permute(3, 2, 4, 0, 5, 1).reshape(channels, outputs, 4, 4).flip(2, 3)
    made.weight, made.bias = nn.Parameter(weight, requires_grad=False), layer.bias
    return made
