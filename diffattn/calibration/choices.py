"""What a layer may have in a part of a run, and the choice of one for each: least error at a given price of a pair.

    error(l, p, c) = sum over the steps s of part p of w_s (e_m(l, s - j)^2 + a d_j(l, s)^2)
    choice(l, p)   = the c of the least error(l, p, c) + price * pairs(l, p, c)

c = (m, reuse): step s is computed, or takes the output of j steps before. e_m: what the mechanism m in layer l alone
does to the model's output; d_j: what an output of j steps before does; w_s: the square of how far step s moves the
latents. Errors of layers and steps are taken to add up, which is not true: those of a mechanism go the same way in
many layers and steps, those of an output of before less so. How much less can't be seen layer by layer. So there is a
row of plans for each of several weights a (`STALE`), and one of each choice for all layers and parts; real runs tell
which row is best.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..grid import TokenGrid
from ..mechanisms.base import Mechanism
from ..swap.settings.schedule import FULL, Part, Schedule

STALE = (1 / 64, 1 / 8, 1.0)
"""How much the error of an output of before counts."""


@dataclass(frozen=True)
class Choice:
    """A mechanism, computed in one of `reuse` steps."""

    mechanism: Mechanism
    reuse: int = 1

    def __str__(self) -> str:
        return str(Part(self.mechanism, self.reuse))


@dataclass(frozen=True)
class Measured:
    """What was measured on the model's own path, in the mean over the prompts."""

    layers: tuple[str, ...]
    grids: tuple[TokenGrid, ...]
    """Of each layer."""
    heads: tuple[tuple[int, int], ...]
    """Heads of each layer, and their size."""
    mechanisms: tuple[Mechanism, ...]
    own: np.ndarray
    """`(layers, mechanisms, steps)`: square of the change of the model's output, times the square of the step."""
    stale: np.ndarray
    """`(layers, lags, steps)`: the same for full attention's output of 1, 2, .. steps before."""
    skipped: int = 0
    """Steps of the schedule before the run's first."""

    @property
    def steps(self) -> int:
        """Of the run."""
        return int(self.own.shape[2])

    def error(self, layer: int, choice: Choice, steps: Sequence[int], stale: float = 1.0) -> float:
        """Of a layer in the steps of a part; `stale`: how much outputs of before count."""
        total = 0.0
        for step, lag in lags(steps, choice.reuse, self.steps):
            if choice.mechanism != FULL:
                total += self.own[layer, self.mechanisms.index(choice.mechanism), step - lag]
            if lag:
                total += stale * self.stale[layer, lag - 1, step]
        return float(total)

    def pairs(self, layer: int, choice: Choice, steps: Sequence[int]) -> float:
        """Floating-point operations of a layer in the steps of a part."""
        computed = sum(lag == 0 for _, lag in lags(steps, choice.reuse, self.steps))
        return float(computed * choice.mechanism.flops(self.grids[layer], *self.heads[layer]))


def lags(steps: Sequence[int], reuse: int, total: int) -> list[tuple[int, int]]:
    """Each step of a part, and how many steps before the output that it gives was computed."""
    found, last = [], -reuse
    for step in steps:
        if step - last >= reuse or step == total - 1:
            last = step
        found.append((step, step - last))
    return found


def steps_of(parts: int, total: int) -> list[list[int]]:
    """The steps of each of so many equal parts of a run, as a `Schedule` has them; without the empty ones."""
    ends = Schedule(tuple(Part(FULL, until=(number + 1) / parts) for number in range(parts)))
    found: list[list[int]] = [[] for _ in range(parts)]
    for step in range(total):
        found[ends.number(step / total)].append(step)
    return found


@dataclass(frozen=True)
class Plan:
    """A choice for every layer and part, with what it is foreseen to cost."""

    choices: tuple[tuple[Choice, ...], ...]
    """Layer -> part."""
    share: float
    """Floating-point operations over those of full attention."""
    error: float
    """As foreseen."""

    def schedules(self, measured: Measured) -> Mapping[str, Schedule]:
        """Layer -> schedule, but for layers that are full throughout; parts of the run as shares of the schedule."""
        found, (skipped, steps) = {}, (measured.skipped, measured.steps)
        for name, choices in zip(measured.layers, self.choices, strict=True):
            count = len(choices)
            ends = [(skipped * count + steps * (number + 1)) / ((skipped + steps) * count) for number in range(count)]
            parts = [Part(own.mechanism, own.reuse, end) for own, end in zip(choices, ends, strict=True)]
            if not all(part.own for part in parts):
                found[name] = Schedule(tuple(parts))
        return found


def plan_of(measured: Measured, choices: Sequence[Sequence[Choice]], stale: float = 1.0) -> Plan:
    """A choice for every layer and part, with its cost and error."""
    several = steps_of(len(choices[0]), measured.steps)
    share, error = 0.0, 0.0
    for layer, row in enumerate(choices):
        for choice, steps in zip(row, several, strict=True):
            share += measured.pairs(layer, choice, steps)
            error += measured.error(layer, choice, steps, stale)
    full = sum(measured.pairs(layer, Choice(FULL), range(measured.steps)) for layer in range(len(choices)))
    return Plan(tuple(map(tuple, choices)), share / full, error)


def cheapest(measured: Measured, choices: Sequence[Choice], parts: int, price: float, stale: float = 1.0) -> Plan:
    """The plan of the least error plus `price` times its share of full attention's operations."""
    full = sum(measured.pairs(layer, Choice(FULL), range(measured.steps)) for layer in range(len(measured.layers)))

    def best(layer: int, steps: Sequence[int]) -> Choice:
        return min(
            choices,
            key=lambda choice: (
                measured.error(layer, choice, steps, stale) + price * measured.pairs(layer, choice, steps) / full
            ),
        )

    several = steps_of(parts, measured.steps)
    chosen = [[best(layer, steps) for steps in several] for layer in range(len(measured.layers))]
    return plan_of(measured, chosen, stale)


def plans(measured: Measured, choices: Sequence[Choice], parts: int, stale: float = 1.0) -> list[Plan]:
    """Those of all prices, each once, the dearest in pairs first."""
    found: dict[tuple[tuple[Choice, ...], ...], Plan] = {}
    largest = max(float(measured.own.sum()), float(measured.stale.sum()), 1e-12)
    for price in np.geomspace(largest * 1e4, largest * 1e-8, 200):
        plan = cheapest(measured, choices, parts, float(price), stale)
        found.setdefault(plan.choices, plan)
    return sorted(found.values(), key=lambda plan: -plan.share)


def uniform(measured: Measured, choices: Sequence[Choice]) -> list[Plan]:
    """One choice for all layers and steps, the dearest in pairs first."""
    found = [plan_of(measured, [[choice]] * len(measured.layers)) for choice in choices]
    return sorted(found, key=lambda plan: -plan.share)


def rows_of_plans(measured: Measured, choices: Sequence[Choice], parts: int) -> list[list[Plan]]:
    """Rows of plans, each from dear to cheap: by weights of outputs of before, and one choice for all by reuse."""
    rows = [plans(measured, choices, parts, stale) for stale in STALE]
    kinds: dict[tuple[str, int], list[Choice]] = {}
    for choice in choices:
        kinds.setdefault((choice.mechanism.type, choice.reuse), []).append(choice)
    return rows + [uniform(measured, kind) for kind in kinds.values()]
