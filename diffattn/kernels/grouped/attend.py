"""Softmax attention within each group, and of all to the other tokens: one SDPA call for groups of one size.

The cells are gathered group by group; then every group is a block that sees itself (`../blocks.py`). Time O(pairs d).
"""

import torch
from torch import Tensor

from ..blocks import Batch, BlockAttention, Operands, Work, attend_blocks, default_budget
from ..call import WindowCall
from ..pattern import Shape, cached
from .partition import Partition, slots


def gathered(cells: Tensor, order: Tensor) -> Tensor:
    """`b h cells d` by the slots of groups: `b h groups slots d`; padding takes the first cell."""
    return cells.index_select(2, order.clamp(min=0).flatten()).unflatten(2, order.shape)


@cached(64)
def places_of_cells(partition: Partition, shape: Shape, device: torch.device) -> Tensor:
    """Where each cell lies among the slots of all groups, `(cells,)`."""
    order = slots(partition, shape, device).flatten()
    real = (order >= 0).nonzero().flatten()
    return real[order[real].argsort()]


def attend_groups(call: WindowCall, partition: Partition) -> Tensor:
    """The output `(b, h, n, c)`. Not for masks that differ from query to query."""
    grid, device = call.grid, call.q.device
    order = slots(partition, grid.shape, device)
    q, k, v = (gathered(grid.split(x)[0], order) for x in (call.q, call.k, call.v))
    ragged = order.numel() != grid.cells
    operands = Operands(q, k, v, *call.extras(), *_masks(call, order, ragged))
    every = torch.arange(order.shape[0], device=device)
    batches = (Batch(every, every[:, None], ragged),)
    work = Work(batches, call.scale, default_budget(device), call.mask is not None)
    out: Tensor = BlockAttention.apply(work, *operands) if call.needs_grad else attend_blocks(operands, work)
    return call.join(out.flatten(2, 3).index_select(2, places_of_cells(partition, grid.shape, device)))


def _masks(call: WindowCall, order: Tensor, ragged: bool) -> tuple[Tensor | None, Tensor | None]:
    """Masks on slots `(1|b, 1|h, groups, slots)` and on other tokens: the model's own, and never padding."""
    masks, real = call.key_mask(), order >= 0
    if masks is None:
        return (real[None, None], real.new_ones(1, 1, call.extra_keys)) if ragged else (None, None)
    cells = gathered(masks[0].transpose(2, 3), order).squeeze(-1)
    cells = cells & real if cells.dtype == torch.bool else cells.masked_fill(~real, -torch.inf)
    return cells, masks[1].squeeze(2)
