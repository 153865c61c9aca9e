"""Exact attention to the tiles of keys that are chosen by products of means, as a mechanism that others are made of.

    s_I,j = (mean of q in tile I) (mean of k in tile j)          S_I = the tiles j of the largest s_I,j
    out_q = softmax_k(scale * q k^T) v,     k in { other tokens } + { cells of the tiles S_I }

Means are over the cells of a tile that exist and are not hidden; a tile whose cells are all hidden is chosen last.
Every sample and head chooses for itself; among equals the first tile counts. Nothing else is forced, not even the own
tile. Other tokens are seen by all and see all.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...grid import TokenGrid
from ...kernels.dense import combine_masks
from ...kernels.order import TileOrder
from ...kernels.pattern import Shape
from ...kernels.routed import BACKENDS, RoutedCall, routed_call
from ..base import Context, Mechanism, Seen, default_scale, mask_as
from ..parts.exact_tiles import Beside, Sides, attend_tiles, explain_tiles, members, seen_by_tiles, within
from ..softmax import softmax_reference


@dataclass(frozen=True, kw_only=True)
class ChosenTiles(Mechanism):
    """A share of the tiles of keys for each tile of queries."""

    type: ClassVar[str] = "chosen tiles"

    share: float
    """Of the tiles."""
    up: bool
    """Is a share of them rounded up? Else down; at least one is chosen."""
    tile: Shape
    """Sides of a tile of keys."""
    asking: Shape
    """The same of queries."""
    in_a_row: bool = False
    """Are tiles stretches of the cells in the grid's order? Then `tile` and `asking` are (1, 1, cells)."""

    @property
    def backends(self) -> tuple[str, ...]:
        return BACKENDS

    @property
    def leaves_tiles(self) -> bool:
        return True

    def left_tiles(self, grid: TokenGrid) -> tuple[int, int] | None:
        if self.is_exact(grid):
            return None
        return TileOrder(self.laid(grid).shape, self.sides(grid).asking).tiles, self.tiles_in(grid)

    def laid(self, grid: TokenGrid) -> TokenGrid:
        """The grid that is tiled."""
        return replace(grid, frames=1, height=1, width=grid.cells) if self.in_a_row else grid

    def sides(self, grid: TokenGrid) -> Sides:
        """No longer than the grid."""
        shape = self.laid(grid).shape
        tile, _ = within(self.tile, self.tile, shape)
        asking, _ = within(self.asking, self.asking, shape)
        return Sides(asking, tile, tile)

    def tiles_in(self, grid: TokenGrid) -> int:
        """Tiles of keys."""
        return TileOrder(self.laid(grid).shape, self.sides(grid).tile).tiles

    def exact_tiles(self, grid: TokenGrid) -> int:
        """How many tiles of keys each tile of queries has."""
        count = self.tiles_in(grid)
        # a share such as 0.2 is no number of binary digits: 0.2 x 15 tiles are 3
        wanted = math.ceil(self.share * count - 1e-9) if self.up else int(self.share * count)
        return max(1, min(wanted, count))

    def is_exact(self, grid: TokenGrid) -> bool:
        """Are all tiles chosen, so that the result is the plain softmax?"""
        return self.exact_tiles(grid) == self.tiles_in(grid)

    def call(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, scale: float | None, mask: Tensor | None
    ) -> RoutedCall:
        """The call laid out by tiles, with the mean of each."""
        asking, tile, block = self.sides(grid)
        return routed_call(
            q,
            k,
            v,
            self.laid(grid),
            scale=default_scale(q) if scale is None else scale,
            mask=mask,
            tile=tile,
            query_tile=asking,
            block=block,
            chosen=self.exact_tiles(grid),
            given=True,
        )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        backend: str = "auto",
        context: Context = Context(),
        beside: Beside | None = None,
    ) -> Tensor:
        self.check_backend(backend)
        grid.check(q, k)
        if self.is_exact(grid) and beside is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_as(context.mask, q), scale=scale)
        return attend_tiles(
            q,
            k,
            v,
            self.laid(grid),
            scale=scale,
            mask=context.mask,
            backend=backend,
            lay_out=partial(self.call, q, k, v, grid, scale),
            dense=partial(self.reference, grid=grid, scale=scale, context=context),
            beside=beside,
            choose=choose,
        )

    def explain_backend(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, backend: str, context: Context) -> str:
        if self.is_exact(grid):
            return "sdpa: all tiles are chosen"
        return explain_tiles(context.mask, backend, partial(self.call, q, k, v, grid, 1.0))

    def choose(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, scale: float | None = None, context: Context = Context()
    ) -> Tensor:
        """The chosen tiles `(b, h, query tiles, chosen)`."""
        return choose(self.call(q, k, v, grid, scale, mask_as(context.mask, q))).unflatten(0, q.shape[:2])

    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        context: Context = Context(),
        chosen: Tensor | None = None,
    ) -> Tensor:
        """One softmax under a mask; `chosen` None: by `choose`. Memory O(n^2)."""
        chosen = self.choose(q, k, v, grid, scale, context) if chosen is None else chosen
        mask = combine_masks(self._seen(chosen, grid, k)[..., : grid.tokens], mask_as(context.mask, q))
        return softmax_reference(q, k, v, scale=scale, mask=mask)

    def _seen(self, chosen: Tensor, grid: TokenGrid, k: Tensor) -> Tensor:
        """Which keys each query sees, bool `(b, h, tokens, tokens and more)`."""
        picked = torch.zeros(*chosen.shape[:3], self.tiles_in(grid), dtype=torch.bool, device=chosen.device)
        line, sides = self.laid(grid), self.sides(grid)
        return seen_by_tiles(line, sides, picked.scatter_(-1, chosen, True), *members(k, line, sides, None))

    def seen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        context: Context = Context(),
        chosen: Tensor | None = None,
    ) -> Seen:
        chosen = self.choose(q, k, v, grid, scale, context) if chosen is None else chosen
        keys = self._seen(chosen, grid, k)[..., : grid.tokens]
        nothing = torch.zeros(1, 1, 1, 0, dtype=torch.bool)
        return Seen(keys, nothing.expand(-1, -1, grid.tokens, -1), nothing.mT.expand(-1, -1, -1, grid.cells))

    def pairs(self, grid: TokenGrid) -> int:
        """Pairs of tokens that are computed; a tile counts with its padding."""
        if self.is_exact(grid):
            return grid.pairs
        return grid.other_pairs + grid.cells * self.exact_tiles(grid) * math.prod(self.sides(grid).tile)

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, *, context: Context = Context()) -> int:
        """Products of the softmax and of the means."""
        left = self.left_tiles(grid)
        choice = 0 if left is None else 2 * left[0] * left[1]
        return (4 * self.pairs(grid) + choice) * heads * head_dim


@torch.no_grad()
def choose(call: RoutedCall) -> Tensor:
    """The tiles of the largest products of means, `(g, query tiles, chosen)`."""
    scores = mean_queries(call) @ call.block_k.mT
    hidden = hidden_tiles(call)
    scores = scores if hidden is None else scores.masked_fill(hidden[:, None], -torch.inf)
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., : call.chosen]


def mean_queries(call: RoutedCall) -> Tensor:
    """`(g, query tiles, d)`, over the cells that exist."""
    q = call.q.to(call.block_k.dtype)
    if call.real is None:
        return q.mean(2)
    real = call.real.to(q.dtype)[..., None]
    return (q * real).sum(2) / real.sum(1)


def hidden_tiles(call: RoutedCall) -> Tensor | None:
    """Which tiles have no cell that is seen, bool `(g, tiles)`; None where nothing is hidden."""
    return None if call.bias is None else (call.bias == -torch.inf).all(-1)
