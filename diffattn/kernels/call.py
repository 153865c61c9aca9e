"""One request to a kernel: softmax attention under a window pattern."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..grid import TokenGrid
from .order import TileOrder
from .pattern import Pattern


@dataclass(frozen=True)
class WindowCall:
    """What `window_attention` was asked, with the model's mask brought to four dimensions."""

    q: Tensor
    k: Tensor
    v: Tensor
    """Keys and values have as many heads as the queries, or a divisor of their number."""
    grid: TokenGrid
    pattern: Pattern
    scale: float
    mask: Tensor | None = None
    """Bool (True = may be seen) or additive, `(b|1, h|1, n|1, tokens)`."""
    pooled: tuple[Tensor, Tensor] | None = None
    """Keys and values `(b, h, p, d)` that the cells see and the other tokens do not."""
    order: TileOrder | None = None
    """That of the cells of q, k, v and of the output; None: row-major. A mask is always row-major."""

    @property
    def pooled_count(self) -> int:
        return 0 if self.pooled is None else self.pooled[0].shape[-2]

    @property
    def grouped(self) -> bool:
        """Do several heads of queries share one of keys?"""
        return self.q.shape[1] != self.k.shape[1]

    def with_all_heads(self) -> "WindowCall":
        """The same with keys and values copied for every head of queries."""
        if not self.grouped:
            return self
        k, v = repeat_heads(self.k, self.v, self.q.shape[1])
        pooled = None if self.pooled is None else repeat_heads(*self.pooled, self.q.shape[1])
        return replace(self, k=k, v=v, pooled=pooled)

    def in_rows(self) -> "WindowCall":
        """The same with the cells in row-major order."""
        if self.order is None:
            return self
        q, k, v = (reordered(x, self.grid, self.order.from_tiles) for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, order=None)

    @property
    def extra_keys(self) -> int:
        """Keys that every cell sees: other tokens and pooled keys."""
        return self.grid.others + self.pooled_count

    @property
    def masks_queries(self) -> bool:
        """Whether the model's mask differs from query to query."""
        return self.mask is not None and self.mask.shape[-2] > 1

    @property
    def needs_grad(self) -> bool:
        tensors = (self.q, self.k, self.v, self.mask, *(self.pooled or ()))
        return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)

    def extras(self) -> tuple[Tensor, Tensor]:
        """The keys and the values that every cell sees, each `(b, h, others + pooled, d)`."""
        k, v = self.grid.split(self.k)[1], self.grid.split(self.v)[1]
        if self.pooled is None:
            return k, v
        return torch.cat([k, self.pooled[0]], dim=-2), torch.cat([v, self.pooled[1]], dim=-2)

    def key_mask(self) -> tuple[Tensor, Tensor] | None:
        """A model's mask on keys, parted into cells and extras, each `(b|1, h|1, 1, keys)`; None without a mask."""
        if self.mask is None:
            return None
        cells, others = self.grid.split(self.mask, dim=-1)
        return cells, F.pad(others, (0, self.pooled_count), value=others.dtype == torch.bool)

    def attend_others(self) -> Tensor:
        """The queries off the grid: they see all tokens but no pooled keys. `(b, h, others, c)`."""
        return attend_others(self.q, self.k, self.v, self.grid, mask=self.mask, scale=self.scale)

    def join(self, cells: Tensor) -> Tensor:
        """The output in the order of the tokens, from that of the cells `(b, h, cells, c)`."""
        return self.grid.join(cells, self.attend_others()) if self.grid.others else cells


def attend_others(
    q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, *, mask: Tensor | None, scale: float | None
) -> Tensor:
    """What queries off the grid get, `(b, h, others, c)`: softmax over all keys, and zeros where they do not ask."""
    queries, (first, last) = grid.split(q)[1], grid.silent
    if not first + last:
        return F.scaled_dot_product_attention(
            queries, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    if grid.queries == grid.cells:
        return v.new_zeros(*queries.shape[:3], v.shape[3])
    asking = slice(first, grid.others - last)
    mask = mask if mask is None or mask.shape[-2] == 1 else mask[..., asking, :]
    out = F.scaled_dot_product_attention(
        queries[:, :, asking], k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return F.pad(out, (0, 0, first, last))


def reordered(tokens: Tensor, grid: TokenGrid, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`(b, h, n, d)` with its cells changed."""
    cells, _ = grid.split(tokens)
    return grid.join(change(cells), grid.split(tokens)[1]) if grid.others else change(cells)


def repeat_heads(key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Grouped-query attention: repeat the heads of `(b, g, m, d)` keys and values up to `heads`."""
    return key.repeat_interleave(heads // key.shape[1], 1), value.repeat_interleave(heads // value.shape[1], 1)


def window_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: TokenGrid,
    pattern: Pattern,
    scale: float,
    mask: Tensor | None,
    pooled: tuple[Tensor, Tensor] | None,
    order: TileOrder | None = None,
) -> WindowCall:
    """Check the shapes and bring `mask` to `(b|1, h|1, n|1, tokens)`."""
    grid.check(q, k)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
        full = (q.shape[0], q.shape[1], grid.tokens, grid.tokens)
        if mask.dim() != 4 or any(size not in (1, whole) for size, whole in zip(mask.shape, full, strict=True)):
            raise ValueError(
                f"the mask must broadcast to (batch, heads, queries, keys) = {full}, got {tuple(mask.shape)}"
            )
        mask = mask.expand(-1, -1, -1, grid.tokens)
        if mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
    if pooled is not None and pooled[0].shape[-2] != pooled[1].shape[-2]:
        raise ValueError(
            f"as many pooled keys as values are needed, got {pooled[0].shape[-2]} and {pooled[1].shape[-2]}"
        )
    return WindowCall(q, k, v, grid, pattern, scale, mask, pooled, order)
