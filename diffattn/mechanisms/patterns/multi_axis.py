"""Multi-axis attention: blocks of neighbours, and a grid of cells spread over the whole image.

    out_q = softmax_k(scale * q k^T) v,    k in { text } + { k : class(k) = class(q) along every axis }
    block: class(i) = floor(i / w)        grid: class(i) = i mod ceil(n / w),  n cells along the axis

Of w x w cells each: a block is local, a grid is global and sparse. Even heads have blocks and odd heads grids, or, with
`by="layers"`, even and odd layers in turn. Text queries see all tokens.

`pool=p` keeps what is left out, without training: what a query does not see of a p x p block counts by its mean key and
value and the log of its number of cells (`kernels/grouped/complement.py`).

Source: Tu et al., MaxViT: Multi-Axis Vision Transformer, section 3.2, https://arxiv.org/abs/2204.01697, where the two
follow each other in every block. Near it: Qin et al., Factorization Vision Transformer, dilated groups of several
distances, https://arxiv.org/abs/2312.08614. Differences: a swapped layer has one attention, so heads or layers share;
grids that w does not divide have classes that differ by one cell; there are no position biases. The images are those of
the model only where `pool` is given or the layers were trained for it.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from ...config import register
from ..base import Context, Mechanism
from ..parts.axes import PerAxis, sizes
from ..parts.heads import ByHead
from ..parts.partitioned import Partitioned


@register("multi_axis")
@dataclass(frozen=True, kw_only=True)
class MultiAxisAttention(ByHead):
    """Blocks and dilated grids. Time O(n (w^2 + others) d), with `pool` O(n (w^2 + n / p^2) d).

    >>> from diffattn import TokenGrid
    >>> MultiAxisAttention(window=16).flops(TokenGrid(64, 64, before=512), heads=24, head_dim=128) / 1e9
    67.645734912
    """

    window: Annotated[PerAxis, sizes(1)] = 8
    """Cells of a block and of a grid along each axis: (rows, columns), (frames, rows, columns), or one int."""
    by: Literal["heads", "layers"] = "heads"
    """What alternates between blocks and grids."""
    pool: Annotated[PerAxis | None, sizes(1)] = None
    """Sides of the blocks whose means stand for what a query does not see, likewise. None: it is not seen."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"call_index"} if self.by == "layers" else ())

    @property
    def every_part(self) -> tuple[Mechanism, ...]:
        own = Partitioned(name=self.type, window=self.window, pool=self.pool)
        return own, Partitioned(name=self.type, window=self.window, pool=self.pool, dilated=True)

    def parts(self, context: Context) -> tuple[Mechanism, ...]:
        both = self.every_part
        return both if self.by == "heads" else (both[context.call_index % 2],)

    @property
    def period(self) -> tuple[int, ...]:
        return (0, 1) if self.by == "heads" else (0,)
