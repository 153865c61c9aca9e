"""Shifted windows: half of the heads see their window, the other half one that is shifted by half a window.

    out_q = softmax_k(scale * q k^T) v,    k in { text } + { k : window_h(k) = window_h(q) }
    window_h(i) = floor(i / w) along every axis for even heads h,    floor((i + floor(w / 2)) / w) for odd ones

Windows do not overlap; those that a border cuts are smaller, and an axis that a window covers is not shifted. Text
queries see all tokens. So every layer passes information between neighbouring windows, at the cost of one window.

`pool=p` keeps what the windows leave out, without training: what a query does not see of a p x p block counts by its
mean key and value and the log of its number of cells (`kernels/grouped/complement.py`).

Source: Zhang et al., StyleSwin: Transformer-based GAN for High-resolution Image Generation, section 3.2 (double
attention), https://arxiv.org/abs/2112.10762, after the shifted windows of Liu et al., Swin Transformer,
https://arxiv.org/abs/2103.14030. Differences: heads alternate in place of two halves; borders cut windows, where those
papers shift cyclically under a mask; there are no position biases. The images are those of the model only where `pool`
is given or the layers were trained for it.
"""

from dataclasses import dataclass
from typing import Annotated

from ...config import register
from ..base import Context, Mechanism
from ..parts.axes import PerAxis, sizes
from ..parts.heads import ByHead
from ..parts.partitioned import Partitioned


@register("shifted_window")
@dataclass(frozen=True, kw_only=True)
class ShiftedWindowAttention(ByHead):
    """Windows, shifted for every second head. Time O(n (w^2 + others) d), with `pool` O(n (w^2 + n / p^2) d).

    >>> from diffattn import TokenGrid
    >>> ShiftedWindowAttention(window=16).flops(TokenGrid(64, 64, before=512), heads=24, head_dim=128) / 1e9
    66.135785472
    """

    window: Annotated[PerAxis, sizes(1)] = 8
    """Sides of a window in tokens: (rows, columns), (frames, rows, columns), or one int for all of them."""
    pool: Annotated[PerAxis | None, sizes(1)] = None
    """Sides of the blocks whose means stand for what a query does not see, likewise. None: it is not seen."""

    def parts(self, context: Context) -> tuple[Mechanism, ...]:
        own = Partitioned(name=self.type, window=self.window, pool=self.pool)
        return own, Partitioned(name=self.type, window=self.window, pool=self.pool, shifted=True)
