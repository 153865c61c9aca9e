"""Neighborhood attention: every cell sees the `kernel_size` cells nearest to it along each axis, and all text.

    out_q = softmax_k(scale * q k^T) v,    k in { text } + { cells whose row, column (and frame) lie in q's window }

Along an axis of n cells, the query at i sees, of the cells whose index leaves the same rest by `dilation` d, those from

    s = min(max(p - floor(K/2), 0), N - K)  up to, exclusive,  s + K       p = floor(i / d),  N = cells of that rest
    s = max(p - K + 1, 0)  up to and including  p                          where the axis is causal

counted among themselves. So the window is shifted inwards at the borders, not cut: every query of a non-causal axis has
the same number of keys. An even window reaches one cell further back than ahead. Text queries see everything.

Sources: Hassani et al., Neighborhood Attention Transformer, section 3.1, https://arxiv.org/abs/2204.07143; dilation:
Hassani and Shi, https://arxiv.org/abs/2209.15001, section 3.2; causal axes and even windows: Hassani et al.,
https://arxiv.org/abs/2403.04690, and the NATTEN library. Differences: where NATTEN refuses a window, for its
kernel_size * dilation is beyond the axis, it is all cells of that rest here; there are no relative position biases, and
NATTEN's `stride` is left out.

`pool=p` keeps what the window leaves out, without training: the window is rounded out to whole p x p blocks, a dilated
one to all that it touches, and every other block counts by its mean key and value and the log of its number of cells
(`parts/rounded.py`). Not where an axis is causal.

A dilated window has holes. So the cells are first brought into an order where those of the same rest lie side by side,
each axis by itself: every window is then an interval again, whatever the dilation, and costs no more than undilated.
"""

import functools
import math
import operator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..config import register
from ..grid import TokenGrid
from ..kernels import BACKENDS
from ..kernels.call import WindowCall, window_call
from ..kernels.choose import run, takes_natten
from ..kernels.dense import combine_masks
from ..kernels.natten import NattenOptions
from ..kernels.pattern import Cells, divide
from ..options import Must
from .base import Context
from .parts.window import Window
from .softmax import softmax_reference

ALONE = {"kernel_size": 1, "dilation": 1, "is_causal": False}
"""Every option with its value on an axis of a single cell."""


@dataclass(frozen=True)
class Line:
    """The rule along one axis. `grouped`: its cells lie in the order of `group_order`."""

    size: int
    kernel_size: int
    dilation: int
    is_causal: bool
    grouped: bool = False

    @property
    def restricts(self) -> bool:
        """Whether any cell is hidden from another."""
        return self.size > 1 and (self.is_causal or self.dilation > 1 or self.kernel_size < self.size)

    def class_of(self, cell: int) -> tuple[int, int, int]:
        """The first cell that leaves the same rest as `cell`, the distance between such cells, and their number."""
        if self.dilation == 1:
            return 0, 1, self.size
        short, longer = self.size // self.dilation, self.size % self.dilation
        if not self.grouped:
            rest = cell % self.dilation
            return rest, self.dilation, short + (rest < longer)
        edge = longer * (short + 1)
        first, count = (0, short + 1) if cell < edge else (edge, short)
        return first + (cell - first) // count * count, 1, count

    def window(self, cell: int) -> range:
        """The cells that `cell` sees."""
        first, step, count = self.class_of(cell)
        place = (cell - first) // step
        if self.is_causal:
            start, end = max(place - self.kernel_size + 1, 0), place + 1
        else:
            start = max(min(place - self.kernel_size // 2, count - self.kernel_size), 0)
            end = min(start + self.kernel_size, count)
        return range(first + step * start, first + step * end, step)

    def table(self) -> Tensor:
        """`window` as a boolean `(queries, keys)`."""
        seen = torch.zeros(self.size, self.size, dtype=torch.bool)
        for cell in range(self.size):
            window = self.window(cell)
            seen[cell, window.start : window.stop : window.step] = True
        return seen

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        """`window` for tensors. All arithmetic is on the query; a key is only compared."""
        begin, place, count = self._locate(query)
        if self.is_causal:
            start, end = torch.clamp(place - (self.kernel_size - 1), min=0), place + 1
        else:
            start = torch.clamp(torch.clamp(place - self.kernel_size // 2, max=count - self.kernel_size), min=0)
            end = torch.clamp(start + self.kernel_size, max=count)
        if self.grouped or self.dilation == 1:
            return (key >= begin + start) & (key < begin + end)
        near = (key >= begin + start * self.dilation) & (key < begin + end * self.dilation)
        return near & ((key - query) % self.dilation == 0)

    def _locate(self, cell: Tensor) -> tuple[Tensor | int, Tensor, Tensor | int]:
        """The first cell of the same rest, the place among these, and their number."""
        if self.dilation == 1:
            return 0, cell, self.size
        short, longer = self.size // self.dilation, self.size % self.dilation
        if not self.grouped:
            place = divide(cell, self.dilation)
            rest = cell - place * self.dilation
            return rest, place, short + (rest < longer).to(rest.dtype)
        if longer == 0:
            begin = divide(cell, short) * short
            return begin, cell - begin, short
        edge = longer * (short + 1)
        # where every rest has one cell at most, none lies beyond the edge
        late = edge + divide(cell - edge, max(short, 1)) * short
        begin = torch.where(cell < edge, divide(cell, short + 1) * (short + 1), late)
        return begin, cell - begin, short + (cell < edge).to(begin.dtype)

    def span(self, low: int, high: int) -> tuple[int, int]:
        """The range that holds the windows of `low ... high-1`: they move with the query, within each rest."""
        if self.grouped or self.dilation == 1:
            return self.window(low).start, self.window(high - 1).stop
        first = min(self.window(cell).start for cell in range(low, min(low + self.dilation, high)))
        last = max(self.window(cell)[-1] for cell in range(max(high - self.dilation, low), high))
        return first, last + 1

    def group_order(self, device: torch.device) -> Tensor:
        """The cells by their rest, then ascending, `(size,)`."""
        cells = torch.arange(self.size, device=device)
        return torch.cat([cells[rest :: self.dilation] for rest in range(min(self.dilation, self.size))])


@dataclass(frozen=True)
class Neighborhood:
    """The pattern: a rule each along frames, rows and columns."""

    lines: tuple[Line, Line, Line]

    def allowed(self, query: Cells, key: Cells) -> Tensor:
        axes = zip(self.lines, query, key, strict=True)
        rules = [line.allowed(own, other) for line, own, other in axes if line.restricts]
        return functools.reduce(operator.and_, rules) if rules else query.column + key.column >= 0

    def span(self, axis: int, low: int, high: int, size: int) -> tuple[int, int]:
        return self.lines[axis].span(low, high)

    def pairs(self, grid: TokenGrid) -> int:
        return math.prod(sum(len(line.window(cell)) for cell in range(line.size)) for line in self.lines)

    @property
    def dilated(self) -> bool:
        return any(line.dilation > 1 for line in self.lines)

    def grouped(self) -> "Neighborhood":
        """The rule for cells in the order of `group_order`."""
        frames, rows, columns = (replace(line, grouped=True) for line in self.lines)
        return Neighborhood((frames, rows, columns))

    @property
    def natten(self) -> NattenOptions | None:
        """The rule as NATTEN takes it; None in an order that it does not know."""
        if any(line.grouped for line in self.lines):
            return None
        options = zip(*((line.kernel_size, line.dilation, line.is_causal) for line in self.lines), strict=True)
        return NattenOptions(*options)

    def group_order(self, grid: TokenGrid, device: torch.device) -> Tensor:
        """The tokens in an order where every window is a box: cells by their rest along each axis, `(tokens,)`."""
        tokens = torch.arange(grid.tokens, device=device)
        cells = tokens[grid.cell_slice].view(grid.shape)
        for axis, line in enumerate(self.lines):
            cells = cells.index_select(axis, line.group_order(device))
        return torch.cat([tokens[: grid.before], cells.flatten(), tokens[grid.before + grid.cells :]])


def _per_axis(words: str, least: int) -> Must:
    """One value for all axes, or one for each."""

    def holds(value: int | tuple[int, ...]) -> bool:
        values = value if isinstance(value, tuple) else (value, value)
        return len(values) in (2, 3) and min(values) >= least

    return Must(f"{words}, or one for each axis as (rows, columns) or (frames, rows, columns)", holds)


@register("neighborhood")
@dataclass(frozen=True, kw_only=True)
class NeighborhoodAttention(Window):
    """The nearest `kernel_size` cells along each axis, as in NATTEN. Time O(n (window + others) d).

    Every option is one value for all axes, or one for each: (rows, columns) on images, (frames, rows, columns) on
    images and videos. A window larger than the axis is the whole axis, so one value also fits axes of a single cell.

    >>> NeighborhoodAttention(kernel_size=13).flops(TokenGrid(64, 64, before=512), heads=24, head_dim=128) / 1e9
    63.266881536
    """

    kernel_size: Annotated[int | tuple[int, ...], _per_axis("an int of at least 1", 1)]
    """Cells that a query sees along an axis."""
    dilation: Annotated[int | tuple[int, ...], _per_axis("an int of at least 1", 1)] = 1
    """Distance between the cells that a query sees along an axis."""
    is_causal: Annotated[bool | tuple[bool, ...], _per_axis("a bool", 0)] = False
    """Whether a query sees only itself and the cells before it along an axis."""

    window_backends: ClassVar[tuple[str, ...]] = ("auto", *BACKENDS)

    def __post_init__(self) -> None:
        super().__post_init__()
        causal = any(self.is_causal) if isinstance(self.is_causal, tuple) else self.is_causal
        if causal and self.pool is not None:
            raise ValueError(
                f"neighborhood: pool={self.pool} counts all that the window leaves out, and is_causal={self.is_causal} "
                "forbids what comes after; leave one of the two out"
            )

    def check(self, grid: TokenGrid, *, context: Context = Context()) -> None:
        super().check(grid, context=context)
        for name, least in ALONE.items():
            value = getattr(self, name)
            if grid.frames > 1 and isinstance(value, tuple) and len(value) == 2:
                raise ValueError(
                    f"neighborhood: {name}={value} is for rows and columns, and the grid {grid} has {grid.frames} "
                    f"frames as well; give (frames, rows, columns), such as {(least, *value)}"
                )

    def computes_in_order(self, grid: TokenGrid) -> bool:
        return not self.pattern(grid).dilated

    def pattern(self, grid: TokenGrid) -> Neighborhood:
        """The rule on `grid`."""
        options = []
        for name, least in ALONE.items():
            value = getattr(self, name)
            values = (least, *value)[-3:] if isinstance(value, tuple) else (value,) * 3
            options.append([own if size > 1 else least for own, size in zip(values, grid.shape, strict=True)])
        frames, rows, columns = (Line(*values) for values in zip(grid.shape, *options, strict=True))
        return Neighborhood((frames, rows, columns))

    def attend_window(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, scale: float, backend: str, context: Context
    ) -> Tensor:
        pattern = self.pattern(grid)
        call = window_call(q, k, v, grid, pattern, scale, context.mask, None, context.order)
        if not pattern.dilated or takes_natten(call, backend):
            return run(call, backend)
        order = pattern.group_order(grid, q.device)
        out = run(reordered(call, pattern.grouped(), order), backend)
        return out.index_select(2, order.argsort())

    def window_call(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, context: Context) -> WindowCall:
        pattern = self.pattern(grid)
        call = window_call(q, k, v, grid, pattern, 1.0, context.mask, None)
        if not pattern.dilated or takes_natten(call, "auto"):
            return call
        return replace(call, pattern=pattern.grouped())

    def window_reference(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, scale: float, context: Context
    ) -> Tensor:
        mask = combine_masks(self.window_mask(grid).to(q.device), context.mask)
        return softmax_reference(q, k, v, scale=scale, mask=mask)

    def window_mask(self, grid: TokenGrid) -> Tensor:
        frames, rows, columns = (line.table() for line in self.pattern(grid).lines)
        cells = frames[:, None, None, :, None, None] & rows[:, None, None, :, None] & columns[:, None, None, :]
        mask = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
        mask[grid.cell_slice, grid.cell_slice] = cells.flatten(3).flatten(0, 2)
        return mask


def reordered(call: WindowCall, pattern: Neighborhood, order: Tensor) -> WindowCall:
    """`call` with `pattern` and its tokens, and the model's mask on them, in another order."""
    q, k, v = (tensor.index_select(2, order) for tensor in (call.q, call.k, call.v))
    mask = call.mask
    if mask is not None:
        mask = mask.index_select(3, order)
        mask = mask.index_select(2, order) if call.masks_queries else mask
    return replace(call, q=q, k=k, v=v, pattern=pattern, mask=mask)
