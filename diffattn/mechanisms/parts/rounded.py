"""A window rounded out to whole tiles, with the means of all others: `pool` of `clear`, `halo` and `neighborhood`.

    S_I   = the tiles in which any query of tile I sees any cell by the window
    out_q = softmax(l of all other tokens, l of the tiles in S_I, L of the blocks outside S_I) . (v, v, v_b)
    l_q,k = scale * q k^T        L_q,b = scale * q k_b + log c_b,    k_b, v_b = means of the c_b cells of block b

No tile is seen in part: nothing is dropped and nothing counts twice.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from diffattn.grid import TokenGrid
from diffattn.kernels.order import TileOrder
from diffattn.kernels.pattern import Pattern
from diffattn.kernels.routed import Lists, RoutedCall, routed_call, touched_lists
from diffattn.kernels.routed.lists import cells_of_tiles

from ..base import Context, mask_as
from ..softmax import softmax_reference
from .axes import PerAxis, per_axis
from .exact_tiles import (
    Beside,
    Sides,
    attend_tiles,
    explain_tiles,
    members,
    reference_tiles,
    seen_by_tiles,
    within,
)
from .pool_weights import Weighing


@dataclass(frozen=True)
class RoundedWindow:
    """A window on a grid, rounded out."""

    pattern: Pattern
    grid: TokenGrid
    sides: Sides

    @classmethod
    def on(cls, grid: TokenGrid, pattern: Pattern, pool: PerAxis, tile: PerAxis | None = None) -> "RoundedWindow":
        """With tiles of `tile`, or of one block each."""
        block = per_axis(pool, 1)
        own, block = within(block if tile is None else per_axis(tile, 1), block, grid.shape)
        return cls(pattern, grid, Sides(own, own, block))

    @property
    def tiles(self) -> int:
        return TileOrder(self.grid.shape, self.sides.tile).tiles

    @property
    def blocks(self) -> int:
        return self.tiles * self.sides.blocks_per_tile

    def lists(self, device: torch.device) -> Lists:
        return touched_lists(self.pattern, self.grid.shape, self.sides.tile, device)

    @property
    def is_exact(self) -> bool:
        """Does every tile see every tile, so that the result is the plain softmax?"""
        counts = self.lists(torch.device("cpu")).counts
        return counts[0] == len(counts)

    def pairs(self) -> int:
        """All pairs of tokens that are computed, blocks counted as a key each."""
        grid = self.grid
        if self.is_exact:
            return grid.pairs
        rows, tiles, _ = self.lists(torch.device("cpu"))
        cells = F.pad(cells_of_tiles(grid.shape, self.sides.tile), (0, 1))
        exact = int((cells[rows] * cells[tiles].sum(1)).sum())
        return exact + grid.cells * self.blocks + grid.other_pairs

    def call(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, weighing: Weighing | None, mask: Tensor | None
    ) -> RoutedCall:
        return routed_call(
            q,
            k,
            v,
            self.grid,
            scale=scale,
            mask=mask,
            tile=self.sides.tile,
            query_tile=self.sides.asking,
            block=self.sides.block,
            chosen=self.lists(q.device),
            weigh=None if weighing is None else partial(weighing.logits, block=self.sides.block, scale=scale),
        )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        backend: str,
        context: Context,
        weighing: Weighing | None = None,
        beside: Beside | None = None,
    ) -> Tensor:
        self.grid.check(q, k)
        if self.is_exact:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_as(context.mask, q), scale=scale)
        return attend_tiles(
            q,
            k,
            v,
            self.grid,
            scale=scale,
            mask=context.mask,
            backend=backend,
            lay_out=partial(self.call, q, k, v, scale, weighing),
            dense=partial(self.reference, scale=scale, context=context, weighing=weighing),
            beside=beside,
        )

    def explain(self, q: Tensor, k: Tensor, v: Tensor, backend: str, context: Context) -> str:
        if self.is_exact:
            return "sdpa: the window covers the grid"
        return explain_tiles(context.mask, backend, partial(self.call, q, k, v, 1.0, None))

    def picked(self, device: torch.device) -> Tensor:
        """Which tiles each tile has exactly, bool `(tiles, tiles)`."""
        rows, tiles, counts = self.lists(device)
        picked = torch.zeros(len(counts), len(counts) + 1, dtype=torch.bool, device=device)
        picked[rows[:, None], tiles] = True
        return picked[:, :-1]

    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        context: Context,
        weighing: Weighing | None = None,
    ) -> Tensor:
        if self.is_exact:
            return softmax_reference(q, k, v, scale=scale, mask=context.mask)
        picked = self.picked(q.device)[None, None]
        return reference_tiles(
            q, k, v, self.grid, self.sides, picked, scale=scale, mask=context.mask, weighing=weighing
        )

    def mask(self) -> Tensor:
        """Dense boolean `(tokens, tokens + blocks)`: keys, then means; other tokens see no means."""
        if self.is_exact:
            return torch.ones(self.grid.tokens, self.grid.tokens, dtype=torch.bool)
        tiles, blocks = members(torch.zeros(()), self.grid, self.sides, None)
        picked = self.picked(torch.device("cpu"))[None, None]
        return seen_by_tiles(self.grid, self.sides, picked, tiles, blocks)[0, 0]

    def members(self) -> Tensor:
        """Which cells are in each block, bool `(1, 1, blocks, cells)`."""
        return members(torch.zeros(()), self.grid, self.sides, None)[1] > 0
