"""Cost in floating-point operations, and what a call needs to be timed."""

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from ..grid import TokenGrid
from ..mechanisms.base import Context, Mechanism
from ..mechanisms.softmax import SoftmaxAttention

Call = tuple[Mechanism, TokenGrid, int, int]
"""One attention call: mechanism, grid, heads, head dimension."""


def attention_share(calls: Iterable[Call]) -> float:
    """Floating-point operations of these calls over those of exact attention in their place; `ValueError` for none."""
    cheap = exact = 0
    for mechanism, grid, heads, head_dim in calls:
        cheap += mechanism.flops(grid, heads, head_dim)
        exact += SoftmaxAttention().flops(grid, heads, head_dim)
    if not exact:
        raise ValueError("attention_share needs at least one attention call")
    return cheap / exact


def as_in_a_model(mechanism: Mechanism, q: Tensor) -> Context:
    """What a model would tell a mechanism for queries `(b, h, n, d)`: fresh weights, and hidden states if it asks."""
    weights = mechanism.weights(q.shape[1], q.shape[-1])
    context = Context() if weights is None else Context(weights=weights.to(q.device).requires_grad_(False))
    if "hidden" not in mechanism.needs:
        return context
    channels = getattr(mechanism, "channels", None) or q.shape[1] * q.shape[-1]
    return replace(context, hidden=q.new_ones(q.shape[0], q.shape[2], channels))
