"""What a window pattern tells the kernels: which cell may see which, and how far.

The kernels know nothing of mechanisms. A pattern is a rule on cell coordinates plus its reach; everything else (tiles,
blocks, masks, gathering) follows from these two.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from ..grid import TokenGrid

Shape = tuple[int, int, int]

CHUNK = 2**22
"""Pairs of cells evaluated at once where a rule is turned into masks: keeps its integer temporaries near 100 MB."""


P = ParamSpec("P")
R = TypeVar("R")


def cached(size: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`functools.lru_cache` for a pure function that a trace may call too: there it runs anew, as torch would warn."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        kept = functools.lru_cache(size)(function)

        @functools.wraps(function)
        def call(*args: P.args, **options: P.kwargs) -> R:
            return function(*args, **options) if torch.compiler.is_compiling() else kept(*args, **options)  # type: ignore[arg-type]

        return call

    return decorate


class Cells(NamedTuple):
    """Coordinates of some cells: three tensors of whole numbers, int or float32, of one broadcastable shape."""

    frame: Tensor
    row: Tensor
    column: Tensor


class Pattern(Protocol):
    """A local rule on the cells of a grid. Must be hashable: kernels cache what they derive from it.

    A rule that depends on nothing but key minus query may say so by `shift_invariant = True` on its class: kernels then
    look at one tile instead of all.

    A rule on tiles may give their `tile` (frames, rows, columns), the first tile beginning at the first cell: the rule
    depends on nothing but key // tile minus query // tile, so that each tile sees whole tiles. Kernels then compute
    whole tiles without looking at a mask. Where the tile does not divide the grid, the last tiles are smaller.
    """

    def allowed(self, query: Cells, key: Cells) -> Tensor:
        """May `query` see `key`? Elementwise boolean over the broadcast shape; traceable by torch.compile.

        Coordinates are whole, but float32 in a compiled kernel: divide them by `divide`. On CUDA padding has keys whose
        coordinates are NaN: the rule must be false for them, as every comparison is.
        """
        ...

    def span(self, axis: int, low: int, high: int, size: int) -> tuple[int, int]:
        """Half-open range of keys on `axis` (0 frames, 1 rows, 2 columns) that queries `low ... high-1` may see.

        It may be too wide, never too narrow, and lies within `0 ... size`.
        """
        ...

    def pairs(self, grid: TokenGrid) -> int:
        """How many pairs of cells see each other, counted without visiting them all."""
        ...


def shift_invariant(pattern: Pattern) -> bool:
    """Whether the rule says that it depends on nothing but key minus query."""
    return bool(getattr(pattern, "shift_invariant", False))


def tile_of(pattern: Pattern) -> Shape | None:
    """The tiles whose cells see, and are seen, alike; single cells of a shift-invariant rule, None of any other."""
    tile: Shape | None = getattr(pattern, "tile", None)
    return (1, 1, 1) if tile is None and shift_invariant(pattern) else tile


def moves_by(pattern: Pattern, step: Shape) -> bool:
    """Whether the rule stays the same where query and key both move by multiples of `step`."""
    tile = tile_of(pattern)
    return tile is not None and all(whole % side == 0 for whole, side in zip(step, tile, strict=True))


def divide(index: Tensor, divisor: int) -> Tensor:
    """index // divisor of whole numbers, exact for |index| < 2^22: int32, or float32 where `index` is.

    Written for vector units, by a shift or a float32 product: in a compiled rule, integer division takes three times
    the time of the attention itself.
    """
    power = divisor & (divisor - 1) == 0
    if index.is_floating_point():
        if divisor == 1:
            return index
        return torch.floor((index if power else index + 0.5) * (1.0 / divisor))
    index = index.to(torch.int32)
    if power:
        return index >> (divisor.bit_length() - 1) if divisor > 1 else index
    return torch.floor((index.to(torch.float32) + 0.5) * (1.0 / divisor)).to(torch.int32)


@cached(1024)
def covers(pattern: Pattern, grid: TokenGrid) -> bool:
    """Whether every cell sees every cell, so that the pattern is no restriction at all."""
    return pattern.pairs(grid) == grid.cells**2


def dense_mask(pattern: Pattern, grid: TokenGrid, pooled: int = 0) -> Tensor:
    """The pattern as a boolean `(tokens, tokens + pooled)`: cells by the rule, other tokens see and are seen by all.

    `pooled` keys at the end are seen by the cells only. Time and memory O(n m): small grids, and the reference.
    """
    query, key = (Cells(*(axis.view(shape) for axis in grid.positions())) for shape in ((-1, 1), (1, -1)))
    mask = torch.ones(grid.tokens, grid.tokens + pooled, dtype=torch.bool)
    step = max(1, CHUNK // grid.cells)
    for start in range(0, grid.cells, step):
        rows = Cells(*(axis[start : start + step] for axis in query))
        stop = start + rows.row.shape[0]
        mask[grid.before + start : grid.before + stop, grid.cell_slice] = pattern.allowed(rows, key)
    mask[: grid.before, grid.tokens :] = False
    mask[grid.before + grid.cells :, grid.tokens :] = False
    return mask
