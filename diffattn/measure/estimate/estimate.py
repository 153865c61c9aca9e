"""`estimate`: what a swap would gain, before any run.

    speed-up = (full + rest) / (sum over the steps of (own or nothing) / steps + rest)

full, own: seconds of all swapped layers' attention; a step that takes an earlier output (`reuse`) has none; rest: all
else that the model computes. Text encoder and VAE come on top and are the same for both.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

from torch import nn

from ...grid import TokenGrid
from ...options import Must, read
from ...swap.plan import models_of, resolve
from ...swap.settings.placement import Placement
from ...swap.settings.quality import with_level
from ...swap.settings.schedule import FULL, Part, Schedule
from .inputs import kind_of
from .rates import DataSheet, Rates, rates_of
from .sizes import grid_of
from .work import HALFWAY, AttentionCall, Work, work_of

PAYS = 1.1
"""Speed-up from which a swap is said to pay."""
SIDES = (64, 1 << 22)
"""Tokens between which the size from which it pays is looked for."""


class Steps(NamedTuple):
    """Of a run."""

    made: int
    skipped: int = 0
    """Those of the schedule before."""


@dataclass(frozen=True)
class Estimate:
    """What one model would gain. Seconds are those of one forward of `batch` samples, in the mean over the steps."""

    model: str
    grid: TokenGrid
    batch: int
    mechanism: str
    flops: int
    """Of a forward with full attention."""
    attention: float
    """Share of full attention in them."""
    computed: float
    """Share of that attention which the swap computes, over all steps."""
    seconds_full: float
    seconds: float
    source: str
    pays_from: int | None
    """Cells from which the speed-up is 1.1; None: at no size that was tried."""
    weights: int
    """Bytes."""
    kept: int
    """Bytes of outputs that `reuse` keeps."""

    @property
    def speedup(self) -> float:
        """Of the model's forwards."""
        return self.seconds_full / self.seconds

    @property
    def pays(self) -> bool:
        """Is it worth it at this size?"""
        return self.speedup >= PAYS

    def __str__(self) -> str:
        verdict = f"{self.speedup:.2f}x" if self.pays else f"{self.speedup:.2f}x: nothing is gained at this size"
        pays = "at no size tried" if self.pays_from is None else f"from {self.pays_from} cells on"
        work, weights = self.flops * self.batch / 1e9, self.weights / 1e6
        return "\n".join(
            [
                f"{self.model}, {self.grid} tokens, batch {self.batch}: {self.mechanism}",
                f"  work of a forward   {work:,.1f} GFLOPs, {self.attention:.0%} of it attention",
                f"  attention computed  {self.computed:.1%}",
                f"  a forward           {_time(self.seconds_full)} full, {_time(self.seconds)} swapped",
                f"  speed-up            {verdict}",
                f"  pays                {pays}",
                f"  memory              {weights:,.0f} MB of weights, {self.kept / 1e6:,.1f} MB kept by reuse",
                f"  {self.source}",
            ]
        )


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def estimate(
    target: Any,
    mechanism: Any,
    *,
    height: int,
    width: int,
    frames: int = 1,
    batch: int = 1,
    num_inference_steps: int = 20,
    strength: float = 1.0,
    text_tokens: int | None = None,
    card: str | None = None,
    **options: Any,
) -> list[Estimate]:
    """What `apply(target, mechanism, **options)` would gain at a size, for each model that it swaps.

    Args:
        target: a pipeline or a model, with weights or on the meta device; it is left as it was. For a model alone the
            usual VAE of its class tells the pixels of a token.
        height, width, frames: of the image or video, in pixels and frames.
        batch: samples in one forward; guidance makes two of one image.
        num_inference_steps: for `reuse` and schedules.
        strength: of image-to-image: the share of the steps that are made, the last ones.
        text_tokens: of the prompt; None: what the pipeline makes of any, or is usual for the class.
        card: a GPU by name ("H100"): times are modelled from its data sheet. None: measured on this machine, which
            takes seconds and a model with weights.
        options: as in `apply`. What changes from step to step (phases, rotation) counts as in the middle of the
            schedule.

    Raises `ValueError` for classes whose inputs are not known, and what `apply` raises. Cost: a few attention calls of
    at most 40 GFLOPs and a forward without attention; nothing is computed for a card.
    """
    placed = {name: options.pop(name) for name in [*options] if name in Placement.__dataclass_fields__}
    quality = options.pop("quality", None)
    if quality is not None:
        with_level(mechanism, quality, options, placed)
    placement = Placement(**placed)
    schedule = placement.schedule(mechanism if isinstance(mechanism, Schedule) else resolve(mechanism, **options))
    strength = read("strength", strength, Annotated[float, Must("above 0 and at most 1", lambda own: 0 < own <= 1)])
    made = max(1, int(num_inference_steps * strength))
    steps = Steps(made, num_inference_steps - made)
    found = []
    for model in models_of(target, placement.components):
        text = _text_tokens(target, model) if text_tokens is None else text_tokens
        joint = text if kind_of(model).joint else 0
        grid = grid_of(model, _vae_config(target, model), height, width, frames, joint)
        like = next(model.parameters()).new_empty(())
        if card is None and like.is_meta:
            raise ValueError("expected a model with weights, to measure on this machine; name a GPU by card=")
        found.append(_estimate(model, schedule, placement, grid, text, batch, steps, rates_of(card, model, text, like)))
    return found


def _estimate(
    model: nn.Module,
    schedule: Schedule,
    placement: Placement,
    grid: TokenGrid,
    text: int,
    batch: int,
    steps: Steps,
    rates: Rates,
) -> Estimate:
    work = work_of(model, schedule, grid, text, placement.layers)
    shares = computed_shares(schedule, placement, steps)
    size = 2 if isinstance(rates, DataSheet) else next(model.parameters()).element_size()
    measured = {(call, part.mechanism): rates.attention(call, part.mechanism) for call in work.calls for part in shares}
    rest = rates.rest(work)
    full, own = _sums(work, shares, measured)
    return Estimate(
        model=type(model).__name__,
        grid=grid,
        batch=batch,
        mechanism=str(schedule),
        flops=work.rest + work.attention,
        attention=work.share,
        computed=_flops(work, shares) / work.attention,
        seconds_full=batch * (full + rest),
        seconds=batch * (own + rest),
        source=rates.source,
        pays_from=_pays_from(work, shares, measured, rest, grid, rates),
        weights=work.weights * size,
        kept=_kept(work, batch, size) if schedule.reuse > 1 else 0,
    )


def computed_shares(schedule: Schedule, placement: Placement, steps: Steps) -> Mapping[Part, float]:
    """Share of the steps in which each part's attention is computed; `FULL` stands for steps that are not swapped."""
    full = Part(FULL)
    counts: dict[Part, float] = {}
    last: tuple[Part, int] | None = None
    made, skipped = steps
    for step in range(made):
        chosen = placement.chosen is None or placement.chosen(step, made, skipped)
        part = schedule.at((skipped + step) / (skipped + made)) if chosen else full
        if last is not None and part is last[0] and step - last[1] < part.reuse and step != made - 1:
            continue
        counts[part] = counts.get(part, 0) + 1 / made
        last = part, step
    return counts


Times = Mapping[tuple[AttentionCall, Any], tuple[float, float]]


def _sums(work: Work, shares: Mapping[Part, float], measured: Times) -> tuple[float, float]:
    """Seconds of all calls: by full attention, and by the parts in the mean over the steps."""
    first = next(iter(shares)).mechanism
    full = sum(count * measured[call, first][0] for call, count in work.calls.items())
    own = sum(
        count * share * measured[call, part.mechanism][1]
        for call, count in work.calls.items()
        for part, share in shares.items()
    )
    return full, own


def _flops(work: Work, shares: Mapping[Part, float]) -> float:
    return sum(
        count * share * part.mechanism.flops(call.grid, call.heads, call.head_dim, context=HALFWAY)
        for call, count in work.calls.items()
        for part, share in shares.items()
    )


def _kept(work: Work, batch: int, size: int) -> int:
    """Bytes of one output of every swapped layer."""
    return sum(batch * size * call.grid.tokens * call.heads * call.head_dim * n for call, n in work.calls.items())


def _pays_from(
    work: Work, shares: Mapping[Part, float], measured: Times, rest: float, grid: TokenGrid, rates: Rates
) -> int | None:
    """The fewest cells of the same form at which the speed-up is `PAYS`, by the rates at this size."""
    scale = math.sqrt(SIDES[0] / grid.cells)
    while grid.cells * scale**2 <= SIDES[1]:
        try:
            full, own = _sums(work, shares, _times_at(scale, measured, rates))
        except ValueError:  # too small a grid for the mechanism
            full, own = 0.0, 1.0
        others = rest * _scaled(grid, scale).tokens / grid.tokens
        if (full + others) / (own + others) >= PAYS:
            return round(grid.cells * scale**2)
        scale *= 2**0.25
    return None


def _times_at(scale: float, measured: Times, rates: Rates) -> Times:
    """Those of grids that are so many times as high and wide."""
    found = {}
    for (call, mechanism), known in measured.items():
        at = _scaled(call.grid, scale)
        mechanism.check(at)
        found[call, mechanism] = rates.at(call, mechanism, at, known)
    return found


def _scaled(grid: TokenGrid, scale: float) -> TokenGrid:
    rows, columns = (max(1, round(side * scale)) for side in (grid.height, grid.width))
    return replace(grid, height=rows, width=columns)


def _text_tokens(target: Any, model: nn.Module) -> int:
    """What the pipeline pads or cuts a prompt to, else what is usual for the class."""
    pipeline = getattr(target, "pipeline", None) or type(target)
    known = {} if isinstance(target, nn.Module) else inspect.signature(pipeline.__call__).parameters
    length = known["max_sequence_length"].default if "max_sequence_length" in known else None
    return length if isinstance(length, int) else kind_of(model).text


def _vae_config(target: Any, model: nn.Module) -> Mapping[str, Any]:
    vae = None if isinstance(target, nn.Module) else getattr(target, "vae", None)
    return kind_of(model).vae if vae is None else dict(vae.config)
