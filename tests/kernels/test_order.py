"""Tile order: a permutation with padding, and coordinates that agree with it."""

import math

import pytest
import torch

from diffattn.kernels.order import TileOrder, tile_shape, whole_tile

ORDERS = [
    TileOrder((1, 8, 16), (1, 4, 8)),
    TileOrder((1, 7, 9), (1, 4, 8)),
    TileOrder((3, 5, 6), (2, 2, 4)),
    TileOrder((1, 1, 1), (1, 4, 8)),
    TileOrder((1, 300, 7), (1, 32, 1)),
    TileOrder((7, 13, 11), (3, 5, 6)),
    TileOrder((1, 12, 18), (1, 6, 6)),
]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_cells_lie_where_the_coordinates_say(order):
    _, rows, columns = order.shape
    cells = torch.arange(1, math.prod(order.shape) + 1, dtype=torch.float64).view(1, 1, -1, 1)
    tiled = order.to_tiles(cells).flatten()
    frame, row, column = order.coordinates(torch.arange(order.cells))
    inside = (frame < order.shape[0]) & (row < rows) & (column < columns)
    assert torch.equal(tiled, torch.where(inside, (frame * rows + row) * columns + column + 1, 0).double())


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_from_tiles_undoes_to_tiles(order):
    cells = torch.randn(2, math.prod(order.shape), 3, 4).transpose(1, 2)
    extra = torch.randn(2, 3, 5, 4)
    tiled = order.to_tiles(cells, extra)
    assert torch.equal(order.from_tiles(tiled[:, :, : order.cells]), cells)
    assert torch.equal(tiled[:, :, order.cells :], extra)


def test_coordinates_are_exact_on_the_largest_grids():
    order = TileOrder((1, 2047, 8191), (1, 4, 8))
    index = torch.randint(order.cells, (100_000,), generator=torch.Generator().manual_seed(0))
    tile, place = index // 32, index % 32
    _, row, column = order.coordinates(index)
    assert torch.equal(row.long(), tile // 1024 * 4 + place // 8)
    assert torch.equal(column.long(), tile % 1024 * 8 + place % 8)


@pytest.mark.parametrize("tile", [(1, 4, 8), (1, 8, 6)], ids=str)
def test_coordinates_are_exact_on_many_cells(tile):
    order = TileOrder((1, 2032, 2040), tile)
    index = torch.randint(order.cells, (100_000,), generator=torch.Generator().manual_seed(0))
    block, wide = order.block, tile[2]
    across = order.counts[2]
    _, row, column = order.coordinates(index)
    assert torch.equal(row.long(), index // block // across * tile[1] + index % block // wide)
    assert torch.equal(column.long(), index // block % across * wide + index % block % wide)


@pytest.mark.parametrize(
    ("tile", "shape", "most", "multiple", "expected"),
    [
        ((1, 8, 8), (1, 96, 96), 256, 1, (1, 8, 8)),
        ((8, 8, 8), (1, 96, 96), 256, 1, (1, 8, 8)),  # an image has no frames to fill
        ((6, 8, 8), (30, 48, 80), 128, 128, (2, 8, 8)),
        ((1, 8, 8), (1, 96, 96), 128, 128, None),
        ((1, 64, 64), (1, 128, 128), 256, 1, (1, 4, 64)),  # equal cost: the widest
        ((1, 64, 64), (1, 40, 40), 256, 1, (1, 8, 16)),
        ((1, 3, 3), (1, 96, 96), 256, 1, None),
    ],
)
def test_the_blocks_of_a_rule_on_tiles_are_parts_of_its_tiles(tile, shape, most, multiple, expected, bricks):
    assert whole_tile(bricks(tile, 1), shape, most, multiple) == expected


def test_rules_on_no_tiles_have_no_whole_blocks(disc, lattice):
    assert whole_tile(disc(8), (1, 96, 96), 256) is None
    assert whole_tile(lattice(8), (1, 96, 96), 256) is None


@pytest.mark.parametrize(
    ("shape", "radius", "cells", "expected"),
    [((1, 128, 128), 8, 32, (1, 4, 8)), ((1, 1, 500), 8, 32, (1, 1, 32)), ((1, 500, 1), 8, 32, (1, 32, 1))],
)
def test_the_tile_follows_the_grid(disc, shape, radius, cells, expected):
    assert tile_shape(disc(radius), shape, cells, True) == expected
