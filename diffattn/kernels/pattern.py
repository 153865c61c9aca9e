"""What a window pattern tells the kernels: which cell may see which, and how far.

The kernels know nothing of mechanisms. A pattern is a rule on cell coordinates plus its reach; everything else (tiles,
blocks, masks, gathering) follows from these two.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..grid import TokenGrid


class Cells(NamedTuple):
    """Coordinates of some cells: three integer tensors of one broadcastable shape."""

    frame: Tensor
    row: Tensor
    column: Tensor


class Pattern(Protocol):
    """A local rule on the cells of a grid. Must be hashable: kernels cache what they derive from it."""

    def allowed(self, query: Cells, key: Cells) -> Tensor:
        """May `query` see `key`? Elementwise boolean over the broadcast shape; traceable by torch.compile."""
        ...

    def span(self, axis: int, low: int, high: int, size: int) -> tuple[int, int]:
        """Half-open range of keys on `axis` (0 frames, 1 rows, 2 columns) that queries `low ... high-1` may see.

        It may be too wide, never too narrow, and lies within `0 ... size`.
        """
        ...

    def pairs(self, grid: TokenGrid) -> int:
        """How many pairs of cells see each other, counted without visiting them all."""
        ...


def dense_mask(pattern: Pattern, grid: TokenGrid, pooled: int = 0) -> Tensor:
    """The pattern as a boolean `(tokens, tokens + pooled)`: cells by the rule, other tokens see and are seen by all.

    `pooled` keys at the end are seen by the cells only. Time and memory O(n m): small grids, and the reference.
    """
    query, key = (Cells(*(axis.view(shape) for axis in grid.positions())) for shape in ((-1, 1), (1, -1)))
    mask = torch.ones(grid.tokens, grid.tokens + pooled, dtype=torch.bool)
    mask[grid.cell_slice, grid.cell_slice] = pattern.allowed(query, key)
    mask[: grid.before, grid.tokens :] = False
    mask[grid.before + grid.cells :, grid.tokens :] = False
    return mask
