"""3 x 3 convolutions on a CPU, of a quarter of the products: F(4 x 4, 3 x 3) of Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks", 2015.

Tiles of 6 x 6 pixels become 36 numbers, each of which is multiplied by a matrix of its own, and what comes of that
becomes 4 x 4 pixels. A few lines of tiles are made at once, so that all of that happens in the cache. The sums are
those of the convolution but for rounding, of which there is five times as much: 2e-6 of their size in fp32.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

# Lavin and Gray's transforms of a line of 6 pixels, of 3 weights, and back to 4 pixels. Those of tiles are of their
# lines and then of their columns. The second of `_BACK`'s columns is of ones: what is added to that one product is
# added to every pixel.
_PIXELS = torch.tensor([
    [4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
], dtype=torch.float32)  # fmt: skip
_WEIGHTS = torch.tensor([
    [1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
], dtype=torch.float64)  # fmt: skip
_BACK = torch.tensor([
    [1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]
], dtype=torch.float32)  # fmt: skip
_ONES = 1 * 6 + 1  # of the 36 products of a tile, the one that comes back as itself in every pixel

_SIDE = 4  # of a tile's pixels that come back
_AT_ONCE = 96  # tiles: enough for products of matrices to be fast, and few enough for a cache of some megabytes
_FEWEST = 64  # channels, of which the transforms are small beside the products
_MOST = 1 << 17  # weights of a kernel's place: transformed, four times as large as they were, they are 19 MB


class Winograd:
    """A 3 x 3 convolution of images with a border of one pixel."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self._weight = transformed(layer.weight.detach())

    def __call__(
        self,
        images: torch.Tensor,
        bias: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
        parts: int = 1,
    ) -> torch.Tensor:
        """Of images (batch, channels, height + 2, width + 2), plus a bias and what is `kept` where there are any.

        The bias is (outputs,), or of each image another, (batch, outputs); `kept` and the result are (batch, outputs,
        height, width). No product has tiles of two of so many equal `parts` of the batch: what a tile comes to depends
        on its place in a product, as `kernels.linear` says.
        """
        height, width = images.shape[2] - 2, images.shape[3] - 2
        if height % _SIDE == width % _SIDE == 0:
            return self._of_whole_tiles(images, bias, kept, parts)
        larger = F.pad(images, (0, -width % _SIDE, 0, -height % _SIDE))
        result = self._of_whole_tiles(larger, bias, None, parts)[:, :, :height, :width]
        return result.contiguous(memory_format=torch.channels_last) if kept is None else kept + result

    def _of_whole_tiles(
        self, images: torch.Tensor, bias: torch.Tensor | None, kept: torch.Tensor | None, parts: int
    ) -> torch.Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        batch, channels, height, width = images.shape
        outputs = self._weight.shape[2]
        down, across = (height - 2) // _SIDE, (width - 2) // _SIDE
        of_image, _, of_line, of_pixel = images.stride()
        tiles = images.as_strided(
            (6, 6, batch, down, across, channels), (of_line, of_pixel, of_image, 4 * of_line, 4 * of_pixel, 1)
        )
        result = images.new_empty((batch, height - 2, width - 2, outputs))
        places = _by_tile(result, down, across)
        added = None
        if kept is not None:
            kept = kept.contiguous(memory_format=torch.channels_last)
            added = _by_tile(kept.permute(0, 2, 3, 1), down, across)
        if bias is not None and bias.ndim == 2:
            bias = bias[:, None]

        together = batch // parts
        lines = -(-down // min(down, -(-together * down * across // _AT_ONCE)))  # of tiles, at once
        most = together * lines * across
        one, other = images.new_empty(2, 36 * most * channels).unbind()
        products, half, whole = (images.new_empty(count * most * outputs) for count in (36, 24, 16))
        for begin, first in itertools.product(range(0, batch, together), range(0, down, lines)):
            some, part = slice(begin, begin + together), slice(first, min(first + lines, down))
            count = together * (part.stop - first) * across
            pixels = one[: 36 * count * channels].view(6, -1)
            turned = other[: pixels.numel()].view(6, -1)
            read = tiles[:, :, some, part]
            pixels.view(read.shape).copy_(read)
            torch.mm(_PIXELS, pixels, out=turned)
            torch.bmm(_PIXELS.expand(6, 6, 6), turned.view(6, 6, -1), out=pixels.view(6, 6, -1))
            product = products[: 36 * count * outputs].view(36, count, outputs)
            torch.bmm(pixels.view(36, count, channels), self._weight, out=product)
            if bias is not None:
                product[_ONES].view(together, -1, outputs).add_(bias[some] if bias.ndim == 3 else bias)
            turned = half[: 24 * count * outputs].view(4, -1)
            torch.mm(_BACK, product.view(6, -1), out=turned)
            back = whole[: 16 * count * outputs].view(4, 4, -1)
            torch.bmm(_BACK.expand(4, 4, 6), turned.view(4, 6, -1), out=back)
            place = places[:, :, some, part]
            if added is None:
                place.copy_(back.view(place.shape))
            else:
                torch.add(back.view(place.shape), added[:, :, some, part], out=place)
        return result.permute(0, 3, 1, 2)


def _by_tile(images: torch.Tensor, down: int, across: int) -> torch.Tensor:
    """Images (batch, height, width, channels) as (4, 4, batch, down, across, channels)."""
    batch, channels = len(images), images.shape[3]
    return images.view(batch, down, _SIDE, across, _SIDE, channels).permute(2, 4, 0, 1, 3, 5)


def transformed(weight: torch.Tensor) -> torch.Tensor:
    """Weights (outputs, channels, 3, 3) as (36, channels, outputs)."""
    outputs, channels = weight.shape[:2]
    places = torch.einsum("ij,ocjk,lk->ilco", _WEIGHTS, weight.double(), _WEIGHTS)
    return places.reshape(36, channels, outputs).to(weight.dtype).contiguous()


def gains(layer: nn.Conv2d) -> bool:
    """Whether fewer products, but more passes, are the faster for a 3 x 3 convolution.

    That was measured on AVX2 with MKL. With AVX-512 a processor multiplies twice as fast and reads no faster.
    """
    fast = torch.backends.cpu.get_cpu_capability() == "AVX2" and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return fast and fits(layer, _FEWEST)


def fits(layer: nn.Conv2d, fewest: int) -> bool:
    """Whether a layer is a 3 x 3 convolution on a CPU of at least so many channels, and of not too many weights."""
    fits = min(layer.in_channels, layer.out_channels) >= fewest and layer.in_channels * layer.out_channels <= _MOST
    shaped = layer.kernel_size == (3, 3) and layer.padding == (1, 1) and layer.stride == (1, 1)
    usual = layer.dilation == (1, 1) and layer.groups == 1 and layer.weight.dtype == torch.float32
    return fits and shaped and usual and layer.weight.device.type == "cpu"
