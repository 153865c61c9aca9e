"""Tile order: a permutation with padding, and coordinates that agree with it."""

import math

import pytest
import torch

from diffattn.kernels.order import TileOrder, tile_shape

ORDERS = [
    TileOrder((1, 8, 16), (1, 4, 8)),
    TileOrder((1, 7, 9), (1, 4, 8)),
    TileOrder((3, 5, 6), (2, 2, 4)),
    TileOrder((1, 1, 1), (1, 4, 8)),
    TileOrder((1, 300, 7), (1, 32, 1)),
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
    order = TileOrder((1, 4095, 8191), (1, 4, 8))
    index = torch.randint(order.cells, (100_000,), generator=torch.Generator().manual_seed(0))
    tile, place = index // 32, index % 32
    _, row, column = order.coordinates(index)
    assert torch.equal(row.long(), tile // 1024 * 4 + place // 8)
    assert torch.equal(column.long(), tile % 1024 * 8 + place % 8)


@pytest.mark.parametrize(
    ("shape", "radius", "cells", "expected"),
    [((1, 128, 128), 8, 32, (1, 4, 8)), ((1, 1, 500), 8, 32, (1, 1, 32)), ((1, 500, 1), 8, 32, (1, 32, 1))],
)
def test_the_tile_follows_the_grid(disc, shape, radius, cells, expected):
    assert tile_shape(disc(radius), shape, cells, True) == expected
