"""Exact attention under a dense mask. Time and memory O(n m): small grids, and the yardstick of the other kernels."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..grid import TokenGrid
from .call import WindowCall
from .pattern import Pattern, cached, covers, dense_mask

KEPT_PAIRS = 2**25
"""Masks of up to this many pairs (32 MB: 64 x 64 cells and 1,696 other tokens) are kept from call to call; building one
takes three times its SDPA."""


def combine_masks(pattern: Tensor, mask: Tensor | None) -> Tensor:
    """The boolean `pattern` `(n, m)` and the model's own `mask` (bool or additive, `(b|1, h|1, n|1, k)`, k <= m).

    Pooled keys at the end, of which the model's mask knows nothing, are left visible.
    """
    if mask is None:
        return pattern
    visible = mask.dtype == torch.bool
    mask = F.pad(mask, (0, pattern.shape[-1] - mask.shape[-1]), value=visible)
    return pattern & mask if visible else mask.masked_fill(~pattern, -torch.inf)


def dense_attention(call: WindowCall) -> Tensor:
    """SDPA under the whole mask; without one where the window covers the grid and no keys are pooled.

    Raises `MemoryError` where the mask would not fit in what is free, instead of trying.
    """
    if not torch.compiler.is_compiling():
        if call.pooled is None and covers(call.pattern, call.grid):
            return F.scaled_dot_product_attention(call.q, call.k, call.v, attn_mask=call.mask, scale=call.scale)
        refuse_oversize(call)
    k, v = call.k, call.v
    if call.pooled is not None:
        k, v = torch.cat([k, call.pooled[0]], dim=-2), torch.cat([v, call.pooled[1]], dim=-2)
    small = call.grid.tokens * (call.grid.tokens + call.pooled_count) <= KEPT_PAIRS
    build = kept_mask if small else device_mask
    allowed = combine_masks(build(call.pattern, call.grid, call.pooled_count, call.q.device), call.mask)
    return F.scaled_dot_product_attention(call.q, k, v, attn_mask=allowed, scale=call.scale)


def device_mask(pattern: Pattern, grid: TokenGrid, pooled: int, device: torch.device) -> Tensor:
    """`dense_mask` on `device`."""
    return dense_mask(pattern, grid, pooled).to(device)


kept_mask = cached(8)(device_mask)


def dense_bytes(call: WindowCall) -> int:
    """Memory of the mask, boolean and as the numbers SDPA makes of it, and of the scores where SDPA keeps them."""
    pairs = call.grid.tokens * (call.grid.tokens + call.pooled_count)
    number = call.q.element_size()
    copies = 1 if call.mask is None else call.mask.shape[0] * call.mask.shape[1]
    fused = call.q.shape[-1] == call.v.shape[-1] and (call.q.dtype != torch.float64 or call.q.device.type == "cpu")
    scores = 0 if fused else 2 * call.q.shape[0] * call.q.shape[1] * number
    return pairs * ((1 + number) * copies + scores)


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on `device`; None where it can't be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def refuse_oversize(call: WindowCall) -> None:
    """Raise `MemoryError` where the dense computation of `call` would not fit in the free memory."""
    needed, free = dense_bytes(call), free_bytes(call.q.device)
    if free is not None and needed > free:
        raise MemoryError(
            f"the dense mask of {call.grid.tokens} x {call.grid.tokens + call.pooled_count} tokens needs about "
            f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {call.q.device}; "
            "backend='tiled' and backend='flex' compute the same in bounded memory"
        )
