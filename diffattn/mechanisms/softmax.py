"""Exact attention: out = softmax(scale * q k^T + mask) v.

Source: Vaswani et al., Attention Is All You Need, equation 1, https://arxiv.org/abs/1706.03762.
Swapped into a model it hands the call to the kernel the model itself would have used.

`proportional` and `ntk_factor` are CLEAR's two changes for images larger than those of training, without its window:
the baseline that its released high-resolution code compares with (Liu et al., https://arxiv.org/abs/2412.16112).
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import register
from ..grid import TokenGrid
from ..options import POSITIVE
from .base import Context, Mechanism, default_scale, mask_as

OFFICIAL_TRAIN_TOKENS = 64**2 + 512
"""Of FLUX.1 at 1024 pixels a side, text included."""


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


def proportional_scale(scale: float, tokens: int, train_tokens: int) -> float:
    """`scale` times sqrt(log_L0 L), for a sequence of L tokens where training had L0.

    It keeps the entropy of the weights about what it was in training; 1 at L = L0.
    Source: Jin et al., https://arxiv.org/abs/2306.08645.
    """
    return scale * math.sqrt(math.log(tokens, train_tokens))


def check_train_tokens(name: str, train_tokens: int) -> None:
    """Raise `ValueError` for an L0 whose logarithm nothing can be divided by."""
    if train_tokens < 2:
        raise ValueError(f"{name}: train_tokens must be at least 2, got {train_tokens}")


@register("softmax")
@dataclass(frozen=True, kw_only=True)
class SoftmaxAttention(Mechanism):
    """Attention over all tokens. Time O(n m d), memory O(n d).

    As it is by default the model's own kernel computes it; with `proportional` or `ntk_factor`, torch's.
    """

    proportional: bool = False
    """Scale the logits by sqrt(log_L0 L), for sequences longer than those of training."""
    train_tokens: int = OFFICIAL_TRAIN_TOKENS
    """L0: tokens of a sequence in training, text included."""
    ntk_factor: Annotated[float, POSITIVE] = 1.0
    """Multiplies the base (theta) of the model's rotary position embedding."""

    kinds: ClassVar[frozenset[str]] = frozenset({"spatial", "temporal"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_train_tokens(self.type, self.train_tokens)

    @property
    def exact(self) -> bool:
        return not self.proportional and self.ntk_factor == 1.0

    @property
    def scales(self) -> bool:
        return True

    def scale(self, q: Tensor, grid: TokenGrid, scale: float | None) -> float:
        """`scale` (default 1/sqrt(d)), times sqrt(log_L0 L) if `proportional`."""
        scale = default_scale(q) if scale is None else scale
        return proportional_scale(scale, grid.tokens, self.train_tokens) if self.proportional else scale

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
        mask = mask_as(context.mask, q)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale(q, grid, scale))

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
        return softmax_reference(q, k, v, scale=self.scale(q, grid, scale), mask=context.mask)

    def mask(self, grid: TokenGrid) -> Tensor:
        return torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, *, context: Context = Context()) -> int:
        return 4 * grid.pairs * heads * head_dim
