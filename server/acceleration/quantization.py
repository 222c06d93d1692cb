"""Multiply in fp8: which layers do, how their scales are calibrated, and the file that keeps these.

Micikevicius et al., "FP8 Formats for Deep Learning", 2022. A layer has one scale for its weight, or one for each output
channel of a convolution, and one for its input: the largest input seen while `calibrating` becomes the largest fp8
number. The linear layers of a U-Net's transformers and the convolutions of its residual blocks and upsampling are
quantizable. The others are few and lose more: embeddings, the first and the last convolution, downsampling, shortcuts,
and the projections into and out of a transformer.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from server.acceleration.kernels import fp8


class Quantizable(nn.Module):
    """A layer that multiplies by a weight. Once quantized, it expects its input in fp8, divided by `scale`."""

    scale: torch.Tensor | None
    _calibrates = False  # of all layers, while `calibrating`

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", None)
        self.register_buffer("weight_scale", None)
        self._largest: torch.Tensor | None = None

    def _record(self, values: torch.Tensor) -> None:
        """Record the largest input, while `calibrating`."""
        if Quantizable._calibrates and self.scale is None:
            largest = values.abs().amax().float()
            self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def calibration_scale(self) -> torch.Tensor:
        """Return the scale, of shape (), that maps the largest recorded input to the largest fp8 number."""
        if self._largest is None:
            raise RuntimeError("no input was seen")
        return (self._largest / fp8.E4M3_MAX).clamp(min=torch.finfo(torch.float32).tiny)

    def quantize(self, scale: torch.Tensor) -> None:
        """Round the weights to fp8, and expect inputs in fp8, divided by `scale`, from now on."""
        raise NotImplementedError

    def _quantize(self, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> None:
        self._dtype = weight.dtype
        self.weight = nn.Parameter(fp8.quantize(weight, weight_scale), requires_grad=False)
        self.weight_scale = weight_scale.squeeze()
        self.scale = scale.to(weight.device)


@contextlib.contextmanager
def calibrating() -> Iterator[None]:
    """Make quantizable layers record their largest input."""
    Quantizable._calibrates = True
    try:
        yield
    finally:
        Quantizable._calibrates = False


def quantizable(unet: UNet2DConditionModel, skip_last_blocks: int = 0) -> dict[str, Quantizable]:
    """Return the layers of a fused U-Net that can multiply in fp8, by name, without those of its last blocks."""
    skipped = set(unet.up_blocks[max(0, len(unet.up_blocks) - skip_last_blocks) :].modules())
    layers = unet.named_modules()
    return {name: layer for name, layer in layers if isinstance(layer, Quantizable) and layer not in skipped}


def load_scales(file: Path) -> dict[str, torch.Tensor]:
    """Load the scales of layers by name; none if the file cannot be read or has anything else in it."""
    try:
        scales: dict[str, torch.Tensor] = load_file(file)
    except (OSError, SafetensorError):
        return {}
    usual = all(each.shape == () and each.dtype == torch.float32 for each in scales.values())
    return scales if usual and all(0 < each < torch.inf for each in scales.values()) else {}


def save_scales(scales: dict[str, torch.Tensor], file: Path) -> None:
    """Save scales for a later process, which finds all of them or none. Raises OSError, and then leaves no file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as unfinished:
        written = Path(unfinished) / file.name
        written.write_bytes(save(scales))
        written.replace(file)
