"""SDPA on whole blocks: a rule on tiles, computed without a mask. No compiler, any device, a backward.

In tile order (`order.py`) the keys of a block of queries are whole blocks: they are gathered by number, keys that every
cell sees (text, pooled) follow them, and the blocks that see equally many are one SDPA call. Only blocks that see
padding at the end of a grid have a mask, on keys.

Time O(pairs d), memory beyond inputs and output `BUDGET` bytes, or one block's keys where that is more. The backward
pass gathers and computes again, so that only the inputs are kept.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..grid import TokenGrid
from .block_mask import touched_blocks
from .call import WindowCall
from .order import TileOrder, whole_tile
from .pattern import Pattern, cached

BUDGET = {"cpu": 2**24}
"""Bytes of gathered keys and values in use at once. CPU: 16 MB stay in its cache, 256 MB are 1.6 times slower."""
LARGE_BUDGET = 2**28
"""The same on all other devices, and in a trace, which holds every part of the work as nodes of its own."""
LEAST_CELLS = 32
"""Cells of a block below which windows with a mask (`tiled.py`) are faster: 6 x 6 wins over them, 4 x 4 loses."""
MOST_CELLS = 256
"""Cells of a block above which it is parted: all parts see the same keys, and each needs a copy of them in cache."""


def block_order(pattern: Pattern, grid: TokenGrid) -> TileOrder | None:
    """The order whose blocks see each other wholly or not at all; None for rules on no tiles, or on small ones."""
    tile = whole_tile(pattern, grid.shape, MOST_CELLS)
    return None if tile is None or math.prod(tile) < LEAST_CELLS else TileOrder(grid.shape, tile)


@cached(1024)
def block_keys(pattern: Pattern, grid: TokenGrid) -> int | None:
    """Cells that a cell sees, on average; None where there is no `block_order`."""
    return None if block_order(pattern, grid) is None else pattern.pairs(grid) // grid.cells


class Batch(NamedTuple):
    """Blocks that see equally many blocks."""

    blocks: Tensor  # blocks
    keys: Tensor  # blocks seen
    padded: bool  # some of the keys are padding


@cached(32)
def batches(pattern: Pattern, order: TileOrder, device: torch.device) -> tuple[Batch, ...]:
    """All blocks, by how many they see and whether padding is among them."""
    keys, seen, full = touched_blocks(pattern, order)
    kinds = torch.stack([seen.sum(1), (seen & ~full).any(1)], dim=1)
    found = []
    for kind in kinds.unique(dim=0):
        blocks = (kinds == kind).all(1).nonzero().flatten()
        near = keys[blocks][seen[blocks]].view(blocks.numel(), -1).long()
        found.append(Batch(blocks.to(device), near.to(device), bool(kind[1])))
    return tuple(found)


def parted(many: tuple[Batch, ...], most: int) -> Iterator[Batch]:
    """The batches in parts that gather at most `most` blocks, or a single block's keys."""
    for blocks, keys, padded in many:
        step = max(1, most // keys.shape[1])
        for start in range(0, blocks.numel(), step):
            yield Batch(blocks[start : start + step], keys[start : start + step], padded)


class Operands(NamedTuple):
    """Cells by block, `b h blocks cells d`; further keys `b h e d`; masks on both kinds of keys, or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    extra_k: Tensor
    extra_v: Tensor
    cell_mask: Tensor | None  # 1|b 1|h blocks cells
    extra_mask: Tensor | None  # 1|b 1|h e


class Work(NamedTuple):
    """What carries no gradient."""

    batches: tuple[Batch, ...]
    scale: float
    budget: int
    masked: bool  # the model has a mask of its own

    def parts(self, operands: Operands) -> Iterator[Batch]:
        """As many blocks at once as the budget allows."""
        k, v = operands.k, operands.v
        block = k.shape[0] * k.shape[1] * k.shape[3] * (k.shape[4] + v.shape[4]) * k.element_size()
        return parted(self.batches, self.budget // block)


def gather(x: Tensor, keys: Tensor) -> Tensor:
    """Copy the blocks that each block sees: `b h blocks cells ...` -> `b h blocks keys ...`."""
    return x.index_select(2, keys.flatten()).unflatten(2, keys.shape).flatten(3, 4)


def with_extra(keys: Tensor, extra: Tensor) -> Tensor:
    """Append `b h e ...` to the keys of every block."""
    if not extra.shape[2]:
        return keys
    return torch.cat([keys, extra.unsqueeze(2).expand(-1, -1, keys.shape[2], *extra.shape[2:])], dim=3)


def batch_mask(operands: Operands, work: Work, batch: Batch) -> Tensor | None:
    """The mask on the keys of a batch, `(1 | b * h, blocks, 1, keys)`."""
    cells, extra = operands.cell_mask, operands.extra_mask
    if cells is None or extra is None or not (work.masked or batch.padded):
        return None
    if cells.shape[0] * cells.shape[1] > 1:
        cells, extra = (mask.expand(*operands.q.shape[:2], *mask.shape[2:]) for mask in (cells, extra))
    return with_extra(gather(cells, batch.keys), extra).unsqueeze(3).flatten(0, 1)


def batch_parts(operands: Operands, batch: Batch) -> list[Tensor]:
    """Copies of a batch's queries, keys and values, and the further keys and values."""
    q, k, v, extra_k, extra_v, _, _ = operands
    return [q.index_select(2, batch.blocks), gather(k, batch.keys), gather(v, batch.keys), extra_k, extra_v]


def attend_batch(parts: list[Tensor], mask: Tensor | None, scale: float) -> Tensor:
    """SDPA of each block of queries on its own keys, `(b * h, blocks, cells, c)`."""
    q, keys, values, extra_k, extra_v = parts
    keys, values = with_extra(keys, extra_k), with_extra(values, extra_v)
    q, keys, values = (x.flatten(0, 1) for x in (q, keys, values))
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)


def attend_blocks(operands: Operands, work: Work) -> Tensor:
    """All blocks, `b h blocks cells c`."""
    q = operands.q
    out = q.new_empty(*q.shape[:-1], operands.v.shape[-1])
    for batch in work.parts(operands):
        result = attend_batch(batch_parts(operands, batch), batch_mask(operands, work, batch), work.scale)
        out.index_copy_(2, batch.blocks, result.unflatten(0, q.shape[:2]))
    return out


class BlockAttention(torch.autograd.Function):
    """`attend_blocks` that keeps its inputs alone and computes every batch again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, work: Work, *operands: Tensor) -> Tensor:
        ctx.work = work
        ctx.save_for_backward(*operands)
        return attend_blocks(Operands(*operands), work)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        work, operands = ctx.work, Operands(*ctx.saved_tensors)
        totals = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in operands[:5]]
        grad_q, grad_k, grad_v, grad_extra_k, grad_extra_v = totals
        for batch in work.parts(operands):
            parts = [part.detach().requires_grad_() for part in batch_parts(operands, batch)]
            with torch.enable_grad():
                result = attend_batch(parts, batch_mask(operands, work, batch), work.scale)
            above = grad.index_select(2, batch.blocks).flatten(0, 1)
            found = torch.autograd.grad(result, parts, above, allow_unused=True, materialize_grads=True)
            grad_q.index_copy_(2, batch.blocks, found[0])
            for total, part in ((grad_k, found[1]), (grad_v, found[2])):
                total.index_add_(2, batch.keys.flatten(), part.unflatten(3, (-1, total.shape[3])).flatten(2, 3))
            grad_extra_k += found[3]
            grad_extra_v += found[4]
        return None, *totals, None, None


def key_masks(call: WindowCall, order: TileOrder) -> tuple[Tensor | None, Tensor | None]:
    """Masks on cells `(1|b, 1|h, blocks, cells)` and on further keys: the model's own, and never padding."""
    masks = call.key_mask()
    if masks is None and not order.ragged:
        return None, None
    there = torch.ones(1, 1, call.grid.cells, 1, dtype=torch.bool, device=call.q.device)
    real = order.to_tiles(there).view(1, 1, order.tiles, order.block)
    if masks is None:
        return real, there.new_ones(1, 1, call.extra_keys)
    cells = order.to_tiles(masks[0].transpose(2, 3)).squeeze(-1).unflatten(2, (order.tiles, order.block))
    cells = cells & real if cells.dtype == torch.bool else cells.masked_fill(~real, -torch.inf)
    return cells, masks[1].squeeze(2)


def default_budget(device: torch.device) -> int:
    """Bytes to use at once on `device`."""
    return LARGE_BUDGET if torch.compiler.is_compiling() else BUDGET.get(device.type, LARGE_BUDGET)


def block_attention(call: WindowCall, order: TileOrder, budget: int | None = None) -> Tensor:
    """Order the tokens by block, attend, and put them back; `order` is that of `block_order`."""
    grid, device = call.grid, call.q.device
    cells = (order.to_tiles(grid.split(tensor)[0]) for tensor in (call.q, call.k, call.v))
    q, k, v = (tensor.unflatten(2, (order.tiles, order.block)) for tensor in cells)
    operands = Operands(q, k, v, *call.extras(), *key_masks(call, order))
    budget = default_budget(device) if budget is None else budget
    work = Work(batches(call.pattern, order, device), call.scale, budget, call.mask is not None)
    out: Tensor = BlockAttention.apply(work, *operands) if call.needs_grad else attend_blocks(operands, work)
    return call.join(order.from_tiles(out.flatten(2, 3)))
