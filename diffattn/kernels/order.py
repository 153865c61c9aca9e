"""The order of the tokens in which a window is dense: tile by tile instead of row by row.

    cell (f, y, x)  ->  tile (f // tf, y // ty, x // tx), then place (f % tf, y % ty, x % tx) within the tile

Both are row-major. Grids that the tile does not divide are padded with zero cells at their ends.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .pattern import Cells, Pattern, Shape, cached, divide, tile_of

LEAST_CELLS = 16
"""Cells below which a block costs more by itself than the pairs it spares (flex on a CPU: 4 x 4 wins, 3 x 3 loses)."""
BLOCK_COST = 32
"""What a block costs beside its cells, in cells. Measured likewise: a pair in 4 x 4 costs twice one in 8 x 8."""


@cached(1024)
def tile_shape(pattern: Pattern, shape: Shape, cells: int, blocks: bool) -> Shape:
    """The tile of `cells` cells (a power of two), sides powers of two, whose windows hold the fewest keys.

    Counted over the padded grid. `blocks`: windows consist of whole tiles. Among equals the wider tile, whose rows are
    longer runs in memory.
    """
    power = int(math.log2(cells))
    sides = [(2**f, 2**y, 2 ** (power - f - y)) for f in range(power + 1) for y in range(power + 1 - f)]

    def cost(tile: Shape) -> int:
        total = 1
        for axis, (size, step) in enumerate(zip(shape, tile, strict=True)):
            spans = (pattern.span(axis, low, min(low + step, size), size) for low in range(0, size, step))
            if blocks:
                spans = ((low // step * step, -(-high // step) * step) for low, high in spans)
            total *= sum(step * (high - low) for low, high in spans)
        return total

    costs = [cost(tile) for tile in sides]
    return sides[costs.index(min(costs))]


@cached(1024)
def whole_tile(pattern: Pattern, shape: Shape, most: int, multiple: int = 1) -> Shape | None:
    """The pattern's tile, or the best of its equal parts with `LEAST_CELLS ... most` cells, a `multiple`; None if none.

    All blocks of such an order see each other wholly or not at all. Best is the fewest cells, padding and the cost of
    the blocks included; among equals the wider part.
    """
    tile = tile_of(pattern)
    if tile is None:
        return None
    tile = min(tile[0], shape[0]), *tile[1:]  # no tile of frames that are not there
    divisors = ([part for part in range(1, side + 1) if side % part == 0] for side in tile)
    every = ((frames, rows, columns) for frames, rows, columns in itertools.product(*divisors))
    parts = [part for part in every if LEAST_CELLS <= math.prod(part) <= most and math.prod(part) % multiple == 0]

    def cost(part: Shape) -> tuple[float, int]:
        blocks = math.prod(-(-size // side) for size, side in zip(shape, part, strict=True))
        return blocks * (math.prod(part) + BLOCK_COST), -part[2]

    return min(parts, key=cost, default=None)


@dataclass(frozen=True)
class TileOrder:
    """Cells of a grid of `shape` (frames, rows, columns) ordered by tiles of `tile`."""

    shape: Shape
    tile: Shape
    paired: bool = False
    """Is the number of tiles in a row of tiles even? Then every two that follow each other are neighbours."""

    @property
    def counts(self) -> Shape:
        """Tiles along frames, rows and columns."""
        frames, rows, columns = (-(-size // step) for size, step in zip(self.shape, self.tile, strict=True))
        return frames, rows, columns + columns % 2 if self.paired else columns

    @property
    def block(self) -> int:
        """Cells of a tile."""
        return math.prod(self.tile)

    @property
    def tiles(self) -> int:
        return math.prod(self.counts)

    @property
    def cells(self) -> int:
        """Cells in tile order, padding included."""
        return self.tiles * self.block

    @property
    def ragged(self) -> bool:
        """Whether there is padding."""
        return self.cells != math.prod(self.shape)

    def _parted(self, cells: Tensor) -> Tensor:
        """`b h cells d` in tile order -> `b h F Y X tf ty tx d`."""
        return cells.unflatten(2, (*self.counts, *self.tile))

    def to_tiles(self, cells: Tensor, extra: Tensor | None = None, missing: int = 0) -> Tensor:
        """Cells `(b, h, cells, d)` from row-major to tile order, padded with zeros, then `extra` `(b, h, e, d)`.

        `missing` zeros are put behind the extra ones.
        """
        grid = cells.unflatten(2, self.shape)
        if self.ragged:
            wide = (count * step - size for count, step, size in zip(self.counts, self.tile, self.shape, strict=True))
            frames, rows, columns = wide
            grid = F.pad(grid, (0, 0, 0, columns, 0, rows, 0, frames))
        sizes = [part for pair in zip(self.counts, self.tile, strict=True) for part in pair]
        source = grid.reshape(*grid.shape[:2], *sizes, grid.shape[-1]).permute(0, 1, 2, 4, 6, 3, 5, 7, 8)
        if extra is None or extra.shape[2] == 0:
            return source.reshape(*cells.shape[:2], self.cells, cells.shape[-1])
        end = self.cells + extra.shape[2]
        out = cells.new_empty(*cells.shape[:2], end + missing, cells.shape[-1])
        self._parted(out[:, :, : self.cells]).copy_(source)
        out[:, :, self.cells : end].copy_(extra)
        out[:, :, end:].zero_()
        return out

    def from_tiles(self, cells: Tensor) -> Tensor:
        """Undo `to_tiles`, without the extra tokens: `(b, h, padded, d)` -> `(b, h, cells, d)`."""
        grid = self._parted(cells).permute(0, 1, 2, 5, 3, 6, 4, 7, 8)
        sizes = [count * step for count, step in zip(self.counts, self.tile, strict=True)]
        grid = grid.reshape(*grid.shape[:2], *sizes, grid.shape[-1])
        frames, rows, columns = self.shape
        return grid[:, :, :frames, :rows, :columns].reshape(*grid.shape[:2], frames * rows * columns, grid.shape[-1])

    def coordinates(self, index: Tensor) -> Cells:
        """Where the cells at `index` of the tile order lie; of padding, coordinates beyond the grid. float32.

        Exact below 2^24 cells in 2^22 tiles, and 2^22 cells where a tile's cells are no power of two. The numbers are
        whole but float: compiled for a CPU, indices are 64-bit integers, whose products and shifts AVX2 lacks (1.6
        times the kernel's time); table look-ups would cost a quarter of it.
        """
        _, rows, columns = self.counts
        deep, high, wide = self.tile
        tile, place = _divmod(index.to(torch.float32), self.block)
        line, column = _divmod(tile, columns)
        inner_line, inner_column = _divmod(place, wide)
        if self.counts[0] * deep == 1:
            return Cells(torch.zeros_like(line), line * high + inner_line, column * wide + inner_column)
        frame, row = _divmod(line, rows)
        inner_frame, inner_row = _divmod(inner_line, high)
        return Cells(frame * deep + inner_frame, row * high + inner_row, column * wide + inner_column)


def _divmod(index: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    quotient = divide(index, divisor)
    return quotient, index - quotient * divisor
