"""Convolutions of SDXL get the tiles that were the fastest on an H200."""

import pytest

from server.acceleration.kernels import tiles


@pytest.mark.parametrize(
    ("pixels", "channels", "in_fp8", "rows", "columns", "split"),
    [
        (2 * 128 * 128, 320, True, 128, 320, 1),
        (2 * 64 * 64, 640, True, 128, 320, 1),
        (2 * 32 * 32, 1280, True, 64, 320, 1),
        (16 * 32 * 32, 1280, True, 128, 320, 1),
        (2 * 128 * 128, 384, True, 128, 128, 1),
        (2 * 64 * 64, 768, True, 64, 256, 1),
        (2 * 32 * 32, 1536, True, 128, 192, 1),
        (2 * 16 * 16, 1536, True, 64, 192, 2),
        (2 * 128 * 128, 320, False, 128, 320, 1),
        (2 * 32 * 32, 1280, False, 128, 320, 2),
        (2 * 128 * 128, 384, False, 256, 128, 1),
        (2 * 16 * 16, 1536, False, 128, 192, 4),
    ],
)
def test_convolutions_of_sdxl_get_the_fastest_tiles(
    pixels: int, channels: int, in_fp8: bool, rows: int, columns: int, split: int
):
    tile = tiles.choose(pixels, channels, channels, 3, in_fp8)
    assert (tile.rows, sum(tile.columns), tile.split) == (rows, columns, split)


@pytest.mark.parametrize("in_fp8", [True, False])
@pytest.mark.parametrize(("pixels", "channels"), [(2 * 32 * 32, 1280), (2 * 16 * 16, 1536)])
def test_four_phases_get_the_tile_of_four_times_as_many_pixels(pixels: int, channels: int, in_fp8: bool):
    phases = tiles.choose(pixels, channels, channels, 2, in_fp8)
    assert phases == tiles.choose(4 * pixels, channels, channels, 3, in_fp8)
    assert phases != tiles.choose(pixels, channels, channels, 3, in_fp8)


@pytest.mark.parametrize(
    ("pixels", "channels", "outputs", "one_wave"),
    [
        (2 * 64 * 64, 640, 640, True),
        (2 * 64 * 64, 320, 640, True),
        (2 * 64 * 64, 768, 768, True),
        (2 * 32 * 32, 1536, 1536, True),
        (2 * 128 * 128, 320, 320, False),
        (2 * 32 * 32, 1280, 1280, False),
        (2 * 16 * 16, 1536, 1536, False),
        (2 * 32 * 32, 96, 96, False),
    ],
)
def test_convolutions_that_were_faster_than_cudnn_fill_one_wave(
    pixels: int, channels: int, outputs: int, one_wave: bool
):
    assert tiles.fills_one_wave(pixels, channels, outputs) is one_wave


@pytest.mark.parametrize("in_fp8", [True, False])
def test_tiles_fit_into_the_shared_memory_of_hopper(in_fp8: bool):
    for tile in tiles.FP8_TILES if in_fp8 else tiles.HALF_TILES:
        assert tile.stages * (tile.rows + sum(tile.columns)) * tile.depth * (1 if in_fp8 else 2) <= 227 * 1024
