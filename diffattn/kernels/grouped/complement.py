"""Attention within groups, and to the means of what a group does not see.

    out_q = softmax(l of all other tokens, l of q's group, L of all blocks) . (v, v, v_b)
    l_q,k = scale * q k^T        L_q,b = scale * q k_b + log c_b

k_b and v_b are the means of the c_b cells of block b that are not in q's group; a block that lies in it is left out. So
nothing is dropped and nothing counts twice, whatever the shape of a group.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..blocks import default_budget
from ..call import WindowCall
from ..order import TileOrder
from ..pattern import Shape, cached
from .attend import gathered, places_of_cells
from .partition import Partition, slots


@cached(64)
def block_of_cells(shape: Shape, block: Shape, device: torch.device) -> Tensor:
    """Number of the block that each cell lies in, `(cells,)`, row-major."""
    counts = TileOrder(shape, block).counts
    axes = [torch.arange(size, device=device) // side for size, side in zip(shape, block, strict=True)]
    f, y, x = torch.meshgrid(*axes, indexing="ij")
    return ((f * counts[1] + y) * counts[2] + x).flatten()


def attend_complement(call: WindowCall, partition: Partition, block: Shape) -> Tensor:
    """The output `(b, h, n, c)`; inputs in half precision are computed in float32. Not for masks of single queries.

    Time O((pairs + cells * blocks) d); every group has means of its own, groups * blocks of them.
    """
    grid, device, number = call.grid, call.q.device, torch.promote_types(call.q.dtype, torch.float32)
    order, member = slots(partition, grid.shape, device), block_of_cells(grid.shape, block, device)
    blocks = TileOrder(grid.shape, block).tiles
    q, k, v = (grid.split(x)[0].to(number) for x in (call.q, call.k, call.v))
    extra_k, extra_v = (x.to(number) for x in call.extras())
    bias, extra_bias = _biases(call, number)
    weight = bias.exp()[..., None]
    keys = torch.cat([k * weight, v * weight, weight.expand(*k.shape[:3], 1), (weight > 0).expand(*k.shape[:3], 1)], -1)
    total = keys.new_zeros(*keys.shape[:2], blocks, keys.shape[-1]).index_add(2, member, keys)
    row = q.shape[0] * q.shape[1] * (blocks + order.shape[1] + extra_k.shape[2]) * keys.shape[-1] * q.element_size()
    step = max(1, default_budget(device) // row)
    parts = []
    for some in order.split(step):
        own = [gathered(x, some) for x in (q, k, v, keys, bias[..., None])]
        means = _means(total, own[3], member, some, (k.shape[-1], v.shape[-1]))
        parts.append(_attend(own[0], own[1], own[2], own[4], some, (extra_k, extra_v, extra_bias), means, call.scale))
    out = torch.cat(parts, dim=2).flatten(2, 3).index_select(2, places_of_cells(partition, grid.shape, device))
    return call.join(out.to(call.q.dtype))


def _means(
    total: Tensor, own: Tensor, member: Tensor, order: Tensor, sizes: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Means of keys and values of what some groups leave of every block, and the logs of their weights.

    Args:
        total: sums over the blocks of weighted keys, weighted values, weights, and ones of visible keys.
        own: the same of each slot of the groups, `b h groups slots -`.
    """
    groups, blocks = order.shape[0], total.shape[2]
    place = member[order.clamp(min=0)].masked_fill(order < 0, blocks)  # a block of its own for padding
    place = place + torch.arange(groups, device=order.device)[:, None] * (blocks + 1)
    taken = own.new_zeros(*own.shape[:2], groups * (blocks + 1), own.shape[-1])
    taken = taken.index_add(2, place.flatten(), own.flatten(2, 3)).unflatten(2, (groups, blocks + 1))[..., :-1, :]
    keys, values, weight, count = (total[:, :, None] - taken).split((*sizes, 1, 1), dim=-1)
    there = count > 0.5
    weight = torch.where(there, weight, 1)
    return keys / weight, values / weight, weight.log().masked_fill(~there, -torch.inf).squeeze(-1)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    order: Tensor,
    extra: tuple[Tensor, Tensor, Tensor],
    means: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> Tensor:
    """Some groups, `b h groups slots c`."""
    groups = order.shape[0]
    extra_k, extra_v, extra_bias = (x.unsqueeze(2).expand(-1, -1, groups, *x.shape[2:]) for x in extra)
    bias = bias.squeeze(-1).masked_fill(order < 0, -torch.inf)
    shape = torch.broadcast_shapes(bias.shape[:2], means[2].shape[:2], extra_bias.shape[:2])
    whole = torch.cat([x.expand(*shape, *x.shape[2:]) for x in (bias, extra_bias, means[2])], dim=-1)
    keys, values = torch.cat([k, extra_k, means[0]], dim=-2), torch.cat([v, extra_v, means[1]], dim=-2)
    mask = whole.expand(*q.shape[:2], *whole.shape[2:]).flatten(0, 1)[..., None, :]
    asking, keys, values = (x.flatten(0, 1) for x in (q, keys, values))
    return F.scaled_dot_product_attention(asking, keys, values, attn_mask=mask, scale=scale).unflatten(0, q.shape[:2])


def _biases(call: WindowCall, number: torch.dtype) -> tuple[Tensor, Tensor]:
    """The model's mask as numbers to add, of the cells `(b|1, h|1, cells)` and of the other tokens."""
    masks = call.key_mask()
    if masks is None:
        zeros = call.q.new_zeros(1, 1, call.grid.tokens, dtype=number)
        return zeros[..., : call.grid.cells], zeros[..., : call.grid.others]
    found = []
    for mask in masks:
        mask = mask.squeeze(2)
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=number, device=mask.device).masked_fill(~mask, -torch.inf)
        found.append(mask.to(number))
    return found[0], found[1]
