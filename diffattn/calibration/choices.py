"""What a layer may have in a part of a run, and the choice of one for each: least error at a given price of a pair.

    error(l, p, c) = sum over the steps s of part p of w_s (e_m(l, s - j)^2 + d_j(l, s)^2)
    choice(l, p)   = the c of the least error(l, p, c) + price * pairs(l, p, c)

c = (m, reuse): step s is computed, or takes the output of j steps before. e_m: what the mechanism m in layer l alone
does to the model's output; d_j: what an output of j steps before does; w_s: the square of how far step s moves the
latents. Errors of layers and steps are taken to add up, which is not true but orders the choices.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..grid import TokenGrid
from ..mechanisms.base import Mechanism
from ..swap.settings.schedule import FULL, Part, Schedule


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

    def error(self, layer: int, choice: Choice, steps: Sequence[int]) -> float:
        """Of a layer in the steps of a part."""
        total = 0.0
        for step, lag in lags(steps, choice.reuse, self.steps):
            if choice.mechanism != FULL:
                total += self.own[layer, self.mechanisms.index(choice.mechanism), step - lag]
            if lag:
                total += self.stale[layer, lag - 1, step]
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


def cheapest(measured: Measured, choices: Sequence[Choice], parts: int, price: float) -> Plan:
    """The plan of the least error plus `price` times its share of full attention's operations."""
    several = steps_of(parts, measured.steps)
    full = sum(measured.pairs(layer, Choice(FULL), steps) for layer in range(len(measured.layers)) for steps in several)
    chosen, share, error = [], 0.0, 0.0
    for layer in range(len(measured.layers)):
        row = []
        for steps in several:
            costs = [
                (measured.error(layer, choice, steps), measured.pairs(layer, choice, steps) / full)
                for choice in choices
            ]
            best = min(range(len(choices)), key=lambda number: costs[number][0] + price * costs[number][1])
            row.append(choices[best])
            error, share = error + costs[best][0], share + costs[best][1]
        chosen.append(tuple(row))
    return Plan(tuple(chosen), share, error)


def plans(measured: Measured, choices: Sequence[Choice], parts: int) -> list[Plan]:
    """Those of all prices, each once, the dearest in pairs first."""
    found: dict[tuple[tuple[Choice, ...], ...], Plan] = {}
    largest = max(float(measured.own.sum()), float(measured.stale.sum()), 1e-12)
    for price in np.geomspace(largest * 1e4, largest * 1e-8, 200):
        plan = cheapest(measured, choices, parts, float(price))
        found.setdefault(plan.choices, plan)
    return sorted(found.values(), key=lambda plan: -plan.share)
