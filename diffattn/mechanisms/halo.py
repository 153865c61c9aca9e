"""Blocked local attention: every tile of queries sees its own and the neighbouring tiles, each of them whole.

    out_q = softmax_k(scale * q k^T) v,    k in { text } + { k : |tile(q) - tile(k)| <= halo on every axis }

tile(p) = floor(position / tile side), counted from the first row, column and frame. With `radius`: the tiles whose
centres lie strictly within `radius` tokens of the query tile's centre, all tiles taken at full size. Text queries see
all text and all image tokens. The window of a tile ends where the grid ends, and the last tiles of a grid that the tile
does not divide are smaller.

`pool=p` keeps what the window leaves out, without training: every p x p block of the other tiles counts by its mean key
and value and the log of its number of cells (`parts/rounded.py`). It divides the tile.

No tile is seen in part, so that no work goes into hidden pairs and no kernel evaluates a mask: a window of many more
keys takes the time of a round one (`clear`), whose blocks are cut by the circle.

Sources: Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones (HaloNet), section 2.2,
https://arxiv.org/abs/2103.12731, for images; Zhang et al., Fast Video Generation with Sliding Tile Attention, section
3, https://arxiv.org/abs/2502.04507, for video, with tiles of (6, 8, 8) and windows of (3, 3, 3) tiles, here
`tile=(6, 8, 8), halo=1`. Differences: HaloNet counts its halo in pixels, in attention without text, and pads the grid
with zeros; Sliding Tile Attention moves windows at a border inward, so that all have as many tiles, and needs grids
that its tile divides. The round set of tiles is in neither paper.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..config import register
from ..grid import TokenGrid
from ..kernels import window_attention
from ..kernels.choose import GENERAL_BACKENDS
from ..kernels.dense import combine_masks
from ..kernels.pattern import Cells, Shape, dense_mask, divide
from ..options import POSITIVE
from .base import Context
from .parts.axes import PerAxis, check_divides, per_axis, sizes
from .parts.window import Window
from .softmax import softmax_reference


@dataclass(frozen=True)
class TileWindow:
    """The pattern on tiles: `halo` of them on each side, or, with a radius, those whose centres lie within it."""

    tile: Shape
    halo: Shape
    radius: Annotated[float | None, POSITIVE] = None

    def allowed(self, query: Cells, key: Cells) -> Tensor:
        places = zip(query, key, self.tile, strict=True)
        frames, rows, columns = (divide(one, side) - divide(other, side) for one, other, side in places)
        if self.radius is None:
            near = (frames.abs() <= self.halo[0]) & (rows.abs() <= self.halo[1])
            return near & (columns.abs() <= self.halo[2])
        frames, rows, columns = frames * self.tile[0], rows * self.tile[1], columns * self.tile[2]
        return frames * frames + rows * rows + columns * columns < self.radius**2

    def reach(self, axis: int) -> int:
        """The farthest tile that is seen along `axis`."""
        if self.radius is None:
            return self.halo[axis]
        farthest = math.ceil(self.radius / self.tile[axis])
        return farthest if (farthest * self.tile[axis]) ** 2 < self.radius**2 else farthest - 1

    def span(self, axis: int, low: int, high: int, size: int) -> tuple[int, int]:
        side, reach = self.tile[axis], self.reach(axis)
        return max((low // side - reach) * side, 0), min(((high - 1) // side + 1 + reach) * side, size)

    def pairs(self, grid: TokenGrid) -> int:
        offsets, weights = [], []
        for axis, size in enumerate(grid.shape):
            side = self.tile[axis]
            cells = torch.tensor([min(side, size - low) for low in range(0, size, side)])
            most = min(self.reach(axis), len(cells) - 1)
            ahead = [int((cells[: len(cells) - offset] * cells[offset:]).sum()) for offset in range(most + 1)]
            offsets.append(torch.arange(-most, most + 1) * side)
            weights.append(torch.tensor(ahead[:0:-1] + ahead))
        zero = torch.zeros(1, dtype=torch.long)
        allowed = self.allowed(Cells(zero, zero, zero), Cells(*torch.meshgrid(*offsets, indexing="ij")))
        return int(torch.einsum("fyx,f,y,x->", allowed.long(), *weights))


@register("halo")
@dataclass(frozen=True, kw_only=True)
class HaloAttention(Window):
    """Attention from tile to neighbouring tiles. Time O(n (window + others) d), window = tile (2 halo + 1) per axis.

    The kernels compute whole tiles without a mask from 16 tokens a tile on (4 x 4), fastest from 64 (8 x 8); on CUDA
    FlexAttention does so where a tile, or an equal part of it, has a multiple of 128 tokens: (8, 16), (6, 8, 8).

    >>> HaloAttention(tile=8, halo=2).flops(TokenGrid(64, 64, before=512), heads=24, head_dim=128) / 1e9
    112.944218112
    """

    tile: Annotated[PerAxis, sizes(1)] = 8
    """Sides of a tile in tokens: (rows, columns) for images, (frames, rows, columns), or one int for all of them."""
    halo: Annotated[PerAxis, sizes(0)] = 1
    """How many neighbouring tiles are seen on each side, likewise per axis: 1 is a window of 3 tiles along each."""
    radius: Annotated[float | None, POSITIVE] = None
    """See the tiles whose centres lie strictly within this many tokens, instead of `halo`."""

    window_backends: ClassVar[tuple[str, ...]] = ("auto", *GENERAL_BACKENDS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool is not None:
            check_divides(self.type, self.tile, self.pool)
        if self.radius is None:
            return
        if self.halo != 1:
            raise ValueError(f"halo: radius={self.radius} takes the place of halo={self.halo}; give one of the two")

    @property
    def window_tile(self) -> PerAxis:
        return self.tile

    def pattern(self, grid: TokenGrid) -> TileWindow:
        return TileWindow(per_axis(self.tile, 1), per_axis(self.halo, 0), self.radius)

    def check(self, grid: TokenGrid, *, context: Context = Context()) -> None:
        super().check(grid, context=context)
        for name in ("tile", "halo"):
            value = getattr(self, name)
            if grid.frames > 1 and isinstance(value, tuple) and len(value) == 2:
                raise ValueError(
                    f"halo: {name}={value} says nothing of frames, and the grid {grid} has {grid.frames}; give "
                    f"(frames, rows, columns), such as {name}={(1, *value) if name == 'tile' else (0, *value)} to keep "
                    "frames apart"
                )

    def attend_window(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, scale: float, backend: str, context: Context
    ) -> Tensor:
        return window_attention(
            q, k, v, grid, self.pattern(grid), scale=scale, backend=backend, mask=context.mask, order=context.order
        )

    def window_reference(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, scale: float, context: Context
    ) -> Tensor:
        mask = combine_masks(self.window_mask(grid).to(q.device), context.mask)
        return softmax_reference(q, k, v, scale=scale, mask=mask)

    def window_mask(self, grid: TokenGrid) -> Tensor:
        return dense_mask(self.pattern(grid), grid)
