"""From a budget to options: the mechanism with the largest share of all pairs that is not above it.

A `Solver` gives, for a cell and what may be spent, a mechanism and its share, or none and the reason. Where even the
smallest option is above the budget, that one is given, and the reason says so.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from fidelity.methods import share_of

from diffattn import Mechanism, TokenGrid, config
from diffattn.mechanisms import Context

from .cells import Cell

FAR = 0.75
"""A share below this part of the budget is said to be far below it."""
Values = Sequence[Any] | Callable[[Cell], Sequence[Any]]
"""What an option may be: everywhere, or in a cell."""


class Found(NamedTuple):
    """What a solver came to."""

    mechanism: Mechanism | None
    share: float
    """Of all pairs, in one computed call."""
    note: str = ""


Solver = Callable[[Cell, float], Found]


def contexts(mechanism: Mechanism) -> list[Context]:
    """Those of the layers that differ: two in turn where the number of the layer counts."""
    progress = 0.5 if "progress" in mechanism.needs else None
    return [
        Context(call_index=index, progress=progress) for index in range(2 if "call_index" in mechanism.needs else 1)
    ]


def pairs(mechanism: Mechanism, cell: Cell) -> float:
    """Share of all pairs that are computed, mean over heads and layers; others' operations count as pairs."""
    grid, heads, dim = cell.grid, cell.heads, cell.head_dim
    split = getattr(mechanism, "groups", None)
    if callable(split):  # other heads may have other mechanisms
        shares = [
            sum(_of_one(part, grid, len(own), dim, inner) * len(own) for part, own, inner in groups) / heads
            for groups in (list(split(heads, context)) for context in contexts(mechanism))
        ]
    else:
        shares = [_of_one(mechanism, grid, heads, dim, context) for context in contexts(mechanism)]
    return sum(shares) / len(shares)


def _of_one(mechanism: Mechanism, grid: TokenGrid, heads: int, dim: int, context: Context) -> float:
    if hasattr(mechanism, "share_on"):
        return share_of(mechanism, grid)
    return mechanism.flops(grid, heads, dim, context=context) / (4 * heads * dim * grid.tokens**2)


def operations(mechanism: Mechanism, cell: Cell) -> float:
    """Floating-point operations of one call, choices included, mean over the layers."""
    counts = [mechanism.flops(cell.grid, cell.heads, cell.head_dim, context=context) for context in contexts(mechanism)]
    return sum(counts) / len(counts)


def largest(name: str, size: tuple[str, Values] | None = None, **others: Values) -> Solver:
    """The largest of `name` with its option `size` in rising order of cost, in every combination of `others`."""

    def solve(cell: Cell, budget: float) -> Found:
        try:
            cls = config.lookup(name)  # once: it looks at what is installed
        except ValueError:
            return Found(None, 0.0, "not in this version")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = [own for own in (*others, *((size[0],) if size else ())) if own not in known]
        if unknown:
            return Found(None, 0.0, f"has no option {unknown[0]!r} in this version")
        option, values = (None, [None]) if size is None else (size[0], _at(size[1], cell))
        rows, why = [], "no option of it fits"
        for combination in itertools.product(*(_at(value, cell) for value in others.values())):
            row = []
            for value in values:
                options = dict(zip(others, combination, strict=True)) | ({} if option is None else {option: value})
                try:
                    mechanism = cls(**options)
                    mechanism.check(cell.grid)
                except ValueError as error:
                    why = str(error).partition(";")[0]
                else:
                    row.append(mechanism)
            if row:
                rows.append(row)
        return best(rows, cell, budget) if rows else Found(None, 0.0, why)

    return solve


def _at(values: Values, cell: Cell) -> Sequence[Any]:
    return values(cell) if callable(values) else values


def best(rows: Iterable[Sequence[Mechanism]], cell: Cell, budget: float) -> Found:
    """The largest share within the budget, of rows in rising order of cost; else the smallest of all."""
    within: list[tuple[float, Mechanism]] = []
    beyond: list[tuple[float, Mechanism]] = []
    for row in rows:
        tried = row if len(row) < 32 or cell.is_video else _near(row, cell, budget)
        for mechanism in tried:
            try:
                share = pairs(mechanism, cell)
            except ValueError:
                continue
            (within if share <= budget else beyond).append((share, mechanism))
    if not within:
        if not beyond:
            return Found(None, 0.0, "no option of it fits the grid")
        share, mechanism = min(beyond, key=lambda own: own[0])
        return Found(mechanism, share, f"the least that it can be, above {budget:.0%}")
    share, mechanism = max(within, key=lambda own: own[0])
    return Found(mechanism, share, f"the most below {budget:.0%}" if share < FAR * budget else "")


def _near(row: Sequence[Mechanism], cell: Cell, budget: float) -> Sequence[Mechanism]:
    """Those around the place where the budget is passed, and the first."""
    place = bisect.bisect_right(row, budget, key=lambda mechanism: pairs(mechanism, cell))
    return [row[0], *row[max(place - 3, 0) : place + 3]]


def two_kinds(small: Solver, large: Solver) -> Solver:
    """`per_head`: half of the heads with about half of the budget by `small`, the other half with the rest."""

    def solve(cell: Cell, budget: float) -> Found:
        try:
            cls = config.lookup("per_head")
        except ValueError:
            return Found(None, 0.0, "not in this version")
        first = small(cell, budget / 2)
        second = large(cell, 2 * budget - first.share)
        if first.mechanism is None or second.mechanism is None:
            return Found(None, 0.0, first.note or second.note)
        return best([[cls(mechanisms=(first.mechanism, second.mechanism))]], cell, budget)

    return solve


def only_video(solver: Solver) -> Solver:
    """Where there are frames."""
    return lambda cell, budget: solver(cell, budget) if cell.is_video else Found(None, 0.0, "needs frames")
