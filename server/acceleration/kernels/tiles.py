"""The choice of a tile for the Triton convolution, by how well it fills a GPU."""

from typing import NamedTuple

_MULTIPROCESSORS = 132  # of an H100 and an H200; assumed of every GPU, so that all split sums alike
_SPLITS = (1, 2, 3, 4)
_COST_OF_SPLIT = 0.1  # of the time, for each split above one
_MIN_FILLED = 0.9  # of the multiprocessors, for a single wave to be faster than cuDNN


class Tile(NamedTuple):
    """How programs share a convolution: each has `rows` x `columns` outputs and adds `depth` products at a time.

    Columns are the sum of two powers of two, of which the second may be 0: the widths of SDXL are multiples of 320 or
    192. Consecutive programs take `group` tiles of rows in turn, to read what is in the cache. With `split` > 1 so many
    programs share the sums of a tile, and a second kernel adds these.
    """

    rows: int
    columns: tuple[int, int]
    depth: int
    group: int
    split: int
    warps: int
    stages: int


# The fastest on an H200 for 3 x 3 weights of the widths of SDXL, with lines of 64 or 128 bytes for the depth.
FP8_TILES = (
    Tile(128, (256, 64), 64, group=8, split=1, warps=8, stages=6),
    Tile(64, (256, 64), 128, group=8, split=1, warps=4, stages=4),
    Tile(64, (256, 0), 128, group=8, split=1, warps=4, stages=4),
    Tile(128, (128, 0), 128, group=8, split=1, warps=4, stages=3),
    Tile(128, (128, 64), 128, group=8, split=1, warps=8, stages=4),
    Tile(64, (128, 64), 128, group=8, split=1, warps=4, stages=4),
)
HALF_TILES = (
    Tile(128, (256, 64), 64, group=8, split=1, warps=8, stages=3),
    Tile(256, (128, 0), 64, group=8, split=1, warps=8, stages=4),
    Tile(256, (128, 64), 64, group=8, split=1, warps=8, stages=4),
    Tile(128, (128, 64), 64, group=8, split=1, warps=8, stages=4),
)


def phase_count(kernel_size: int) -> int:
    """Return the number of convolutions in one: 4 of 2 x 2 weights for an image enlarged to twice its sides, else 1."""
    return 4 if kernel_size == 2 else 1


def step_count(tile: Tile, channels: int, kernel_size: int) -> int:
    """Return the number of steps in which the sums of a tile are added. Each step stays in one line of the weight."""
    return kernel_size * _ceil_div(kernel_size * channels, tile.depth)


def tile_count(tile: Tile, pixels: int, outputs: int, kernel_size: int) -> int:
    """Return the number of tiles for a number of pixels and of output channels."""
    down, across = _ceil_div(pixels, tile.rows), _ceil_div(outputs, sum(tile.columns))
    return down * across * phase_count(kernel_size)


def choose(pixels: int, channels: int, outputs: int, kernel_size: int, in_fp8: bool) -> Tile:
    """Choose the tile that gives the busiest multiprocessor the least work.

    All tiles of the tables take about as long for one output, so only how well they fill outputs and multiprocessors
    counts. The first of equals is chosen.
    """

    def work(tile: Tile) -> float:
        waves = _ceil_div(tile_count(tile, pixels, outputs, kernel_size) * tile.split, _MULTIPROCESSORS)
        cost_of_split = 1 + _COST_OF_SPLIT * (tile.split - 1)
        return waves * tile.rows * sum(tile.columns) / tile.split * cost_of_split

    tiles = (tile._replace(split=split) for tile in (FP8_TILES if in_fp8 else HALF_TILES) for split in _SPLITS)
    return min((tile for tile in tiles if step_count(tile, channels, kernel_size) % tile.split == 0), key=work)


def fills_one_wave(pixels: int, channels: int, outputs: int) -> bool:
    """Return whether a 3 x 3 convolution in half precision has about one tile for each multiprocessor.

    Then the kernel is a tenth faster than cuDNN, and fuses the bias and the residual.
    """
    tile = choose(pixels, channels, outputs, 3, in_fp8=False)
    tiles = tile_count(tile, pixels, outputs, 3)
    return tile.split == 1 and _MIN_FILLED * _MULTIPROCESSORS < tiles <= _MULTIPROCESSORS


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
