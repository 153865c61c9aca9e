"""What `routing` and the windows with `pool` share: some tiles of keys exact, all others by the means of their blocks.

    out_q = softmax(l of all other tokens, l of the exact tiles, L of the blocks outside them) . (v, v, v_b)
    l_q,k = scale * q k^T        L_q,b = scale * q k_b + log c_b,    k_b, v_b = means of the c_b cells of block b

Queries off the grid see everything exactly. Which tiles are exact is a mechanism's own matter. What is not exact may
count by something else beside the means: `beside` of `attend_tiles`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from diffattn.grid import TokenGrid
from diffattn.kernels.call import attend_others
from diffattn.kernels.order import TileOrder
from diffattn.kernels.pattern import Shape
from diffattn.kernels.routed import RoutedCall, explain, run
from diffattn.kernels.routed.call import places

from ..base import default_scale, mask_as
from ..softmax import softmax_reference
from .pool_weights import Weighing

Beside = Callable[[RoutedCall, Tensor], Tensor]
"""From a call and its exact tiles `(g, query tiles, tiles)`, what is added to the output by tiles, `(g, query tiles,
cells, c)`; a number of a tile that does not exist stands for none."""


class Sides(NamedTuple):
    """Sides in cells (frames, rows, columns)."""

    asking: Shape
    """Of a tile of queries, which have the same exact tiles."""
    tile: Shape
    """Of a tile of keys."""
    block: Shape
    """Of a block of keys that has one mean; it divides the tile."""

    @property
    def blocks_per_tile(self) -> int:
        return math.prod(self.tile) // math.prod(self.block)


def within(tile: Shape, block: Shape, shape: Shape) -> tuple[Shape, Shape]:
    """Tile and block no longer than the grid: where the tile is, its side becomes the grid's, in whole blocks."""
    tiles, blocks = [], []
    for side, part, whole in zip(tile, block, shape, strict=True):
        one = min(part, whole)
        blocks.append(one)
        tiles.append(min(side, -(-whole // one) * one))
    return tuple(tiles), tuple(blocks)  # type: ignore[return-value]


def attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: TokenGrid,
    *,
    scale: float | None,
    mask: Tensor | None,
    backend: str,
    lay_out: Callable[[Tensor | None], RoutedCall],
    dense: Callable[[Tensor, Tensor, Tensor], Tensor],
    beside: Beside | None = None,
    choose: Callable[[RoutedCall], Tensor] | None = None,
) -> Tensor:
    """Attention `(b, h, n, c)`.

    Args:
        lay_out: the call by tiles, for the mask in the dtype of the queries.
        dense: the same by one softmax under a mask, for tensors of float32 or more; `beside` is not in it.
        choose: gives the exact tiles `(g, query tiles, tiles)`; then others are not seen, by their means neither.
    """
    mask = mask_as(mask, q)
    with torch.autocast(q.device.type, enabled=False):  # which would take sums in half precision again
        if backend == "dense" or only_densely(mask) is not None:
            number = torch.promote_types(q.dtype, torch.float32)
            return dense(*(x.to(number) for x in (q, k, v))).to(q.dtype)
        call = lay_out(mask)
        if choose is None:
            tiles, chosen = run(call, backend)
        else:
            tiles, chosen = run(call.without_means(), backend, choose(call))
        if beside is not None:
            more = beside(call, chosen)
            tiles = (tiles.to(more.dtype) + more).to(q.dtype)
    if call.lists is not None:
        tiles = tiles.index_select(1, call.lists.rows.argsort())
    order = TileOrder(grid.shape, call.asking)
    out = order.from_tiles(tiles.flatten(1, 2)[None])[0].unflatten(0, q.shape[:2])
    if not grid.others:
        return out
    return grid.join(out, attend_others(q, k, v, grid, mask=mask, scale=scale))


def explain_tiles(mask: Tensor | None, backend: str, lay_out: Callable[[Tensor | None], RoutedCall]) -> str:
    """Which kernel `attend_tiles` runs, and why."""
    reason = only_densely(mask)
    if backend == "dense" or reason is not None:
        return "dense" if reason is None else f"dense: {reason}"
    return explain(lay_out(mask), backend)


def only_densely(mask: Tensor | None) -> str | None:
    """Why a mask leaves the dense computation alone; None where it does not."""
    if masks_queries(mask):
        return "the model's mask differs from query to query"
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        return "the model's mask needs a gradient"
    return None


def masks_queries(mask: Tensor | None) -> bool:
    """Does the model's mask differ from query to query?"""
    return mask is not None and mask.dim() > 1 and mask.shape[-2] > 1


def any_query(mask: Tensor | None) -> Tensor | None:
    """For a choice: a mask that differs from query to query counts by what any query may see."""
    if mask is None or not masks_queries(mask):
        return mask
    return mask.any(-2, keepdim=True) if mask.dtype == torch.bool else mask.amax(-2, keepdim=True)


def reference_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: TokenGrid,
    sides: Sides,
    picked: Tensor,
    *,
    scale: float | None,
    mask: Tensor | None,
    order: Tensor | None = None,
    weighing: Weighing | None = None,
) -> Tensor:
    """One softmax over all keys and all blocks under a mask. Memory O(n^2).

    Of a mask that differs from query to query, a block has the weight of its keys for each query, and its means are
    those without a mask.

    Args:
        picked: which tiles are exact, bool `(b|1, h|1, query tiles, tiles)`.
        order: number of the cell in each slot of the tiles, `(b, h, slots)`; None: the grid's.
        weighing: how the means of a block weigh its keys; None: all alike.
    """
    tiles, blocks = members(k, grid, sides, order)
    cells = grid.split(k)[0], grid.split(v)[0]
    bias = key_bias(mask, q, grid.tokens)
    weight = grid.split(bias, dim=-1)[0].exp()
    scale = default_scale(q) if scale is None else scale
    scores = torch.zeros_like(cells[0][..., None, :, 0])  # b h 1 cells
    if weighing is not None:
        scores = weighing.logits_of_cells(cells[0], grid, sides.block, scale)
    alike = weight if weight.shape[-2] == 1 else torch.ones_like(weight[..., :1, :])
    counted = blocks * alike > 0  # blocks cells
    logits = scores.masked_fill(~counted, -torch.inf)
    peaks = logits.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(k.dtype).min)
    tilted = (logits - peaks).exp()
    tiny = torch.finfo(k.dtype).tiny
    share = tilted * alike / (tilted * alike).sum(-1, keepdim=True).clamp(min=tiny)
    mean_k, mean_v = (share @ x for x in cells)
    mass = weight @ tilted.mT
    log_weight = mass.clamp(min=tiny).log() + (peaks - (share * scores).sum(-1, keepdim=True)).mT
    log_weight = log_weight.masked_fill(mass == 0, -torch.inf)
    keys, values = torch.cat([k, mean_k], dim=-2), torch.cat([v, mean_v], dim=-2)
    shape = torch.broadcast_shapes(bias.shape[:3], log_weight.shape[:3])
    bias = torch.cat([bias.expand(*shape, -1), log_weight.expand(*shape, -1)], dim=-1).expand(*q.shape[:3], -1)
    hidden = ~seen_by_tiles(grid, sides, picked, tiles, blocks)
    return softmax_reference(q, keys, values, scale=scale, mask=bias.masked_fill(hidden, -torch.inf))


def key_bias(mask: Tensor | None, q: Tensor, tokens: int) -> Tensor:
    """The mask as numbers to add, `(b|1, h|1, n|1, tokens)`."""
    if mask is None:
        return q.new_zeros(1, 1, 1, tokens)
    mask = mask[(None,) * (4 - mask.dim())].expand(*(-1,) * 3, tokens)
    if mask.dtype != torch.bool:
        return mask.to(q.dtype)
    return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)


def members(k: Tensor, grid: TokenGrid, sides: Sides, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which cells are in each tile and in each block: 0 or 1, `(b|1, h|1, tiles|blocks, cells)`."""
    slots = places(grid.shape, sides.tile, sides.block, k.device).slots.flatten()[None, None]
    slots = slots if order is None else order
    member = F.one_hot(slots + 1, grid.cells + 1)[..., 1:].to(k.dtype)
    several = [member.unflatten(2, (-1, math.prod(size))).sum(3) for size in (sides.tile, sides.block)]
    return several[0], several[1]


def seen_by_tiles(grid: TokenGrid, sides: Sides, picked: Tensor, tiles: Tensor, blocks: Tensor) -> Tensor:
    """Which keys and which blocks each query sees, bool `(b, h, tokens, tokens + blocks)`.

    `tiles` and `blocks` say by 0 and 1 which cells they hold, `(b|1, h|1, tiles|blocks, cells)`.
    """
    slots = places(grid.shape, sides.asking, sides.asking, picked.device).slots
    mine = F.one_hot(slots + 1, grid.cells + 1)[..., 1:].sum(1).to(tiles.dtype)  # query tiles, cells
    whole = mine.mT @ picked.to(tiles.dtype)  # b h cells tiles
    exact, by_mean = whole @ tiles > 0, whole @ (tiles @ blocks.mT > 0).to(tiles.dtype) == 0
    shape = torch.broadcast_shapes(exact.shape[:2], by_mean.shape[:2])
    seen = torch.ones(*shape, grid.tokens, grid.tokens + blocks.shape[2], dtype=torch.bool, device=picked.device)
    seen[..., grid.tokens :] = False
    seen[:, :, grid.cell_slice, grid.cell_slice] = exact
    seen[:, :, grid.cell_slice, grid.tokens :] = by_mean
    return seen
