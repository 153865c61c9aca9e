"""Criss-cross attention: every cell sees its row and its column, and all text.

    out_q = softmax_k(scale * q k^T) v
    k in { text } + { same frame: same strip of rows, or same strip of columns } + { other frames: the same tile }

Strips are `width` aligned rows, or columns, counted from the first; a tile is where two of them cross. `width=1` is the
published form: a cell sees the cells of its row and of its column, itself once. Wider strips cost more and see more.
With several frames, the place of a tile is seen through all of them. Text queries see all text and all image tokens.

`pool=p` keeps what the cross leaves out, without training: it is rounded out to whole p x p blocks, and every other
block counts by its mean key and value and the log of its number of cells (`parts/rounded.py`). Blocks that divide
the width round nothing out.

The cross is a union of partitions, each of equal parts without a mask of its own for every query: rows with all of
their cells, columns without the cells of the own strip of rows, and tiles without the own frame. Each is one SDPA on
all its parts, text is one more, and the four are put together by the log-sum-exp of their logits (`kernels/lse.py`).

Source: Huang et al., CCNet: Criss-Cross Attention for Semantic Segmentation, section on criss-cross attention,
https://arxiv.org/abs/1811.11721. Differences: the paper's module is run twice with the same weights, so that all cells
reach each other; here as many layers do so as the model has. Strips of several rows, frames, text and `pool` are not in
the paper.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from diffattn.config import register
from diffattn.grid import TokenGrid
from diffattn.kernels.call import WindowCall, window_call
from diffattn.kernels.choose import DENSE_MOST, GENERAL_BACKENDS, LIMITS, Choice, run
from diffattn.kernels.dense import combine_masks
from diffattn.kernels.flex import order_of
from diffattn.kernels.lse import attend_with_lse
from diffattn.kernels.order import TileOrder
from diffattn.kernels.pattern import Cells, Shape, covers, dense_mask, divide
from diffattn.options import Must

from ..base import Context
from ..parts.exact_tiles import only_densely
from ..parts.window import Window
from ..softmax import softmax_reference

WIDTH = Must(
    "an int of at least 1, or (rows, columns) of such",
    lambda value: min(value if isinstance(value, tuple) else (value,)) >= 1,
)

# Measured on 2 busy CPU cores, one thread, 4 heads x 64, float32, 32 text tokens, medians of 5 in ms:
#   cells     width   share   dense   strips
#   16 x 16   1       0.31       10       11
#   24 x 24   1       0.18       28       18
#   24 x 24   8       0.60       38       38
#   32 x 32   1       0.12       99       28
#   32 x 32   8       0.47       89       64
DENSE_CELLS = 400
"""Up to this many cells, `auto` on a CPU computes the mask densely."""
SAVING = 2
"""Times that a cross must have fewer pairs than the grid for strips to pay."""


@dataclass(frozen=True)
class Cross:
    """The pattern on tiles (1, rows, columns): the same strip of rows or of columns, or the same tile in any frame."""

    tile: Shape

    def allowed(self, query: Cells, key: Cells) -> Tensor:
        frames, rows, columns = (
            divide(one, side) - divide(other, side) for one, other, side in zip(query, key, self.tile, strict=True)
        )
        row, column = rows == 0, columns == 0
        return (row & column) | ((frames == 0) & (row | column))

    def span(self, axis: int, low: int, high: int, size: int) -> tuple[int, int]:
        return 0, size

    def pairs(self, grid: TokenGrid) -> int:
        squares = [
            sum(min(side, size - low) ** 2 for low in range(0, size, side))
            for size, side in zip(grid.shape[1:], self.tile[1:], strict=True)
        ]
        rows, columns = grid.width**2 * squares[0], grid.height**2 * squares[1]
        return grid.frames * (rows + columns + (grid.frames - 2) * squares[0] * squares[1])


@register("criss_cross")
@dataclass(frozen=True, kw_only=True)
class CrissCrossAttention(Window):
    """Row and column of every cell. Time O(n (width (rows + columns) + frames + others) d).

    >>> CrissCrossAttention(width=8).flops(TokenGrid(64, 64, before=512), heads=24, head_dim=128) / 1e9
    103.079215104
    """

    across_rows: ClassVar[bool] = True

    width: Annotated[int | tuple[int, int], WIDTH] = 1
    """Rows of a strip of rows and columns of a strip of columns, or (rows, columns)."""

    window_backends: ClassVar[tuple[str, ...]] = ("auto", "strips", *GENERAL_BACKENDS)

    def pattern(self, grid: TokenGrid) -> Cross:
        rows, columns = self.width if isinstance(self.width, tuple) else (self.width, self.width)
        return Cross((1, rows, columns))

    def choose(self, call: WindowCall) -> Choice:
        """What "auto" runs."""
        reason = only_densely(call.mask)
        if reason is not None:
            return Choice("dense", f"strips can't serve it: {reason}")
        cells = call.grid.cells
        least = (
            DENSE_CELLS if call.q.device.type == "cpu" else LIMITS.get(call.q.device.type, LIMITS["cpu"]).dense_cells
        )
        if cells <= least:
            return Choice("dense", f"the pattern saves nothing on {cells} cells")
        if covers(call.pattern, call.grid):
            return Choice("dense", "the cross covers the grid")
        if cells <= DENSE_MOST and SAVING * call.pattern.pairs(call.grid) > cells**2:
            return Choice("dense", "strips save too little: the cross has more than half of the pairs")
        return Choice("strips", "rows, columns and tiles through time by one SDPA each")

    def cell_order(self, q: Tensor, grid: TokenGrid, backend: str) -> TileOrder | None:
        if self.pool is not None or backend != "flex":
            return None
        return order_of(window_call(q, q, q, grid, self.pattern(grid), 1.0, None, None))

    def explain_backend(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, backend: str, context: Context) -> str:
        if self.pool is not None or backend != "auto":
            return super().explain_backend(q, k, v, grid, backend, context)
        choice = self.choose(self.window_call(q, k, v, grid, context))
        return f"{choice.backend}: {choice.reason}"

    def attend_window(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, scale: float, backend: str, context: Context
    ) -> Tensor:
        call = window_call(q, k, v, grid, self.pattern(grid), scale, context.mask, None, context.order)
        backend = self.choose(call).backend if backend == "auto" else backend
        if backend != "strips":
            return run(call, backend)
        reason = only_densely(call.mask)
        if reason is not None:
            raise ValueError(f"backend='strips' can't serve this call: {reason}; can: auto, dense")
        with torch.autocast(q.device.type, enabled=False):  # which would take logits in half precision
            return attend_strips(call.with_all_heads(), self.pattern(grid).tile)

    def window_reference(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, scale: float, context: Context
    ) -> Tensor:
        mask = combine_masks(self.window_mask(grid).to(q.device), context.mask)
        return softmax_reference(q, k, v, scale=scale, mask=mask)

    def window_mask(self, grid: TokenGrid) -> Tensor:
        return dense_mask(self.pattern(grid), grid)


class Part(NamedTuple):
    """Attention to a part of the keys."""

    out: Tensor  # b h f y x c
    lse: Tensor  # b h f y x 1

    def and_also(self, other: "Part") -> "Part":
        """Attention to both parts."""
        share = torch.sigmoid(other.lse - self.lse).to(self.out.dtype)
        return Part(torch.lerp(self.out, other.out, share), torch.logaddexp(self.lse, other.lse))


def attend_strips(call: WindowCall, tile: Shape) -> Tensor:
    """The output `(b, h, n, c)` of a cross with tiles (1, rows, columns); a mask is the same for all queries."""
    grid, scale = call.grid, call.scale
    (frames, height, width), (_, rows, columns) = grid.shape, tile
    cells = [grid.split(x)[0].unflatten(2, grid.shape) for x in (call.q, call.k, call.v)]
    bias, other_bias = biases(call)
    found = attend_parts(cells, bias, scale, (1, rows, width))
    if height > rows:
        found = found.and_also(attend_parts(cells, bias, scale, (1, height, columns), own_rows=rows))
    if frames > 1:
        found = found.and_also(attend_parts(cells, bias, scale, (frames, rows, columns), own_frame=True))
    if grid.others:
        k, v = call.extras()
        out, lse = attend_with_lse(grid.split(call.q)[0], k, v, scale, other_bias)
        found = found.and_also(Part(precise(out).unflatten(2, grid.shape), lse[..., None].unflatten(2, grid.shape)))
    return call.join(found.out.flatten(2, 4).to(call.v.dtype))


def hidden(dtype: torch.dtype) -> float:
    """What is added to a logit that does not count. Finite: a part of hidden keys alone then weighs nothing."""
    return torch.finfo(dtype).min / 4


def biases(call: WindowCall) -> tuple[Tensor | None, Tensor | None]:
    """The model's mask to add, on cells `(b|1, h|1, f, y, x, 1)` and on other tokens `(b|1, h|1, 1, e)`; None: none."""
    masks, dtype = call.key_mask(), call.q.dtype
    if masks is None:
        return None, None
    cells, others = (
        torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, hidden(dtype))
        if mask.dtype == torch.bool
        else mask.to(dtype).clamp(min=hidden(dtype))
        for mask in masks
    )
    return cells.mT.unflatten(2, call.grid.shape), others


def precise(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def runs(size: int, side: int) -> list[tuple[slice, int]]:
    """An axis in pieces that tiles of one side fill: the whole ones, and the last that is smaller."""
    whole = size // side * side
    pieces = [(slice(0, whole), side), (slice(whole, size), size - whole)]
    return [(piece, side) for piece, side in pieces if piece.stop > piece.start]


def attend_parts(
    cells: list[Tensor], bias: Tensor | None, scale: float, tile: Shape, own_rows: int = 0, own_frame: bool = False
) -> Part:
    """Every cell of q, k, v `(b, h, f, y, x, d)` sees those of its tile.

    Args:
        tile: its frames divide the grid's; the last rows and columns may be smaller.
        own_rows: leave out what lies in the same strip of so many rows; 0: nothing.
        own_frame: leave out what lies in the same frame.
    """
    bands = []
    for down, rows in runs(cells[0].shape[3], tile[1]):
        pieces = []
        for across, columns in runs(cells[0].shape[4], tile[2]):
            side = tile[0], rows, columns
            q, k, v = (into_tiles(x[:, :, :, down, across], side) for x in cells)
            added = left_out(side, own_rows, own_frame, q)
            if bias is not None:
                own = bias[:, :, :, down, across].expand(*cells[0].shape[:2], -1, -1, -1, -1)
                own = into_tiles(own, side).mT
                added = own if added is None else own + added
            out, lse = attend_with_lse(q, k, v, scale, added)
            box = cells[0][:, :, :, down, across].shape[:5]
            pieces.append(Part(from_tiles(precise(out), side, box), from_tiles(lse[..., None], side, box)))
        bands.append(Part(*(torch.cat(parts, dim=4) for parts in zip(*pieces, strict=True))))
    return Part(*(torch.cat(parts, dim=3) for parts in zip(*bands, strict=True)))


def left_out(tile: Shape, own_rows: int, own_frame: bool, q: Tensor) -> Tensor | None:
    """What is added to the logits of the cells of a tile, `(cells, cells)`; None: nothing."""
    if not own_rows and not own_frame:
        return None
    index = torch.arange(tile[0] * tile[1] * tile[2], device=q.device)
    place = index // (tile[1] * tile[2]) if own_frame else index // tile[2] % tile[1] // own_rows
    added = torch.zeros(len(index), len(index), dtype=q.dtype, device=q.device)
    return added.masked_fill_(place[:, None] == place, hidden(q.dtype))


def into_tiles(x: Tensor, tile: Shape) -> Tensor:
    """`b h f y x d` -> `(b h) tiles cells d`, tiles that divide the grid."""
    sizes = [part for size, side in zip(x.shape[2:5], tile, strict=True) for part in (size // side, side)]
    parted = x.reshape(*x.shape[:2], *sizes, x.shape[5]).permute(0, 1, 2, 4, 6, 3, 5, 7, 8)
    return parted.reshape(x.shape[0] * x.shape[1], -1, tile[0] * tile[1] * tile[2], x.shape[5])


def from_tiles(x: Tensor, tile: Shape, box: torch.Size) -> Tensor:
    """Undo `into_tiles`; `box` is `b h f y x`."""
    counts = [size // side for size, side in zip(box[2:], tile, strict=True)]
    parted = x.reshape(*box[:2], *counts, *tile, x.shape[-1]).permute(0, 1, 2, 5, 3, 6, 4, 7, 8)
    return parted.reshape(*box, x.shape[-1])
