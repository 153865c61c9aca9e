"""A VAE run tile by tile."""

import pytest
import torch
import torch.nn.functional as F
from diffattn.pipelines.pixel_aware_sr.sampling.vae_tiles import PaddedTile, padded_tiles, run_in_tiles
from torch import Tensor

from diffattn.media.windows import Tile

INPUTS = [(1, 1), (30, 31), (33, 40), (200, 150), (7, 300), (300, 7), (131, 97)]
"""Latent cells."""


def inside(small: Tile, large: Tile, margin: int, height: int, width: int) -> bool:
    """Whether `large` reaches `margin` beyond `small` on every side, or to the edge of the image."""
    top, left = max(0, small.top - margin), max(0, small.left - margin)
    bottom, right = (
        min(side, end + margin) for side, end in ((height, small.top + small.height), (width, small.left + small.width))
    )
    return large == Tile(top, left, bottom - top, right - left)


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize(("height", "width"), INPUTS)
@pytest.mark.parametrize("tile_size", [8, 24, 64])
def test_tiles_write_every_cell_once_and_read_a_margin_more(
    height: int, width: int, tile_size: int, decoder: bool
) -> None:
    margin = 11 if decoder else 32
    hits = torch.zeros(height, width, dtype=torch.int64)
    cut = padded_tiles(height, width, tile_size, decoder=decoder)
    for tile in cut:
        assert min(tile.write.height, tile.write.width) > 0
        assert inside(tile.write, tile.read, margin, height, width)
        assert max(tile.read.height, tile.read.width) <= tile_size + 2 * margin
        hits[tile.write.slices] += 1
    assert int(hits.min()) == int(hits.max()) == 1
    assert (len(cut) == 1) == (max(height, width) <= tile_size + 2 * margin)


def test_tiles_shrink_to_a_round_size() -> None:
    def lengths(length: int, tile_size: int) -> list[int]:
        return [tile.write.height for tile in padded_tiles(length, 1, tile_size, decoder=True)]

    assert lengths(22 + 130, 64) == [11 + 64, 64, 2 + 11]  # 44 each, up to a multiple of 32
    assert lengths(22 + 90, 48) == [11 + 48, 42 + 11]  # 45 each: 64 is too much, 48 is not
    assert lengths(22 + 85, 43) == [11 + 43, 42 + 11]  # 43 each: only itself will do


def vae_decoder(x: Tensor) -> Tensor:
    """A convolution that sees 5 cells each way, and 8 times the side."""
    kernel = torch.randn(2, 3, 11, 11, generator=torch.Generator().manual_seed(0)) / 11
    return F.interpolate(F.conv2d(x, kernel, padding=5), scale_factor=8, mode="nearest")


def vae_encoder(x: Tensor) -> Tensor:
    """Three halvings as in Stable Diffusion's encoder, padded below and to the right, then 3 x 3 cells."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        kernel = torch.randn(3, 3, 3, 3, generator=generator) / 5
        x = F.conv2d(F.pad(x, (0, 1, 0, 1)), kernel, stride=2)
    return F.conv2d(x, torch.randn(2, 3, 3, 3, generator=generator) / 5, padding=1)


@pytest.mark.parametrize(
    ("call", "decoder", "rows", "columns", "tile_size"),
    [
        (vae_decoder, True, 50, 33, 16),
        (vae_decoder, True, 12, 60, 20),
        (vae_decoder, True, 9, 8, 16),
        (vae_encoder, False, 200, 136, 64),
        (vae_encoder, False, 203, 150, 64),
        (vae_encoder, False, 40, 301, 96),
    ],
)
def test_tiles_give_what_the_whole_gives(call, decoder: bool, rows: int, columns: int, tile_size: int) -> None:
    x = torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(2))
    tiles = padded_tiles(rows, columns, tile_size, decoder=decoder)
    got = run_in_tiles(call, x, tiles, 8 if decoder else 1 / 8)
    torch.testing.assert_close(got, call(x), atol=1e-5, rtol=1e-5)


def test_a_tile_needs_its_margin() -> None:
    x = torch.randn(1, 3, 50, 33, generator=torch.Generator().manual_seed(2))
    bare = [PaddedTile(tile.write, tile.write) for tile in padded_tiles(50, 33, 16, decoder=True)]
    assert float((run_in_tiles(vae_decoder, x, bare, 8) - vae_decoder(x)).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("height", "width", "tile_size", "decoder"),
    [(0, 5, 8, True), (5, 0, 8, True), (5, 5, 0, True), (5, 5, -8, False), (900, 900, 500, False)],
)
def test_wrong_tiles_are_refused(height: int, width: int, tile_size: int, decoder: bool) -> None:
    with pytest.raises(ValueError, match=f"got {height} x {width} and {tile_size}; 1024 pixels"):
        padded_tiles(height, width, tile_size, decoder=decoder)


def test_a_wrong_scale_or_no_tile_is_refused() -> None:
    x = torch.zeros(1, 3, 50, 33)
    with pytest.raises(ValueError, match="expected 152 x 132 cells for a tile of 38 x 33; got 304 x 264"):
        run_in_tiles(vae_decoder, x, padded_tiles(50, 33, 16, decoder=True), 4)
    with pytest.raises(ValueError, match="at least one tile"):
        run_in_tiles(vae_decoder, x, [], 8)
