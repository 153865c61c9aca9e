"""Windows that do not overlap, with the whole image in their keys or in their queries.

    by="keys"       out_q = softmax(l of text, l of the own window, L of all regions) . (v, v, v_r)
                    l_q,k = scale * q k^T      L_q,r = scale * q k_r      k_r, v_r = means of the cells of region r
    by="queries"    out_q = softmax_k(scale * g_q k^T) v,    k in { text } + { own window }
                    g_q   = q in every even layer; in every odd one the mean of the queries of region r, where region r
                            has the place in the image that the cell q has in its window

Windows have sides `window`, counted from the first row, column and frame; the last ones of a grid that they do not
divide are smaller. Regions part the whole grid, frames included, into as many as the window has cells, or `size`:
the same for all windows, adaptive (`parts/pooling.py`), so that any grid has them; never more than an axis has cells.
So a side of 1 along the frames, with several of them, is means over all frames. Text queries see all text and all
image tokens, exactly and by their own queries. Layers are counted among the swapped ones, from 0.

A region counts once in the softmax, as published, however many cells it stands for. Cells that a model's mask hides
are left out of the means; a region that is all hidden is hidden too.

`pool=p`, with by="queries": what the window leaves out counts by the means of its p x p blocks and the log of their
numbers of cells (`parts/rounded.py`).

Sources. One softmax over cells nearby and means of the whole image: Shi, TransNeXt: Robust Foveal Visual Perception for
Vision Transformers, pixel-focused attention, https://arxiv.org/abs/2311.17132, there with a window around each token,
position biases, and projections of what is pooled. Windows and a few global features in two branches or in turns: Wang
et al., MAFormer, https://arxiv.org/abs/2209.01620, and Chen et al., Recursive Generalization Transformer for Image
Super-Resolution, https://arxiv.org/abs/2303.06373. Global queries: Hatamizadeh et al., Global Context Vision
Transformers, section on global self-attention, https://arxiv.org/abs/2206.09959. Differences: that paper makes the
global queries once a stage, from the image's features by trained convolutions; here they are the means of the layer's
own queries. Text, frames and grids that windows do not divide are in none of these.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from diffattn.config import register
from diffattn.grid import TokenGrid
from diffattn.kernels.call import WindowCall, attend_others, window_call
from diffattn.kernels.choose import GENERAL_BACKENDS, run
from diffattn.kernels.dense import combine_masks
from diffattn.kernels.pattern import Shape, dense_mask
from diffattn.options import Must

from ..base import Context, Seen, mask_as
from ..halo import TileWindow
from ..parts.axes import PerAxis, per_axis, sizes
from ..parts.exact_tiles import Beside, any_query, key_bias, masks_queries
from ..parts.pooling import pool, pool_groups
from ..parts.window import Window
from ..softmax import softmax_reference


@register("global_context")
@dataclass(frozen=True, kw_only=True)
class GlobalContextAttention(Window):
    """Windows with pooled global keys, or global queries. Time O(n (window + regions + others) d).

    >>> GlobalContextAttention(window=8).flops(TokenGrid(64, 64, before=512), heads=24, head_dim=128) / 1e9
    61.203283968
    """

    window: Annotated[PerAxis, sizes(1)] = 8
    """Sides of a window in tokens: (rows, columns) for images, (frames, rows, columns), or one int for all of them."""
    by: Annotated[Literal["keys", "queries"], Must("'keys' or 'queries'")] = "keys"
    """What of the whole image a window has: keys and values beside its own, or, in every second layer, queries."""
    size: Annotated[PerAxis | None, sizes(1)] = None
    """By keys: regions along each axis, likewise; None: as many as the window's sides."""

    window_backends: ClassVar[tuple[str, ...]] = ("auto", *GENERAL_BACKENDS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by == "keys" and self.pool is not None:
            raise ValueError(
                f"global_context: pool={self.pool} and the regions of by='keys' both stand for what the window leaves "
                "out; leave pool out, or give by='queries'"
            )
        if self.by == "queries" and self.size is not None:
            raise ValueError(
                f"global_context: by='queries' has one global query for each place in a window, so size={self.size} "
                "has no effect; leave it out"
            )

    @property
    def approximates(self) -> bool:
        return False

    @property
    def only_pattern(self) -> bool:
        return False

    @property
    def grouped_heads(self) -> bool:
        return self.by == "queries" and super().grouped_heads

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"call_index"} if self.by == "queries" else ())

    def computes_in_order(self, grid: TokenGrid) -> bool:
        return False

    def pattern(self, grid: TokenGrid) -> TileWindow:
        return TileWindow(per_axis(self.window, 1), (0, 0, 0))

    def check(self, grid: TokenGrid, *, context: Context = Context()) -> None:
        super().check(grid, context=context)
        for name in ("window", "size"):
            value = getattr(self, name)
            if grid.frames > 1 and isinstance(value, tuple) and len(value) == 2:
                raise ValueError(
                    f"global_context: {name}={value} says nothing of frames, and the grid {grid} has {grid.frames}; "
                    f"give (frames, rows, columns), such as {name}={(1, *value)}"
                )

    def layout(self, grid: TokenGrid) -> Shape:
        """Regions along frames, rows and columns."""
        asked = per_axis(self.window if self.size is None else self.size, 1)
        frames, rows, columns = (min(side, whole) for side, whole in zip(asked, grid.shape, strict=True))
        return frames, rows, columns

    def regions(self, grid: TokenGrid) -> int:
        """How many regions have a key; 0 by queries."""
        frames, rows, columns = self.layout(grid)
        return frames * rows * columns if self.by == "keys" else 0

    def asks_globally(self, context: Context) -> bool:
        """Are the queries of this layer global ones?"""
        return self.by == "queries" and context.call_index % 2 == 1

    def places(self, grid: TokenGrid, device: torch.device) -> Tensor:
        """Each cell's place in its window, counted as regions are, `(cells,)`."""
        index = torch.zeros(grid.cells, dtype=torch.long, device=device)
        axes = zip(grid.positions(device), per_axis(self.window, 1), self.layout(grid), strict=True)
        for position, side, count in axes:
            index = index * count + position % side
        return index

    def asking(self, q: Tensor, grid: TokenGrid, context: Context) -> Tensor:
        """The queries of this layer."""
        grid.check(q, q)
        if not self.asks_globally(context):
            return q
        cells, others = grid.split(q)
        means = region_means(cells, grid, self.layout(grid), weights_of_cells(context.mask, q, grid))
        return grid.join(means.index_select(2, self.places(grid, q.device)), others)

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
        self.check(grid)
        q = self.asking(q, grid, context)
        return super().attend(q, k, v, grid, scale=scale, backend=backend, context=context, beside=beside)

    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        context: Context = Context(),
    ) -> Tensor:
        """Means by lists of the cells of each region, then one softmax."""
        self.check(grid)
        if self.asks_globally(context):
            means = self._means_by_loops(q, q, grid, context)
            own = [means[:, :, place] for place in self.places(grid, q.device).tolist()]
            q = grid.join(torch.stack(own, dim=2), grid.split(q)[1])
        return super().reference(q, k, v, grid, scale=scale, context=context)

    def _means_by_loops(self, x: Tensor, q: Tensor, grid: TokenGrid, context: Context) -> Tensor:
        weights = grid.split(key_bias(any_query(mask_as(context.mask, q)), q, grid.tokens).exp(), dim=-1)[0]
        cells, found = grid.split(x)[0], []
        for group in pool_groups(grid, self.layout(grid)):
            own = weights[:, :, 0, group, None]
            found.append((own * cells[:, :, group]).sum(2) / own.sum(2).clamp(min=1e-300))
        return torch.stack(found, dim=2)

    def attend_window(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, scale: float, backend: str, context: Context
    ) -> Tensor:
        if self.by == "queries":
            return run(window_call(q, k, v, grid, self.pattern(grid), scale, context.mask, None), backend)
        cells = run(self._with_regions(q, k, v, grid, scale, context.mask), backend)
        cells = cells[:, :, grid.cell_slice]
        if not grid.others:
            return cells
        mask = mask_as(context.mask, q)
        mask = grid.split(mask)[1] if masks_queries(mask) else mask  # type: ignore[arg-type]
        return grid.join(cells, attend_others(q, k, v, grid, mask=mask, scale=scale))

    def _with_regions(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, scale: float, mask: Tensor | None
    ) -> WindowCall:
        """The cells' call: regions are tokens behind all others, so that a mask can hide them; no other token asks."""
        layout, count = self.layout(grid), self.regions(grid)
        weights = weights_of_cells(mask, q, grid)
        k, v = (torch.cat([x, region_means(grid.split(x)[0], grid, layout, weights)], dim=2) for x in (k, v))
        silent = grid.before, grid.after + count
        longer = TokenGrid(grid.height, grid.width, grid.frames, *silent, silent=silent)
        mask = None if mask is None else with_region_mask(key_bias(mask, q, grid.tokens), grid, layout)
        return window_call(F.pad(q, (0, 0, 0, count)), k, v, longer, self.pattern(grid), scale, mask, None)

    def window_call(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, context: Context) -> WindowCall:
        if self.by == "queries":
            return super().window_call(q, k, v, grid, context)
        return self._with_regions(q, k, v, grid, 1.0, context.mask)

    def window_reference(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, scale: float, context: Context
    ) -> Tensor:
        seen, mask = self.window_mask(grid).to(q.device), context.mask
        if self.by == "queries":
            return softmax_reference(q, k, v, scale=scale, mask=combine_masks(seen, mask))
        bias = key_bias(mask, q, grid.tokens)
        groups = [[grid.before + cell for cell in group] for group in pool_groups(grid, self.layout(grid))]
        bias = torch.cat([bias, *(bias[..., group].amax(-1, keepdim=True) for group in groups)], dim=-1)
        k, v = (torch.cat([x, self._means_by_loops(x, q, grid, context)], dim=2) for x in (k, v))
        return softmax_reference(q, k, v, scale=scale, mask=bias.masked_fill(~seen, -torch.inf))

    def window_mask(self, grid: TokenGrid) -> Tensor:
        return dense_mask(self.pattern(grid), grid, pooled=self.regions(grid))

    def window_pairs(self, grid: TokenGrid) -> int:
        return super().window_pairs(grid) + grid.cells * self.regions(grid)

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
        if self.by == "queries":
            return super().seen(q, k, v, grid, scale=scale, context=context)
        mask = self.mask(grid)[None, None]
        blocks = torch.zeros(1, 1, self.regions(grid), grid.cells, dtype=torch.bool)
        for row, group in zip(blocks[0, 0], pool_groups(grid, self.layout(grid)), strict=True):
            row[group] = True
        return Seen(mask[..., : grid.tokens], mask[..., grid.tokens :], blocks)


def weights_of_cells(mask: Tensor | None, q: Tensor, grid: TokenGrid) -> Tensor | None:
    """What each cell weighs in a mean, `(b|1, h|1, cells, 1)`: 0 where no query may see it; None: all alike."""
    if mask is None:
        return None
    bias = grid.split(key_bias(any_query(mask_as(mask, q)), q, grid.tokens), dim=-1)[0]
    most = bias.amax(-1, keepdim=True).clamp(min=torch.finfo(bias.dtype).min)
    return (bias - most).exp().mT


def region_means(cells: Tensor, grid: TokenGrid, layout: Shape, weights: Tensor | None) -> Tensor:
    """The mean `(b, h, regions, d)` of each region of `(b, h, cells, d)`, taken in float32 at least."""
    fine = cells.to(torch.promote_types(cells.dtype, torch.float32))
    if weights is None:
        return pool(fine, grid, layout).to(cells.dtype)
    weights = weights.to(fine.dtype)
    total = pool(weights, grid, layout).clamp(min=torch.finfo(fine.dtype).tiny)
    return (pool(fine * weights, grid, layout) / total).to(cells.dtype)


def with_region_mask(bias: Tensor, grid: TokenGrid, layout: Shape) -> Tensor:
    """The mask as numbers to add `(b|1, h|1, n|1, tokens)`, with what regions have: the greatest of their cells."""
    cells = grid.split(bias, dim=-1)[0]
    fine = cells.to(torch.promote_types(cells.dtype, torch.float32)).flatten(0, 2).unflatten(-1, (1, *grid.shape))
    most = F.adaptive_max_pool3d(fine, layout).flatten(1).unflatten(0, bias.shape[:3]).to(bias.dtype)
    bias = torch.cat([bias, most], dim=-1)
    return bias if bias.shape[2] == 1 else F.pad(bias, (0, 0, 0, most.shape[-1]))
