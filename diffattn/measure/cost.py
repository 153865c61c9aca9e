"""Cost in floating-point operations."""

from collections.abc import Iterable

from ..grid import TokenGrid
from ..mechanisms.base import Mechanism
from ..mechanisms.softmax import SoftmaxAttention

Call = tuple[Mechanism, TokenGrid, int, int]
"""One attention call: mechanism, grid, heads, head dimension."""


def attention_share(calls: Iterable[Call]) -> float:
    """Floating-point operations of these calls over those of exact attention in their place."""
    cheap = exact = 0
    for mechanism, grid, heads, head_dim in calls:
        cheap += mechanism.flops(grid, heads, head_dim)
        exact += SoftmaxAttention().flops(grid, heads, head_dim)
    if not exact:
        raise ValueError("attention_share needs at least one attention call")
    return cheap / exact
