"""Routing attention: tiles of keys chosen by content are exact, all others count by the means of their blocks.

    l_q,k = scale * q k^T        L_q,b = scale * q k_b + log c_b,    k_b, v_b = means of the c_b cells of block b
    P_I,b = mean over the queries q of tile I of softmax(L_q,b joined with the exact logits of the other tokens)
    W_I,j = sum over the blocks b of tile j of P_I,b sqrt(scale^2 mean_q(q^2) . var_k(b)) sqrt(sum_d var_v(b))
    S_I   = the tiles that I lies on, then those of the largest W_I,j, until there are as many as `share` allows
    out_q = softmax(l of all other tokens, l of the tiles in S_I, L of the blocks outside S_I) . (v, v, v_b)

Queries off the grid see everything exactly. Nothing is dropped and nothing counts twice: what W foresees is the error
that the means make, so it is spent where it is least. No training is needed.

Sources: the choice of tiles by their means, Zhu et al., BiFormer, https://arxiv.org/abs/2303.08810; what is not chosen
kept by its means, Chen et al., Core Context Aware Transformers, https://arxiv.org/abs/2412.12465, there without the
number of keys in the logit; keys ordered by content, Roy et al., Routing Transformers, https://arxiv.org/abs/2003.05997,
there by clusters of unequal size, here by a balanced k-d tree.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import register
from ..grid import TokenGrid
from ..kernels.order import TileOrder
from ..kernels.pattern import Shape
from ..kernels.routed import RoutedCall, choose_tiles, content_order, route, routed_call
from ..kernels.routed.call import places
from ..options import Must, at_least
from .base import Context, Mechanism, default_scale
from .parts.axes import PerAxis, per_axis, sizes
from .softmax import softmax_reference

SHARE = Must("a number above 0 and at most 1", lambda share: 0 < share <= 1)


@register("routing")
@dataclass(frozen=True, kw_only=True)
class RoutingAttention(Mechanism):
    """Attention to the tiles that matter and to the means of all others. Time O(share n^2 d), memory O(n d).

    >>> RoutingAttention(share=0.3).exact_tiles(TokenGrid(64, 64, before=512))
    3
    """

    approximates: ClassVar[bool] = True

    share: Annotated[float, SHARE] = 0.35
    """Of all pairs of tokens, at most: those with other tokens, with keys of chosen tiles, and with blocks. 1: all."""
    top_k: Annotated[int | None, at_least(1)] = None
    """Tiles that each tile of queries has exactly; then `share` is not looked at."""
    tile: Annotated[PerAxis, sizes(1)] = 8
    """Sides of a tile of keys in tokens: (rows, columns), (frames, rows, columns), or one int for all of them."""
    query_tile: Annotated[PerAxis | None, sizes(1)] = None
    """The same of the queries that choose together; None: `tile`. Larger ones are faster and choose less well."""
    pool: Annotated[PerAxis, sizes(1)] = 4
    """The same of a block, whose keys and values have one mean; it divides the tile."""
    order: Literal["space", "content"] = "space"
    """Tiles of neighbouring keys, or of keys that are alike: a k-d tree on the keys of each head."""
    refresh: Annotated[int, at_least(1)] = 1
    """Calls of a layer, one a step, for which an order by content is kept: more are faster, and fit less well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        tile, pool = per_axis(self.tile, 1), per_axis(self.pool, 1)
        if any(side % part for side, part in zip(tile, pool, strict=True)):
            raise ValueError(
                f"routing: pool must divide the tile along each axis, got pool={self.pool}, tile={self.tile}"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"memory"} if self.order == "content" else ())

    @property
    def backends(self) -> tuple[str, ...]:
        return "auto", "gather", "dense"

    def tiles_on(self, grid: TokenGrid) -> tuple[Shape, Shape, Shape]:
        """Sides of the query tiles, the tiles and the blocks on a grid: no longer than the grid."""
        tile, pool = _within(per_axis(self.tile, 1), per_axis(self.pool, 1), grid)
        asking = self.tile if self.query_tile is None else self.query_tile
        frames, rows, columns = (min(side, whole) for side, whole in zip(per_axis(asking, 1), grid.shape, strict=True))
        return (frames, rows, columns), tile, pool

    def tiles_in(self, grid: TokenGrid) -> int:
        """How many tiles of keys a grid has; in an order by content none is cut but the last."""
        tile = self.tiles_on(grid)[1]
        if self.order == "content":
            return -(-grid.cells // math.prod(tile))
        return TileOrder(grid.shape, tile).tiles

    def exact_tiles(self, grid: TokenGrid) -> int:
        """How many tiles each tile of queries has exactly; raises `ValueError` for a share that allows none."""
        asking, tile, _ = self.tiles_on(grid)
        count = self.tiles_in(grid)
        if self.top_k is not None:
            return min(self.top_k, count)
        if self.share == 1:
            return count
        rest, tile_pairs = self._pairs_beside_tiles(grid), grid.cells * math.prod(tile)
        least = _most_own(grid.shape, asking, tile)
        floor = (rest + least * tile_pairs) / grid.tokens**2
        if floor >= 1:  # a grid so small that nothing could be saved
            return count
        if self.share < floor:
            raise ValueError(
                f"routing: on {grid} the pairs with other tokens and with blocks, and the queries' own tiles, are "
                f"{math.ceil(floor * 1000) / 1000:.3f} of all, above share={self.share}; give at least that, larger "
                "blocks by pool=, or leave layers of few tokens out by min_tokens="
            )
        return min(max(int((self.share * grid.tokens**2 - rest) / tile_pairs), least), count)

    def _pairs_beside_tiles(self, grid: TokenGrid) -> int:
        """Pairs with other tokens and with blocks."""
        _, tile, pool = self.tiles_on(grid)
        blocks = self.tiles_in(grid) * (math.prod(tile) // math.prod(pool))
        return grid.tokens**2 - grid.cells**2 + grid.cells * blocks

    def share_on(self, grid: TokenGrid) -> float:
        """The share of all pairs that is computed, blocks counted as a key each."""
        if self.is_exact(grid):
            return 1.0
        exact = grid.cells * self.exact_tiles(grid) * math.prod(self.tiles_on(grid)[1])
        return (self._pairs_beside_tiles(grid) + exact) / grid.tokens**2

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
    ) -> RoutedCall:
        """The call laid out by tiles; `order` is that of `slots`."""
        asking, tile, pool = self.tiles_on(grid)
        return routed_call(
            q,
            k,
            v,
            grid,
            scale=default_scale(q) if scale is None else scale,
            mask=mask,
            tile=tile,
            query_tile=asking,
            block=pool,
            chosen=self.exact_tiles(grid),
            order=order,
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
            _, tile, pool = self.tiles_on(grid)
            queries, keys = (grid.split(x)[0].flatten(0, 1) for x in (q, k))
            order = content_order(keys, queries, math.prod(tile), math.prod(pool))
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
    ) -> Tensor:
        self.check_backend(backend)
        self.check(grid)
        grid.check(q, k)
        mask = context.mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        if self.is_exact(grid):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        number = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):  # which would take sums in half precision again
            if backend == "dense" or self._only_densely(mask) is not None:
                wide_q, wide_k, wide_v = (x.to(number) for x in (q, k, v))
                return self.reference(wide_q, wide_k, wide_v, grid, scale=scale, context=context).to(q.dtype)
            call = self.call(q, k, v, grid, scale, mask, self.slots(q, k, grid, context))
            out = self.in_grid_order(route(call)[0], grid).unflatten(0, q.shape[:2])
        if not grid.others:
            return out
        others = F.scaled_dot_product_attention(grid.split(q)[1], k, v, attn_mask=mask, scale=scale)
        return grid.join(out, others)

    def _only_densely(self, mask: Tensor | None) -> str | None:
        """Why a mask leaves the dense computation alone; None where it does not."""
        if masks_queries(mask):
            return "the model's mask differs from query to query"
        if mask is not None and mask.requires_grad and torch.is_grad_enabled():
            return "the model's mask needs a gradient"
        return None

    def explain_backend(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, backend: str, context: Context) -> str:
        if self.is_exact(grid):
            return "sdpa: all tiles are chosen"
        reason = self._only_densely(context.mask)
        if backend != "auto":
            return backend
        return "gather" if reason is None else f"dense: {reason}"

    def in_grid_order(self, tiles: Tensor, grid: TokenGrid) -> Tensor:
        """`g query-tiles cells c` -> `g cells c`."""
        order = TileOrder(grid.shape, self.tiles_on(grid)[0])
        return order.from_tiles(tiles.flatten(1, 2)[None])[0]

    def choose(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, scale: float | None = None, context: Context = Context()
    ) -> Tensor:
        """The chosen tiles `(b, h, query tiles, chosen)`, worked out the plain way."""
        return self._choose(q, k, v, grid, scale, context.mask, self.slots(q, k, grid, context))

    def _choose(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        scale: float | None,
        mask: Tensor | None,
        order: Tensor | None,
    ) -> Tensor:
        call = self.call(q, k, v, grid, scale, any_query(mask), order)
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
        """One softmax over all keys and all blocks under a mask; `chosen` None: by `choose`. Memory O(n^2).

        Of a mask that differs from query to query, a block has the weight of its keys for each query, and plain means.
        """
        if self.is_exact(grid):
            return softmax_reference(q, k, v, scale=scale, mask=context.mask)
        order = self.slots(q, k, grid, context)
        chosen = self._choose(q, k, v, grid, scale, context.mask, order) if chosen is None else chosen
        asking, tile, pool = self.tiles_on(grid)
        tiles, blocks = self._members(k, grid, tile, pool, order)
        cells = grid.split(k)[0], grid.split(v)[0]
        bias = key_bias(context.mask, q, grid.tokens)
        weight = grid.split(bias, dim=-1)[0].exp()
        even = weight if weight.shape[-2] == 1 else torch.ones_like(weight[..., :1, :])
        total = (blocks * even) @ torch.ones_like(cells[0][..., :1])
        mean_k, mean_v = ((blocks * even) @ x / total.clamp(min=torch.finfo(x.dtype).tiny) for x in cells)
        log_weight = (weight @ blocks.mT).log()
        scale = default_scale(q) if scale is None else scale
        keys, values = torch.cat([k, mean_k], dim=-2), torch.cat([v, mean_v], dim=-2)
        shape = torch.broadcast_shapes(bias.shape[:3], log_weight.shape[:3])
        bias = torch.cat([bias.expand(*shape, -1), log_weight.expand(*shape, -1)], dim=-1).expand(*q.shape[:3], -1)
        hidden = self._hidden(q, grid, asking, tiles, blocks, chosen)
        return softmax_reference(q, keys, values, scale=scale, mask=bias.masked_fill(hidden, -torch.inf))

    def _members(
        self, k: Tensor, grid: TokenGrid, tile: Shape, pool: Shape, order: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Which cells are in each tile and in each block: 0 or 1, `(b|1, h|1, tiles|blocks, cells)`."""
        slots = places(grid.shape, tile, pool, k.device).slots.flatten()[None, None] if order is None else order
        member = F.one_hot(slots + 1, grid.cells + 1)[..., 1:].to(k.dtype)
        several = [member.unflatten(2, (-1, math.prod(size))).sum(3) for size in (tile, pool)]
        return several[0], several[1]

    def _hidden(
        self, q: Tensor, grid: TokenGrid, asking: Shape, tiles: Tensor, blocks: Tensor, chosen: Tensor
    ) -> Tensor:
        """Which keys and blocks each query leaves out, bool `(b, h, tokens, tokens + blocks)`."""
        picked = q.new_zeros(*chosen.shape[:3], tiles.shape[2]).scatter_(-1, chosen, 1)
        mine = F.one_hot(places(grid.shape, asking, asking, q.device).slots + 1, grid.cells + 1)[..., 1:].sum(1)
        exact = (mine.to(q.dtype).mT @ picked @ tiles.to(q.dtype)) > 0  # b h cells cells
        of_block = ((mine.to(q.dtype).mT @ picked) @ ((tiles @ blocks.mT) > 0).to(q.dtype)) > 0
        hidden = torch.zeros(
            *q.shape[:2], grid.tokens, grid.tokens + blocks.shape[2], dtype=torch.bool, device=q.device
        )
        hidden[..., grid.tokens :] = True
        hidden[:, :, grid.cell_slice, grid.cell_slice] = ~exact
        hidden[:, :, grid.cell_slice, grid.tokens :] = of_block
        return hidden

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, *, context: Context = Context()) -> int:
        """Products of the softmax; of the choice, its pass over the blocks' weights and the products of the spreads."""
        if self.is_exact(grid):
            return 4 * grid.tokens**2 * heads * head_dim
        asking, tile, pool = self.tiles_on(grid)
        blocks = self.tiles_in(grid) * (math.prod(tile) // math.prod(pool))
        pairs = self._pairs_beside_tiles(grid) + grid.cells * self.exact_tiles(grid) * math.prod(tile)
        choice = 2 * grid.cells * blocks + 2 * TileOrder(grid.shape, asking).tiles * blocks * head_dim
        return heads * (4 * pairs * head_dim + choice)


def masks_queries(mask: Tensor | None) -> bool:
    """Does the model's mask differ from query to query?"""
    return mask is not None and mask.dim() > 1 and mask.shape[-2] > 1


def key_bias(mask: Tensor | None, q: Tensor, tokens: int) -> Tensor:
    """The mask as numbers to add, `(b|1, h|1, n|1, tokens)`."""
    if mask is None:
        return q.new_zeros(1, 1, 1, tokens)
    mask = mask[(None,) * (4 - mask.dim())].expand(*(-1,) * 3, tokens)
    if mask.dtype != torch.bool:
        return mask.to(q.dtype)
    return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)


def any_query(mask: Tensor | None) -> Tensor | None:
    """For the choice: a mask that differs from query to query counts by what any query may see."""
    if mask is None or not masks_queries(mask):
        return mask
    return mask.any(-2, keepdim=True) if mask.dtype == torch.bool else mask.amax(-2, keepdim=True)


def _within(tile: Shape, pool: Shape, grid: TokenGrid) -> tuple[Shape, Shape]:
    """Tile and block no longer than the grid: where the tile is, its side becomes the grid's, in whole blocks."""
    tiles, blocks = [], []
    for side, part, whole in zip(tile, pool, grid.shape, strict=True):
        block = min(part, whole)
        blocks.append(block)
        tiles.append(min(side, -(-whole // block) * block))
    return tuple(tiles), tuple(blocks)  # type: ignore[return-value]


def _most_own(shape: Shape, asking: Shape, tile: Shape) -> int:
    """The most tiles that a tile of queries lies on."""
    most = 1
    for whole, wide, side in zip(shape, asking, tile, strict=True):
        most *= max(-(-min(low + wide, whole) // side) - low // side for low in range(0, whole, wide))
    return most
