"""CLEAR: every image token sees the image tokens within a circle, and all text.

    out_q = softmax_k(scale * q k^T) v,    k in { text } + { k : |position(q) - position(k)| < radius } + { pooled }

Text queries see all text and all image tokens. The circle is strict (`<`) and neither wraps nor shifts at borders, so
tokens at the edge have fewer keys. With several frames it is a ball in (t, y, x), or a cylinder with `radius_t`.

`down_factor=f` appends, for the image queries, one key and value per f x f block: the block's keys (after norm and
rotary embedding) and values summed with learned weights, the same for all heads and channels, 1/f^2 at first.

`pool=p` keeps what the window leaves out, without training: the window is rounded out to whole p x p blocks, and every
other block counts by its mean key and value and the log of its number of cells (`parts/rounded.py`).

`proportional=True` multiplies the logits by sqrt(log_L0 L): L tokens now, L0 = `train_tokens` in training.

Source: Liu et al., CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up, section 3,
https://arxiv.org/abs/2412.16112. The paper's window size is our `radius`. Differences from the released code: any text
length, any grid, any training length; `official=True` brings back its constants (L0 = 4608, and 10 L in place of L
where keys are pooled). A pooled key counts once, as published, though it stands for f^2 tokens.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from ..config import register
from ..grid import TokenGrid
from ..kernels import window_attention
from ..kernels.call import WindowCall, window_call
from ..kernels.choose import GENERAL_BACKENDS
from ..kernels.dense import combine_masks
from ..kernels.pattern import Cells, dense_mask
from ..options import POSITIVE, Must
from .base import Context, default_scale
from .parts.window import Window
from .softmax import OFFICIAL_TRAIN_TOKENS, check_train_tokens, proportional_scale, softmax_reference

OFFICIAL_POOLED_LENGTH_FACTOR = 10


@dataclass(frozen=True)
class Ball:
    """The pattern dt^2 + dy^2 + dx^2 < radius^2; with `radius_t`: |dt| < radius_t and dy^2 + dx^2 < radius^2."""

    radius: Annotated[float, POSITIVE]
    radius_t: Annotated[float | None, POSITIVE] = None
    shift_invariant: ClassVar[bool] = True

    def allowed(self, query: Cells, key: Cells) -> Tensor:
        frames, rows, columns = query.frame - key.frame, query.row - key.row, query.column - key.column
        distance = rows * rows + columns * columns
        if self.radius_t is None:
            return distance < self.radius**2 - frames * frames  # a compiler can fold the right side of a single frame
        return (distance < self.radius**2) & (frames * frames < self.radius_t**2)

    def span(self, axis: int, low: int, high: int, size: int) -> tuple[int, int]:
        radius = self.radius_t if axis == 0 and self.radius_t is not None else self.radius
        reach = math.ceil(radius) - 1
        return max(low - reach, 0), min(high + reach, size)

    def pairs(self, grid: TokenGrid) -> int:
        offsets, weights = [], []
        for axis, size in enumerate(grid.shape):
            low, high = self.span(axis, size - 1, size, 2 * size - 1)
            offsets.append(torch.arange(low, high) - (size - 1))
            weights.append(size - offsets[-1].abs())
        zero = torch.zeros(1, dtype=torch.long)
        allowed = self.allowed(Cells(zero, zero, zero), Cells(*torch.meshgrid(*offsets, indexing="ij")))
        return int(torch.einsum("fyx,f,y,x->", allowed.long(), *weights))


class PooledKeys(nn.Module):
    """CLEAR's learned pooling weights, `(1, 1, 1, f, 1, f, 1)` as in the released files."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.spatial_weight = nn.Parameter(torch.full((1, 1, 1, factor, 1, factor, 1), 1 / factor**2))

    def forward(self, tokens: Tensor, grid: TokenGrid) -> Tensor:
        """Pool `(b, h, n, d)` to `(b, h, frames * rows/f * columns/f, d)`."""
        return pool(tokens[..., grid.cell_slice, :], grid, self.spatial_weight)


def pool(cells: Tensor, grid: TokenGrid, weight: Tensor) -> Tensor:
    """Sum every f x f block of `(b, h, cells, d)` with `weight` `(1, 1, 1, f, 1, f, 1)`."""
    factor = weight.shape[3]
    blocks = cells.unflatten(-2, (grid.frames * grid.height // factor, factor, grid.width // factor, factor))
    return (blocks * weight.to(cells)).sum(dim=(3, 5)).flatten(2, 3)


@register("clear")
@dataclass(frozen=True, kw_only=True)
class ClearAttention(Window):
    """CLEAR's circular local window. Time O(n (radius^2 + others) d), plus O(n^2 / f^2 d) with pooled keys.

    >>> ClearAttention(radius=16).flops(TokenGrid(64, 64, before=512), heads=24, head_dim=128) / 1e9
    86.646718464
    """

    radius: Annotated[float, POSITIVE]
    """Radius of the window in tokens, exclusive: 1 is the token alone, 2 a square of 9, 8 a disc of 193."""
    radius_t: Annotated[float | None, POSITIVE] = None
    """Radius along the frames; None makes the window a ball."""
    down_factor: Annotated[
        int | None, Must("None or an int of at least 2 and at most 4096", lambda factor: 2 <= factor <= 4096)
    ] = None
    """Side of the blocks that pooled keys stand for; None for no pooled keys."""
    proportional: bool = False
    """Scale the logits by sqrt(log_L0 L), for sequences longer than those of training."""
    train_tokens: int = OFFICIAL_TRAIN_TOKENS
    """L0: tokens of a sequence in training, text included."""
    ntk_factor: Annotated[float, POSITIVE] = 1.0
    """Multiplies the base (theta) of the model's rotary position embedding; 10 in the paper's high-resolution runs."""
    official: bool = False
    """Reproduce the constants of the released code."""

    window_backends: ClassVar[tuple[str, ...]] = ("auto", *GENERAL_BACKENDS)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_train_tokens(self.type, self.train_tokens)
        if self.pool is not None and self.down_factor is not None:
            raise ValueError(
                f"clear: pool={self.pool} and down_factor={self.down_factor} both stand for what the window leaves "
                "out; give down_factor for the published weights, pool without training"
            )

    @property
    def only_pattern(self) -> bool:
        return super().only_pattern and self.down_factor is None

    def computes_in_order(self, grid: TokenGrid) -> bool:
        return self.down_factor is None

    def pattern(self, grid: TokenGrid) -> Ball:
        return Ball(self.radius, self.radius_t)

    def check(self, grid: TokenGrid, *, context: Context = Context()) -> None:
        super().check(grid, context=context)
        factor = self.down_factor
        if factor is not None and (grid.height % factor or grid.width % factor):
            raise ValueError(
                f"clear: down_factor={factor} does not divide the grid of {grid.height} rows and {grid.width} columns; "
                f"use an image whose sides are multiples of {factor} tokens, or another down_factor"
            )

    def scale(self, q: Tensor, grid: TokenGrid, scale: float | None) -> float:
        """`scale` (default 1/sqrt(d)), times sqrt(log_L0 L) if `proportional`."""
        scale = default_scale(q) if scale is None else scale
        if not self.proportional:
            return scale
        tokens, train_tokens = grid.tokens, self.train_tokens
        if self.official:
            train_tokens = OFFICIAL_TRAIN_TOKENS
            tokens *= OFFICIAL_POOLED_LENGTH_FACTOR if self.down_factor else 1
        return proportional_scale(scale, tokens, train_tokens)

    def pooled(self, grid: TokenGrid) -> int:
        """Number of pooled keys."""
        return grid.cells // self.down_factor**2 if self.down_factor else 0

    def pooled_keys(self, k: Tensor, v: Tensor, grid: TokenGrid, context: Context) -> tuple[Tensor, Tensor] | None:
        """The pooled keys and values, each `(b, h, cells / f^2, d)`; None without `down_factor`."""
        if self.down_factor is None:
            return None
        weights = context.weights or PooledKeys(self.down_factor)
        return weights(k, grid), weights(v, grid)

    def attend_window(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, scale: float, backend: str, context: Context
    ) -> Tensor:
        pooled = self.pooled_keys(k, v, grid, context)
        return window_attention(
            q, k, v, grid, self.pattern(grid), scale=scale, backend=backend, mask=context.mask, pooled=pooled,
            order=context.order,
        )  # fmt: skip

    def window_call(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, context: Context) -> WindowCall:
        pooled = (k[..., : self.pooled(grid), :], v[..., : self.pooled(grid), :]) if self.down_factor else None
        return window_call(q, k, v, grid, self.pattern(grid), 1.0, context.mask, pooled)

    def window_reference(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, scale: float, context: Context
    ) -> Tensor:
        mask = self.window_mask(grid).to(q.device)
        pooled = self.pooled_keys(k, v, grid, context)
        if pooled is not None:
            k, v = torch.cat([k, pooled[0]], dim=-2), torch.cat([v, pooled[1]], dim=-2)
        return softmax_reference(q, k, v, scale=scale, mask=combine_masks(mask, context.mask))

    def window_mask(self, grid: TokenGrid) -> Tensor:
        return dense_mask(self.pattern(grid), grid, pooled=self.pooled(grid))

    def window_pairs(self, grid: TokenGrid) -> int:
        return super().window_pairs(grid) + grid.cells * self.pooled(grid)

    def weights(self, heads: int, head_dim: int) -> nn.Module | None:
        return PooledKeys(self.down_factor) if self.down_factor else super().weights(heads, head_dim)
