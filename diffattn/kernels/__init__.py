"""How windows are computed: dense, tiled, by FlexAttention in tile order, NATTEN or xformers; and chosen tiles."""

from torch import Tensor

from ..grid import TokenGrid
from .call import window_call
from .choose import BACKENDS, Backend, Choice, run
from .order import TileOrder
from .pattern import Cells, Pattern, dense_mask

__all__ = ["BACKENDS", "Backend", "Cells", "Choice", "Pattern", "dense_mask", "window_attention"]


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
    order: TileOrder | None = None,
) -> Tensor:
    """Softmax attention where cells see the cells that `pattern` allows, all other tokens and the `pooled` keys.

    Other tokens see all tokens, but no pooled key. Returns `(b, h, n, c)`.

    Args:
        scale: multiplies the logits.
        backend: "auto" or a name in `BACKENDS`; the result is the same.
        mask: the model's own mask, bool (True = may be seen) or additive, broadcastable to (b, h, n, n). One that
            differs from query to query is computed densely: "auto" does so, "tiled" and "flex" refuse.
        pooled: further keys and values, each `(b, h, p, d)`, that the cells alone see.
        order: in which the cells come and leave; None: row-major. A mask is row-major.
    """
    return run(window_call(q, k, v, grid, pattern, scale, mask, pooled, order), backend)
