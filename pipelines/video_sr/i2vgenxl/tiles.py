"""Tiles of a frame's latents, spread evenly, and the blend of what was computed in each.

    w(y, x) = r(y) r(x),    r(i) = min(i + 1, n - i)        in a tile of n places along an axis

Where two neighbours overlap by o places, w normalised is the linear cross-fade 1/(o+1), .., o/(o+1).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffattn.media.windows import Tile, blend_tiles, starts


def spread_tiles(height: int, width: int, rows: int, columns: int, overlap: int) -> list[Tile]:
    """Tiles of `rows` x `columns`, or of the whole side where that is shorter, row by row.

    Every tile has the same size, so one that a network takes stays so wherever it begins.
    """
    tops, lefts = starts(height, rows, overlap, even=True), starts(width, columns, overlap, even=True)
    return [Tile(top, left, min(rows, height), min(columns, width)) for top in tops for left in lefts]


def run_in_tiles(call: Callable[[Tile], Tensor], tiles: Sequence[Tile], scale: int = 1) -> Tensor:
    """What `call` gives for each tile, blended; one tile is left as it is.

    Args:
        call: takes a tile to `(.., scale rows, scale columns)`.
        tiles: of one size, as from `spread_tiles`.
    """
    if len(tiles) == 1:
        return call(tiles[0])
    places = [tile.scaled(scale) for tile in tiles]
    weights = torch.outer(_ramp(places[0].height), _ramp(places[0].width))
    last = places[-1]
    return blend_tiles(map(call, tiles), places, weights, last.top + last.height, last.left + last.width)


def _ramp(size: int) -> Tensor:
    place = torch.arange(size, dtype=torch.float64)
    return torch.minimum(place + 1, size - place)
