"""Queries and keys by tile, and the blocks' means: what choice and kernels work on."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffattn.grid import TokenGrid

from ..order import TileOrder
from ..pattern import Shape, cached
from .lists import Lists


class RoutedCall(NamedTuple):
    """One call. `g` counts samples x heads; biases are None where nothing is hidden or weighed."""

    q: Tensor  # g query-tiles cells d
    k: Tensor  # g tiles cells d
    v: Tensor  # g tiles cells c
    bias: Tensor | None  # g tiles cells, float: log of the weight of a key
    block_k: Tensor  # g blocks d, means
    block_v: Tensor  # g blocks c
    block_bias: Tensor  # g|1 blocks: log of the weight of a block
    spread_k: Tensor | None  # g blocks d, variances; None where nothing is chosen
    spread_v: Tensor | None  # g blocks, standard deviations
    other_k: Tensor  # g others d
    other_v: Tensor  # g others c
    other_bias: Tensor | None  # g others
    real: Tensor | None  # query-tiles cells, bool: no padding; None: all
    own: Tensor | None  # query-tiles tiles, bool: always exact
    scale: float
    asking: Shape
    """Sides of a tile of queries."""
    chosen: int
    """Exact tiles of each tile of queries; with `lists` the most."""
    by_mean: bool = False
    """Is the choice by the mean of the queries of a tile, not by each of them?"""
    lists: Lists | None = None
    """The exact tiles, where they are not chosen by content; the tiles of queries lie in the order of its rows."""

    @property
    def tiles(self) -> int:
        """Number of tiles of keys."""
        return self.k.shape[1]

    @property
    def needs_grad(self) -> bool:
        """Is a gradient asked for, of any tensor of the call?"""
        tensors = (self.q, self.k, self.v, self.block_k, self.block_v, self.other_k, self.other_v)
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    @property
    def at_once(self) -> bool:
        """Does one SDPA take tiles, blocks and other tokens? On CPUs, where no query chooses for itself."""
        chosen_before = self.by_mean or self.lists is not None
        return chosen_before and self.q.device.type == "cpu" and self.block_k.dtype == self.k.dtype

    def without_means(self) -> "RoutedCall":
        """The same where what is not exact is not seen."""
        unseen = torch.full_like(self.block_bias[:1], -torch.inf)
        return self._replace(block_k=self.block_k.detach(), block_v=self.block_v.detach(), block_bias=unseen)

    def bias_of_blocks(self, part: slice) -> Tensor:
        """Of some of the heads, `(g|1, blocks)`."""
        return self.block_bias if self.block_bias.shape[0] == 1 else self.block_bias[part]

    @property
    def blocks_per_tile(self) -> int:
        """Blocks, each with one mean, that a tile is made of."""
        return self.block_k.shape[1] // self.tiles


class Places(NamedTuple):
    """Cells of a grid in tiles, each in blocks: number of the cell in each slot, -1 for padding."""

    slots: Tensor  # tiles cells
    real: Tensor  # tiles cells


@cached(64)
def places(shape: Shape, tile: Shape, block: Shape, device: torch.device) -> Places:
    """The slots of a grid; tiles in row-major order, blocks within a tile likewise, cells within a block likewise."""
    grid = torch.arange(math.prod(shape), device=device).view(1, 1, -1, 1) + 1
    slots = TileOrder(shape, tile).to_tiles(grid).view(-1, *tile)
    parts = [size for whole, part in zip(tile, block, strict=True) for size in (whole // part, part)]
    slots = slots.view(-1, *parts).permute(0, 1, 3, 5, 2, 4, 6).reshape(slots.shape[0], -1) - 1
    return Places(slots, slots >= 0)


@cached(64)
def own_tiles(shape: Shape, query_tile: Shape, tile: Shape, device: torch.device) -> Tensor:
    """Which tiles of keys a tile of queries lies on, `(query tiles, tiles)`."""
    several = TileOrder(shape, query_tile), TileOrder(shape, tile)
    ranges = []
    for order in several:
        starts = torch.meshgrid(
            *(torch.arange(n) * step for n, step in zip(order.counts, order.tile, strict=True)), indexing="ij"
        )
        ranges.append(torch.stack(starts, -1).view(-1, 3))
    (first, other), (one, two) = ranges, (torch.tensor(query_tile), torch.tensor(tile))
    meets = (first[:, None] < other[None] + two) & (other[None] < first[:, None] + one)
    return meets.all(-1).to(device)


def routed_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: TokenGrid,
    *,
    scale: float,
    mask: Tensor | None,
    tile: Shape,
    query_tile: Shape,
    block: Shape,
    chosen: int | Lists,
    order: Tensor | None = None,
    by_mean: bool = False,
    given: bool = False,
    weigh: Callable[[Tensor], Tensor] | None = None,
) -> RoutedCall:
    """Lay a call out.

    Args:
        mask: on keys, `(b|1, h|1, 1, tokens)`, bool or additive.
        chosen: how many tiles of keys a tile of queries has exactly, or which.
        order: number of the cell in each slot of the tiles, `(b, h, tiles * cells)`, -1 for padding; None: the grid's.
        by_mean: choose by the mean of the queries of a tile.
        given: the caller chooses, and hands the choice to `run`.
        weigh: gives keys `(g, tiles, cells, d)` in the order of the tiles logits `(g, tiles, cells)`, by whose softmax
            over the cells of a block its means weigh them; None: all alike.
    """
    (cells_q, _), (cells_k, other_k), (cells_v, other_v) = (grid.split(x) for x in (q, k, v))
    heads = q.shape[0] * q.shape[1]
    lists, chooses = None if isinstance(chosen, int) else chosen, isinstance(chosen, int) and not given
    asking = places(grid.shape, query_tile, query_tile, q.device)
    if lists is not None:
        asking = Places(asking.slots[lists.rows], asking.real[lists.rows])
    queries = _take(cells_q, asking.slots.flatten()).unflatten(1, asking.slots.shape)
    if order is None:
        found = places(grid.shape, tile, block, q.device)
        slots, size = found.slots.flatten(), (found.slots.shape[0], found.slots.shape[1])
        real = None if slots.numel() == grid.cells else found.real.flatten()[None]
    else:
        slots, size = order.flatten(0, 1), (order.shape[-1] // math.prod(tile), math.prod(tile))
        real = None if grid.cells == order.shape[-1] else slots >= 0
    keys, values = (_take(x, slots).unflatten(1, size) for x in (cells_k, cells_v))
    bias, other_bias = _biases(mask, grid, slots, real, q)
    bias = None if bias is None else bias.expand(heads, -1).unflatten(1, size)
    other_bias = None if other_bias is None else other_bias.expand(heads, -1)
    scores = None if weigh is None else weigh(keys)
    means = block_means(keys, values, bias, scores, math.prod(block), spread=chooses)
    all_real = asking.slots.numel() == grid.cells
    own = own_tiles(grid.shape, query_tile, tile, q.device) if order is None and chooses else None
    most = chosen if isinstance(chosen, int) else chosen.tiles.shape[1]
    return RoutedCall(
        queries, keys, values, bias, *means, other_k.flatten(0, 1), other_v.flatten(0, 1), other_bias,
        None if all_real else asking.real, own, scale, query_tile, most, by_mean or given, lists,
    )  # fmt: skip


def _take(cells: Tensor, slots: Tensor) -> Tensor:
    """`b h cells d` by slots `(slots)` or `(b * h, slots)` -> `b*h slots d`; padding takes the first cell."""
    cells, slots = cells.flatten(0, 1), slots.clamp(min=0)
    if slots.dim() == 1:
        return cells.index_select(1, slots)
    return cells.gather(1, slots[..., None].expand(-1, -1, cells.shape[-1]))


def _biases(
    mask: Tensor | None, grid: TokenGrid, slots: Tensor, real: Tensor | None, q: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Log of the weight of each slot and of each other token, `(g|1, n)`; None where nothing is hidden or weighed."""
    number = torch.promote_types(q.dtype, torch.float32)
    cells, others = None, None
    if mask is not None:
        mask = mask.expand(*q.shape[:2], 1, grid.tokens).flatten(0, 2)
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=number, device=q.device).masked_fill_(~mask, -torch.inf)
        cells, others = grid.split(mask.to(number), dim=-1)
        index = slots.clamp(min=0)
        cells = cells.index_select(1, index) if index.dim() == 1 else cells.gather(1, index)
    if real is not None:
        cells = q.new_zeros(real.shape, dtype=number) if cells is None else cells
        cells = cells.masked_fill(~real, -torch.inf)
    return cells, others


def probed(keys: Tensor, query: Tensor) -> Tensor:
    """Logits of the keys, `(g, tiles, cells)`, for one query of each head `(g, d)`, times the scale already."""
    number = torch.promote_types(keys.dtype, torch.float32)
    return (keys.to(number).flatten(1, 2) @ query.to(number)[:, :, None]).view(keys.shape[:3])


def block_means(
    keys: Tensor, values: Tensor, bias: Tensor | None, scores: Tensor | None, size: int, *, spread: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Means of keys and values over blocks of `size` cells, log weights, variances of keys, deviations of values.

    Keys and values of a block count by the softmax of their biases and scores; without both all alike.
    """
    number = torch.promote_types(keys.dtype, torch.float32)
    k, v = (x.flatten(1, 2).unflatten(1, (-1, size)).to(number) for x in (keys, values))
    given = [x.flatten(1, 2).unflatten(1, (-1, size)) for x in (bias, scores) if x is not None]
    if not given:
        weight, share = k.new_full((1, k.shape[1]), math.log(size)), None
    else:
        parts = sum(given[1:], given[0])
        hidden = (parts == -torch.inf).all(-1)
        weight = parts.masked_fill(hidden[..., None], 0).logsumexp(-1)  # -inf alone would have no gradient
        share = (parts - weight[..., None]).exp()
        if scores is not None:
            weight = weight - (share * given[-1]).sum(-1)
        weight, share = weight.masked_fill(hidden, -torch.inf), share[..., None]
    mean_k, mean_v = (_mean(x, share) for x in (k, v))
    if not spread:
        return mean_k, mean_v, weight, None, None
    with torch.no_grad():  # Tensor.var along rows takes ten times as long
        spread_k = _mean((k - mean_k[:, :, None]).square_(), share)
        spread_v = _mean((v - mean_v[:, :, None]).square_(), share).sum(-1).sqrt_()
    return mean_k, mean_v, weight, spread_k, spread_v


def _mean(x: Tensor, share: Tensor | None) -> Tensor:
    """Along the cells of a block, each by its share or all alike."""
    return x.mean(2) if share is None else (x * share).sum(2)
