"""How a window pattern is computed: dense, on gathered tiles, or by FlexAttention in tile order."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..grid import TokenGrid
from .dense import combine_masks
from .pattern import Pattern, dense_mask


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: TokenGrid,
    pattern: Pattern,
    *,
    scale: float,
    backend: str = "auto",
    mask: Tensor | None = None,
    pooled: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Softmax attention under a window pattern."""
    grid.check(q, k)
    extra = 0
    if pooled is not None:
        k, v = torch.cat([k, pooled[0]], dim=-2), torch.cat([v, pooled[1]], dim=-2)
        extra = pooled[0].shape[-2]
    allowed = combine_masks(dense_mask(pattern, grid, extra).to(q.device), mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)
