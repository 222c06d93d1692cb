"""Make the bytes of an image independent of the other images in its call.

Most kernels compute a row alike wherever it is. The layers in `BATCH_VARIANT_LAYERS` do not, so each takes the rows of
one image at a time.
"""

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from torch import nn

from server.acceleration.per_image import PerImageLayer

# On a CPU torch divides the values of SiLU and GELU among threads without regard to rows, and computes the last few of
# each thread's share by scalar code, which rounds differently from vector code. MKL sums the last rows of a matrix
# product in another order. On CUDA cuDNN splits the sums of some convolutions without regard to rows.
BATCH_VARIANT_LAYERS: dict[str, tuple[type[nn.Module], ...]] = {
    "cpu": (nn.SiLU, GEGLU, nn.Linear),
    "cuda": (nn.Conv2d,),
}


class PerImage(nn.Module):
    """Call a layer once for each of the `images` images in its rows."""

    images: int = 1

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        if isinstance(layer, nn.Linear):
            self.in_features = layer.in_features  # diffusers' pipelines read it of an embedding

    def forward(self, rows: torch.Tensor) -> Any:
        """Take rows (images * rows of an image, ...) and return the layer's, in the same order."""
        if self.images == 1:
            return self.layer(rows)
        return torch.cat([self.layer(image) for image in rows.chunk(self.images)])


def make_batch_invariant(network: nn.Module, device: str) -> list[PerImage | PerImageLayer]:
    """Make a network compute each image alike at any place in a call; cuda or cpu is the kind of its device.

    Returns the layers whose `images` must be set to the number of images in a call. Convolutions by a kernel of
    `server.acceleration.kernels` are batch-invariant already.
    """
    found: list[PerImage | PerImageLayer] = []
    for name, layer in list(network.named_children()):
        if isinstance(layer, PerImageLayer) and device == "cpu":  # it handles the layers inside it
            found += (each for each in layer.modules() if isinstance(each, PerImageLayer))
        elif isinstance(layer, BATCH_VARIANT_LAYERS.get(device, ())):
            per_image = PerImage(layer)
            setattr(network, name, per_image)
            found.append(per_image)
        else:
            found += make_batch_invariant(layer, device)
    return found
