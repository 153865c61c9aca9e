"""Routing attention: tiles of keys chosen by content are exact, all others count by the means of their blocks.

    l_q,k = scale * q k^T        L_q,b = scale * q k_b + log c_b,    k_b, v_b = means of the c_b cells of block b
    P_I,b = mean over the queries q of tile I of softmax(L_q,b joined with the exact logits of the other tokens)
    W_I,j = sum over the blocks b of tile j of P_I,b sqrt(scale^2 mean_q(q^2) . var_k(b)) sqrt(sum_d var_v(b))
    S_I   = the tiles that I lies on, then those of the largest W_I,j, until there are as many as `share` allows
    out_q = softmax(l of all other tokens, l of the tiles in S_I, L of the blocks outside S_I) . (v, v, v_b)

Queries off the grid see everything exactly. Nothing is dropped and nothing counts twice: what W foresees is the error
that the means make, so it is spent where it is least. No training is needed.

With `means="weighted"` k_b and v_b, and with them var_k and var_v, weigh the keys of a block by w = softmax(l) for the
mean query of the grid's cells, and in place of log c_b stands the entropy of w. That is exact for this query, and right
to first order around it: L_q,b = log sum exp(l_q,k) there. Even weights have the entropy log c_b. With
`means="learned"` w are trained weights, which begin even (`parts/pool_weights.py`).

Sources: the choice of tiles by their means, Zhu et al., BiFormer, https://arxiv.org/abs/2303.08810; what is not chosen
kept by its means, Chen et al., Core Context Aware Transformers, https://arxiv.org/abs/2412.12465, there weighed within
each group, and without the entropy or the number of keys in the logit; keys ordered by content, Roy et al., Routing
Transformers, https://arxiv.org/abs/2003.05997, there by clusters of unequal size, here by a balanced k-d tree or by
centroids with tiles of one size.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import register
from ..grid import TokenGrid
from ..kernels.order import TileOrder
from ..kernels.pattern import Shape
from ..kernels.routed import BACKENDS, RoutedCall, centroid_order, choose_tiles, content_order, routed_call
from ..options import Must, at_least
from .base import Context, Mechanism, Seen, default_scale, mask_as
from .parts.axes import PerAxis, check_divides, halved, most_own, per_axis, sizes
from .parts.exact_tiles import (
    Beside,
    Sides,
    any_query,
    attend_tiles,
    explain_tiles,
    members,
    reference_tiles,
    seen_by_tiles,
    within,
)
from .parts.pool_weights import PoolWeights, weighing_of
from .softmax import softmax_reference

TILE, BLOCK = 8, 4
"""Sides of tiles and blocks unless told otherwise. They have the tokens of one frame: at 9 x 24 x 24 tokens tiles of
(1, 8, 8) left half the error of (8, 8, 8), at 35% and at 15% of all pairs (a small Wan model in training)."""
LINE_TILE, LINE_BLOCK = 64, 16
"""The same on a single row of one frame, such as audio: as many tokens."""
SHARE = Must("a number above 0 and at most 1", lambda share: 0 < share <= 1)


@register("routing")
@dataclass(frozen=True, kw_only=True)
class RoutingAttention(Mechanism):
    """Attention to the tiles that matter and to the means of all others. Time O(share n^2 d), memory O(n d).

    >>> RoutingAttention(share=0.3).exact_tiles(TokenGrid(64, 64, before=512))
    3
    """

    joins_grids: ClassVar[bool] = True

    share: Annotated[float, SHARE] = 0.35
    """Of all pairs of tokens, at most: those with other tokens, with keys of chosen tiles, and with blocks. 1: all."""
    top_k: Annotated[int | None, at_least(1)] = None
    """Tiles that each tile of queries has exactly; then `share` is not looked at."""
    top_share: Annotated[float | None, SHARE] = None
    """The same as a share of all tiles, and at least the tiles that it lies on: fits every size and text."""
    tile: Annotated[PerAxis | None, sizes(1)] = None
    """Sides of a tile of keys in tokens: (rows, columns), (frames, rows, columns), or one int for all of them. None:
    8 x 8 of one frame, or of as many frames as a block has, and 64 of a single row."""
    query_tile: Annotated[PerAxis | None, sizes(1)] = None
    """The same of the queries that choose together; None: `tile`. Larger ones are faster and choose less well."""
    pool: Annotated[PerAxis | None, sizes(1)] = None
    """The same of a block, whose keys and values have one mean; it divides the tile. None: 4 x 4 of one frame, or 16
    of a single row, or a side of the tile that these do not divide."""
    blocks: Annotated[int | None, at_least(1)] = None
    """The same as a number: the tile halved along each axis for as long as the grid has no more blocks than these.
    With `top_share`, what is computed beside the tiles grows like the grid and no longer like its square."""
    order: Literal["space", "content", "centroids"] = "space"
    """Tiles of neighbouring keys, or of keys that are alike: by a k-d tree on the keys of each head, or by centroids
    that are kept from step to step."""
    refresh: Annotated[int, at_least(1)] = 1
    """Calls of a layer, one a step, for which an order by content is kept: more are faster, and fit less well."""
    decay: Annotated[float, Must("a number from 0 to 1", lambda decay: 0 <= decay <= 1)] = 0.5
    """How much of themselves centroids keep at each new order; 0: they are the means of the keys of the last one."""
    chosen_by: Literal["queries", "mean"] = "queries"
    """Whose weights P count in the choice: those of all queries of a tile, or of their mean, which takes a fraction of
    the time and chooses less well."""
    means: Literal["even", "weighted", "learned"] = "even"
    """The means of a block: all its keys alike, by their weights for the mean query of the head, or by trained weights.
    Those need the sides of a block, `pool`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k is not None and self.top_share is not None:
            raise ValueError(f"routing: give top_k={self.top_k} or top_share={self.top_share}, not both")
        if self.pool is not None and self.blocks is not None:
            raise ValueError(f"routing: give pool={self.pool} or blocks={self.blocks}, not both")
        if self.means == "learned" and (self.pool is None or self.order != "space"):
            raise ValueError(
                f"routing: means='learned' has a weight for each place in a block, got pool={self.pool}, "
                f"order={self.order}; give the sides of a block by pool=, and leave order= out"
            )
        tile, pool = self._tile_and_block(TILE, BLOCK)
        check_divides(self.type, tile if self.tile is None else self.tile, pool if self.pool is None else self.pool)

    @property
    def approximates(self) -> bool:
        return True

    @property
    def scales(self) -> bool:
        return self.top_k is None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"memory"} if self.order != "space" else ())

    @property
    def backends(self) -> tuple[str, ...]:
        return BACKENDS

    def _tile_and_block(self, tile_side: int, block_side: int) -> tuple[Shape, Shape]:
        """Sides of a tile and of a block on an endless grid; those given are for what the options leave open."""
        frames = 1 if self.pool is None else per_axis(self.pool, 1)[0]
        tile = (frames, tile_side, tile_side) if self.tile is None else per_axis(self.tile, 1)
        if self.pool is not None:
            return tile, per_axis(self.pool, 1)
        rows, columns = (side if side % block_side else block_side for side in tile[1:])
        return tile, (1, rows, columns)

    def sides(self, grid: TokenGrid) -> Sides:
        """Sides of the query tiles, the tiles and the blocks on a grid: no longer than the grid."""
        is_line = grid.frames == grid.height == 1
        whole, block = self._tile_and_block(*((LINE_TILE, LINE_BLOCK) if is_line else (TILE, BLOCK)))
        if self.blocks is not None:
            block = halved(whole, grid.shape, self.blocks)
        tile, pool = within(whole, block, grid.shape)
        asking = whole if self.query_tile is None else per_axis(self.query_tile, 1)
        frames, rows, columns = (min(side, most) for side, most in zip(asking, grid.shape, strict=True))
        return Sides((frames, rows, columns), tile, pool)

    def tiles_in(self, grid: TokenGrid) -> int:
        """How many tiles of keys a grid has; in an order by content none is cut but the last."""
        tile = self.sides(grid).tile
        if self.order != "space":
            return -(-grid.cells // math.prod(tile))
        return TileOrder(grid.shape, tile).tiles

    def exact_tiles(self, grid: TokenGrid) -> int:
        """How many tiles each tile of queries has exactly; raises `ValueError` for a share that allows none."""
        asking, tile, _ = self.sides(grid)
        count = self.tiles_in(grid)
        if self.top_k is not None:
            return min(self.top_k, count)
        least = most_own(grid.shape, asking, tile)
        if self.top_share is not None:
            return min(max(round(self.top_share * count), least), count)
        if self.share == 1:
            return count
        rest, tile_pairs = self._pairs_beside_tiles(grid), grid.cells * math.prod(tile)
        floor = (rest + least * tile_pairs) / grid.pairs
        if floor >= 1:  # a grid so small that nothing could be saved
            return count
        if self.share < floor:
            raise ValueError(
                f"routing: on {grid} the pairs with other tokens and with blocks, and the queries' own tiles, are "
                f"{math.ceil(floor * 1000) / 1000:.3f} of all, above share={self.share}; give at least that, larger "
                "blocks by pool=, or leave layers of few tokens out by min_tokens="
            )
        return min(max(int((self.share * grid.pairs - rest) / tile_pairs), least), count)

    def _pairs_beside_tiles(self, grid: TokenGrid) -> int:
        """Pairs with other tokens and with blocks."""
        blocks = self.tiles_in(grid) * self.sides(grid).blocks_per_tile
        return grid.other_pairs + grid.cells * blocks

    def share_on(self, grid: TokenGrid) -> float:
        """The share of all pairs that is computed, blocks counted as a key each."""
        if self.is_exact(grid):
            return 1.0
        exact = grid.cells * self.exact_tiles(grid) * math.prod(self.sides(grid).tile)
        return (self._pairs_beside_tiles(grid) + exact) / grid.pairs

    def check(self, grid: TokenGrid, *, context: Context = Context()) -> None:
        for name in ("tile", "query_tile", "pool"):
            value = getattr(self, name)
            if grid.frames > 1 and isinstance(value, tuple) and len(value) == 2:
                raise ValueError(
                    f"routing: {name}={value} says nothing of frames, and the grid {grid} has {grid.frames}; give "
                    f"(frames, rows, columns), such as {name}={(1, *value)} to keep frames apart"
                )
        self.exact_tiles(grid)

    def is_exact(self, grid: TokenGrid) -> bool:
        """Are all tiles chosen, so that the result is the plain softmax?"""
        return self.exact_tiles(grid) == self.tiles_in(grid)

    def call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        scale: float | None,
        mask: Tensor | None,
        order: Tensor | None,
        context: Context = Context(),
    ) -> RoutedCall:
        """The call laid out by tiles; `order` is that of `slots`, `mask` the one that is computed with."""
        asking, tile, pool = self.sides(grid)
        scale, weighing = default_scale(q) if scale is None else scale, weighing_of(self.means, q, grid, context)
        return routed_call(
            q,
            k,
            v,
            grid,
            scale=scale,
            mask=mask,
            tile=tile,
            query_tile=asking,
            block=pool,
            chosen=self.exact_tiles(grid),
            order=order,
            by_mean=self.chosen_by == "mean",
            weigh=None if weighing is None else partial(weighing.logits, block=pool, scale=scale),
        )

    def weights(self, heads: int, head_dim: int) -> nn.Module | None:
        return PoolWeights(heads, head_dim, per_axis(self.pool or 1, 1)) if self.means == "learned" else None

    @property
    def leaves_tiles(self) -> bool:
        return self.order == "space"

    def left_tiles(self, grid: TokenGrid) -> tuple[int, int] | None:
        return (
            None if self.is_exact(grid) else (TileOrder(grid.shape, self.sides(grid).asking).tiles, self.tiles_in(grid))
        )

    def slots(self, q: Tensor, k: Tensor, grid: TokenGrid, context: Context) -> Tensor | None:
        """The order by content `(b, h, slots)`: that of an earlier call, `refresh` of them at most, or a new one.

        None in the order of the grid. Asked once a call: it counts them.
        """
        if self.order == "space":
            return None
        memory = {} if context.memory is None else context.memory
        age = memory.get("age", self.refresh)
        if age >= self.refresh:
            _, tile, pool = self.sides(grid)
            queries, keys = (grid.split(x)[0].flatten(0, 1) for x in (q, k))
            counts = math.prod(tile), math.prod(pool)
            if self.order == "content":
                order = content_order(keys, queries, *counts)
            else:
                kept = memory.get("centroids")
                order, memory["centroids"] = centroid_order(keys, queries, *counts, kept, self.decay)
            memory["order"], age = order.unflatten(0, k.shape[:2]), 0
        memory["age"] = age + 1
        found: Tensor = memory["order"]
        return found

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
        """`beside` adds to the output of the cells, unless all tiles are chosen."""
        self.check_backend(backend)
        self.check(grid)
        grid.check(q, k)
        if self.is_exact(grid):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_as(context.mask, q), scale=scale)
        return attend_tiles(
            q,
            k,
            v,
            grid,
            scale=scale,
            mask=context.mask,
            backend=backend,
            lay_out=lambda mask: self.call(q, k, v, grid, scale, mask, self.slots(q, k, grid, context), context),
            dense=partial(self.reference, grid=grid, scale=scale, context=context),
            beside=beside,
        )

    def explain_backend(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, backend: str, context: Context) -> str:
        if self.is_exact(grid):
            return "sdpa: all tiles are chosen"
        return explain_tiles(context.mask, backend, lambda mask: self.call(q, k, v, grid, 1.0, mask, None, context))

    def choose(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, scale: float | None = None, context: Context = Context()
    ) -> Tensor:
        """The chosen tiles `(b, h, query tiles, chosen)`, worked out the plain way."""
        return self._choose(q, k, v, grid, scale, context, self.slots(q, k, grid, context))

    def _choose(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        scale: float | None,
        context: Context,
        order: Tensor | None,
    ) -> Tensor:
        call = self.call(q, k, v, grid, scale, any_query(context.mask), order, context)
        return choose_tiles(call).unflatten(0, q.shape[:2])

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
        """One softmax over all keys and all blocks under a mask; `chosen` None: by `choose`. Memory O(n^2)."""
        if self.is_exact(grid):
            return softmax_reference(q, k, v, scale=scale, mask=context.mask)
        order = self.slots(q, k, grid, context)
        chosen = self._choose(q, k, v, grid, scale, context, order) if chosen is None else chosen
        picked = self._picked(chosen, grid)
        return reference_tiles(
            q,
            k,
            v,
            grid,
            self.sides(grid),
            picked,
            scale=scale,
            mask=context.mask,
            order=order,
            weighing=weighing_of(self.means, q, grid, context),
        )

    def _picked(self, chosen: Tensor, grid: TokenGrid) -> Tensor:
        """Which tiles are chosen, bool `(b, h, query tiles, tiles)`."""
        picked = torch.zeros(*chosen.shape[:3], self.tiles_in(grid), dtype=torch.bool, device=chosen.device)
        return picked.scatter_(-1, chosen, True)

    def seen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        context: Context = Context(),
    ) -> Seen:
        """What each query sees, by a choice and an order of this call."""
        sides, order = self.sides(grid), self.slots(q, k, grid, replace(context, memory=None))
        picked = self._picked(self._choose(q, k, v, grid, scale, context, order), grid)
        tiles, blocks = members(k, grid, sides, order)
        seen = seen_by_tiles(grid, sides, picked, tiles, blocks)
        if self.is_exact(grid):
            seen[..., : grid.tokens], seen[..., grid.tokens :] = True, False
        return Seen(seen[..., : grid.tokens], seen[..., grid.tokens :], blocks > 0)

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, *, context: Context = Context()) -> int:
        """Products of the softmax; of the choice, its pass over the blocks' weights and the products of the spreads; of
        weighted and learned means, the logits of their query. An order by content is not counted.
        """
        if self.is_exact(grid):
            return 4 * grid.pairs * heads * head_dim
        asking, tile, pool = self.sides(grid)
        blocks = self.tiles_in(grid) * (math.prod(tile) // math.prod(pool))
        pairs = self._pairs_beside_tiles(grid) + grid.cells * self.exact_tiles(grid) * math.prod(tile)
        rows = TileOrder(grid.shape, asking).tiles
        choice = 2 * rows * blocks * head_dim
        choice += choice if self.chosen_by == "mean" else 2 * grid.cells * blocks
        if self.means != "even":
            choice += 2 * grid.cells * head_dim
        return heads * (4 * pairs * head_dim + choice)
