"""What the kernel tests share: patterns that are no mechanism's, one call with its dense reference, the tolerances."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

from diffattn.grid import TokenGrid
from diffattn.kernels.call import WindowCall, window_call
from diffattn.kernels.dense import combine_masks
from diffattn.kernels.pattern import Cells, dense_mask
from diffattn.mechanisms.softmax import softmax_reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Disc:
    """A round window that moves with its query."""

    radius: float
    shift_invariant: ClassVar[bool] = True

    def allowed(self, query: Cells, key: Cells) -> Tensor:
        return sum((a - b) ** 2 for a, b in zip(query, key, strict=True)) < self.radius**2  # type: ignore[return-value]

    def span(self, axis: int, low: int, high: int, size: int) -> tuple[int, int]:
        reach = int(self.radius)
        return max(low - reach, 0), min(high + reach, size)

    def pairs(self, grid: TokenGrid) -> int:
        reach = int(self.radius)
        places = itertools.product(*(range(-min(reach, size - 1), min(reach, size - 1) + 1) for size in grid.shape))
        near = (place for place in places if sum(offset**2 for offset in place) < self.radius**2)
        return sum(math.prod(size - abs(o) for size, o in zip(grid.shape, place, strict=True)) for place in near)


@dataclass(frozen=True)
class Lattice:
    """Every second cell of one's own block of `side` rows and columns: depends on where the query is, and has holes."""

    side: int

    def allowed(self, query: Cells, key: Cells) -> Tensor:
        block = (query.row // self.side == key.row // self.side) & (
            query.column // self.side == key.column // self.side
        )
        return block & ((query.row + query.column + key.row + key.column) % 2 == 0)

    def span(self, axis: int, low: int, high: int, size: int) -> tuple[int, int]:
        if axis == 0:
            return 0, size
        return low // self.side * self.side, min(((high - 1) // self.side + 1) * self.side, size)

    def pairs(self, grid: TokenGrid) -> int:
        return int(dense_mask(self, TokenGrid(grid.height, grid.width, grid.frames)).sum())


@dataclass(frozen=True)
class Bricks:
    """A rule on tiles: a diamond of them, `reach` steps along the axes away from one's own."""

    tile: tuple[int, int, int]
    reach: int

    def allowed(self, query: Cells, key: Cells) -> Tensor:
        steps = (
            (torch.div(one, side, rounding_mode="floor") - torch.div(other, side, rounding_mode="floor")).abs()
            for one, other, side in zip(query, key, self.tile, strict=True)
        )
        return sum(steps) <= self.reach  # type: ignore[return-value]

    def span(self, axis: int, low: int, high: int, size: int) -> tuple[int, int]:
        side = self.tile[axis]
        return max(low // side - self.reach, 0) * side, min(((high - 1) // side + 1 + self.reach) * side, size)

    def pairs(self, grid: TokenGrid) -> int:
        return int(dense_mask(self, TokenGrid(grid.height, grid.width, grid.frames)).sum())


class Case(NamedTuple):
    """A call, the leaves one may differentiate, and the result by explicit exponentials in float64."""

    call: WindowCall
    leaves: tuple[Tensor, ...]
    expected: Tensor


@pytest.fixture(scope="session")
def disc() -> type[Disc]:
    return Disc


@pytest.fixture(scope="session")
def lattice() -> type[Lattice]:
    return Lattice


@pytest.fixture(scope="session")
def bricks() -> type[Bricks]:
    return Bricks


@pytest.fixture(scope="session")
def tolerance() -> dict[torch.dtype, float]:
    return TOLERANCE


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    """`make_case(grid, pattern, ...)`; mask: None, "bool" and "bias" on the keys, "query" on pairs."""

    def make(
        grid: TokenGrid,
        pattern: Any,
        *,
        batch: int = 1,
        heads: int = 2,
        dim: int = 8,
        pooled: int = 0,
        mask: str | None = None,
        dtype: torch.dtype = torch.float64,
        grad: bool = False,
        seed: int = 0,
    ) -> Case:
        random = torch.Generator().manual_seed(seed)

        def normal(tokens: int) -> Tensor:
            # as a model hands it over: the heads lie within each token
            values = torch.randn(batch, tokens, heads, dim, generator=random, dtype=torch.float64).to(dtype)
            return values.transpose(1, 2).requires_grad_(grad)

        q, k, v = (normal(grid.tokens) for _ in range(3))
        extra = (normal(pooled), normal(pooled)) if pooled else None
        rows = grid.tokens if mask == "query" else 1
        given: Tensor | None = None
        if mask == "bias":
            given = torch.randn(batch, heads, 1, grid.tokens, generator=random, dtype=torch.float64).to(dtype)
        elif mask is not None:
            given = torch.rand(batch, 1, rows, grid.tokens, generator=random) > 0.3
        keys, values = (k, v) if extra is None else (torch.cat([k, extra[0]], 2), torch.cat([v, extra[1]], 2))
        allowed = combine_masks(dense_mask(pattern, grid, pooled), given if given is None else _wide(given))
        expected = softmax_reference(q.double(), keys.double(), values.double(), scale=0.3, mask=allowed)
        call = window_call(q, k, v, grid, pattern, 0.3, given, extra)
        return Case(call, (q, k, v, *(extra or ())), expected)

    return make


def _wide(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask.double()
