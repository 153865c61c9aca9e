"""Tiles that a window touches: a choice that geometry makes, the same for all samples and heads."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..block_mask import touched_blocks
from ..order import TileOrder
from ..pattern import Pattern, Shape, cached


class Lists(NamedTuple):
    """Which tiles each tile of queries has exactly; those with as many lie together."""

    rows: Tensor  # query-tiles: their numbers on the grid, in the order of the lists
    tiles: Tensor  # query-tiles most: behind its own count, each row has the number of tiles, which is none of them
    counts: tuple[int, ...]
    """Exact tiles of each tile of queries, ascending."""


@cached(32)
def touched_lists(pattern: Pattern, shape: Shape, tile: Shape, device: torch.device) -> Lists:
    """Of each tile the tiles in which any of its cells sees any cell. Time O(tiles x reach)."""
    order = TileOrder(shape, tile)
    keys, seen, _ = touched_blocks(pattern, order)
    counts = seen.sum(1)
    rows = counts.argsort(stable=True)
    first = (~seen).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(counts.max())]
    tiles = keys.gather(1, first).long().masked_fill(~seen.gather(1, first), order.tiles)
    return Lists(rows.to(device), tiles[rows].to(device), tuple(counts[rows].tolist()))


def cells_of_tiles(shape: Shape, tile: Shape) -> Tensor:
    """Cells of each tile without padding, `(tiles,)`."""
    sizes = [
        torch.tensor([min(step, size - low) for low in range(0, size, step)])
        for size, step in zip(shape, tile, strict=True)
    ]
    return torch.einsum("f,y,x->fyx", *sizes).flatten()
