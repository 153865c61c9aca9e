"""Exact attention: out = softmax(scale * q k^T + mask) v.

Source: Vaswani et al., Attention Is All You Need, equation 1, https://arxiv.org/abs/1706.03762.
Swapped into a model it hands the call to the kernel the model itself would have used.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import register
from ..grid import TokenGrid
from .base import Context, Mechanism, default_scale


def softmax_reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """softmax(scale * q k^T) v by explicit exponentials; `mask` is bool (True = may be seen) or additive.

    A query that may see nothing gives zeros. Time and memory O(n m).
    """
    logits = q @ k.transpose(-1, -2) * (default_scale(q) if scale is None else scale)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    peak = logits.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    weight = (logits - peak.detach()).exp()
    total = weight.sum(dim=-1, keepdim=True)
    return (weight / torch.where(total == 0, torch.ones_like(total), total)) @ v


@register("softmax")
@dataclass(frozen=True, kw_only=True)
class SoftmaxAttention(Mechanism):
    """Exact attention over all tokens. Time O(n m d), memory O(n d)."""

    kinds: ClassVar[frozenset[str]] = frozenset({"spatial", "temporal"})
    exact: ClassVar[bool] = True

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
        grid.check(q, k)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=context.mask, scale=scale)

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
        return softmax_reference(q, k, v, scale=scale, mask=context.mask)

    def mask(self, grid: TokenGrid) -> Tensor:
        return torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, *, context: Context = Context()) -> int:
        return 4 * grid.tokens**2 * heads * head_dim
