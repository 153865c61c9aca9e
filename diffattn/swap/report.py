"""What is swapped, what is kept and why, and what it costs."""

import itertools
import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..grid import TokenGrid
from ..mechanisms.softmax import SoftmaxAttention
from .apply import swaps_of
from .calls.records import REUSED, SWAPPED
from .calls.worth import Worth
from .exact import exact_layers, exact_models
from .layer import SwappedLayer
from .model_swap import ModelSwap
from .ordering import IN_LAYERS, wants_order
from .plan import COMPONENTS, attention_modules, models_of


@dataclass(frozen=True)
class Row:
    """One attention layer."""

    model: str
    layer: str
    swapped: bool
    note: str
    """The mechanism, or the reason why the layer was kept."""
    grid: TokenGrid | None = None
    """Grid of the last call; None before the first."""
    flops_before: int | None = None
    """Exact attention on one sample of that grid; a multiply-add counts as two."""
    flops_after: int | None = None
    calls: dict[str, int] | None = None
    """What the layer did in the last run, or in the last forward outside a pipeline: outcome -> number of calls."""
    computed: tuple[int, int] = (0, 0)
    """Operations of those calls, and of exact attention in their place."""


@dataclass(frozen=True)
class Summary:
    """Every attention layer of a model or pipeline; `print` it, or read `rows`."""

    rows: tuple[Row, ...]
    orders: dict[str, str] = field(default_factory=dict)
    """Class name of a model with windows -> how its tokens came in the order of the kernel in its last call."""
    worth: dict[str, Worth] = field(default_factory=dict)
    """Class name of a transformer -> what its last forward could gain, by counted operations."""

    @property
    def share(self) -> float | None:
        """Attention operations after the swap over those before, across the swapped layers that have run."""
        known = [row for row in self.rows if row.flops_before is not None and row.flops_after is not None]
        before = sum(row.flops_before or 0 for row in known)
        return sum(row.flops_after or 0 for row in known) / before if before else None

    @property
    def calls(self) -> dict[str, int]:
        """What the swapped layers did in the last run: `{"swapped": 48, "dense in steps that ...": 16}`."""
        total: dict[str, int] = {}
        for row in self.rows:
            for outcome, count in (row.calls or {}).items():
                total[outcome] = total.get(outcome, 0) + count
        return total

    @property
    def computed(self) -> float | None:
        """Share of the attention that the swapped layers computed in the last run, dense calls included."""
        full = sum(row.computed[1] for row in self.rows)
        return sum(row.computed[0] for row in self.rows) / full if full else None

    def __str__(self) -> str:
        lines = [f"{'layer':<52} {'tokens':>16} {'GFLOPs':>9} {'after':>9} {'share':>6}  attention"]
        for model, rows in itertools.groupby(self.rows, key=lambda row: row.model):
            lines.append(f"{model}:")
            lines.extend(_lines(list(rows)))
        swapped = sum(row.swapped for row in self.rows)
        share = "" if self.share is None else f"; they compute {self.share:.1%} of the attention"
        note = "" if self.share is not None or not swapped else "; costs are known after the first call"
        lines.append(f"{swapped} of {len(self.rows)} attention layers are swapped{share}{note}")
        if self.calls:
            told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.calls.items(), key=_swapped_first))
            lines.append(f"last run: calls {told}; {self.computed:.1%} of the attention computed")
        lines.extend(f"{model}: {told}" for model, told in self.orders.items())
        lines.extend(
            f"{model}: attention was {own.attention:.0%} of the work at {own.tokens} tokens; at most {own.bound:.2f}x "
            f"faster"
            for model, own in self.worth.items()
        )
        return "\n".join(lines)


def summary(target: Any) -> Summary:
    """Every attention layer of a model or pipeline: swapped or kept and why, tokens, cost before and after."""
    swaps, exact = {id(swap.model): swap for swap in swaps_of(target)}, exact_models(target)
    found = [*(swap.model for swap in swaps.values()), *exact]
    parts = getattr(target, "components", {})
    alone = exact and not isinstance(target, nn.Module) and all(parts.get(name) is None for name in COMPONENTS)
    usual = [] if alone else models_of(target)
    rows: list[Row] = []
    for key, model in {id(model): model for model in [*found, *usual]}.items():
        swap, name, same = swaps.get(key), type(model).__name__, exact_layers(model)
        for layer in attention_modules(model):
            kept = str(same[layer].processor) if layer in same else "not swapped"
            rows.append(Row(name, layer, False, kept) if swap is None else _row(name, layer, swap))
    told = {swap.name: _order(swap) for swap in swaps.values()}
    worth = {swap.name: swap.worth for swap in swaps.values() if swap.worth is not None}
    return Summary(tuple(rows), {name: order for name, order in told.items() if order}, worth)


def _order(swap: ModelSwap) -> str:
    """How the last call's tokens came in the order of a kernel; empty where none wants one, and before the first."""
    if swap.ordering is not None:
        return swap.ordering.told
    ran = any(layer.last is not None for layer in swap.layers.values())
    known = f"it is not known where tokens enter and leave the blocks of {swap.name}"
    return f"{IN_LAYERS}: {known}" if ran and wants_order(swap.layers.values()) else ""


def _row(model: str, name: str, swap: ModelSwap) -> Row:
    if name in swap.kept:
        return Row(model, name, False, swap.kept[name])
    layer = swap.layers[name]
    if not swap.in_place(name):
        return Row(model, name, False, f"replaced by {type(layer.module.processor).__name__} since")
    note = f"{layer.schedule} [{layer.explain_backend()}]"
    calls, computed = _done(swap, layer)
    if layer.grid is None:
        return Row(model, name, True, note, calls=calls, computed=computed)
    before, after = layer.flops(SoftmaxAttention()), layer.flops()
    return Row(model, name, True, note, layer.grid, before, after, calls, computed)


def _done(swap: ModelSwap, layer: SwappedLayer) -> tuple[dict[str, int] | None, tuple[int, int]]:
    """What a layer did in the last run: number of calls by outcome; operations, and those of exact attention."""
    calls: dict[str, int] = {}
    after, before = 0, 0
    for (owner, outcome, _), (count, record) in list(swap.done.items()):
        if owner == id(layer):
            calls[outcome] = calls.get(outcome, 0) + count
            samples = count * len(record.query)
            before += samples * layer.flops_of(record, SoftmaxAttention())
            after += 0 if outcome == REUSED else samples * layer.flops_of(record)
    return calls or None, (after, before)


def _swapped_first(item: tuple[str, int]) -> tuple[bool, str]:
    return item[0] != SWAPPED, item[0]


def _lines(rows: list[Row]) -> list[str]:
    """One line for each run of layers that differ in their numbers only."""
    lines = []
    for _, run in itertools.groupby(rows, key=lambda row: (_pattern(row.layer), row.swapped, row.note, str(row.grid))):
        group = list(run)
        before = sum(row.flops_before or 0 for row in group)
        after = sum(row.flops_after or 0 for row in group)
        costs = (
            f"{before / 1e9:>9.3g} {after / 1e9:>9.3g} {after / before:>6.1%}"
            if before
            else f"{'-':>9} {'-':>9} {'-':>6}"
        )
        grid = "-" if group[0].grid is None else str(group[0].grid)
        lines.append(f"  {_span(group):<50} {grid:>16} {costs}  {'' if group[0].swapped else 'kept: '}{group[0].note}")
    return lines


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _span(rows: list[Row]) -> str:
    """`blocks.{0..18}.attn` for a run of layers whose last differing number counts up."""
    first, last = rows[0].layer, rows[-1].layer
    if len(rows) == 1:
        return first
    parts = [
        a if a == b else f"{{{a}..{b}}}"
        for a, b in zip(re.split(r"(\d+)", first), re.split(r"(\d+)", last), strict=True)
    ]
    return "".join(parts)
