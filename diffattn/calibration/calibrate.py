"""`calibrate`: the recipe that costs least for a fidelity, or is nearest for a budget of pairs.

1. Every prompt is run once by full attention, and every layer's part in it measured (`probing`).
2. Rows of plans, from dear to cheap, are made from the errors in the mean over the prompts (`choices`).
3. They are tried in real runs of the prompts. For a budget, the dearest plan of each row within it, and the best in the
   mean is taken. For a fidelity, the cheapest of each row whose median reaches it is found by halving, and the cheapest
   of all is taken.

After Fu et al., MoA, https://arxiv.org/abs/2406.14909, and Yuan et al., DiTFastAttn, https://arxiv.org/abs/2406.08552,
which choose windows and reuse layer by layer; here for any mechanism, and for parts of a run.
"""

import os
import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from ..measure.draws import Prompt
from ..mechanisms import ClearAttention, Mechanism, RoutingAttention
from ..options import Must, at_least, read, shown
from ..swap.settings.placement import LayerChoice
from ..swap.settings.recipe import ModelRecipe, Recipe
from ..swap.settings.schedule import FULL
from .choices import Choice, Measured, Plan, rows_of_plans
from .probing import Prober
from .runs import Runs, component_of
from .store import Store

SHARES = (0.7, 0.5, 0.35, 0.25, 0.18, 0.12)
POSITIVE = Must("a number above 0", lambda value: value > 0)


def calibrate(
    pipe: Any,
    prompts: Sequence[Prompt],
    *,
    target: float | None = None,
    share: float | None = None,
    mechanisms: Sequence[Mechanism] | None = None,
    reuse: Sequence[int] = (1, 2, 3),
    parts: int = 3,
    layers: LayerChoice = None,
    component: str | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **call: Any,
) -> Recipe:
    """Find which attention each layer needs in each part of a run; the pipeline is left as it was.

    Args:
        pipe: a pipeline whose attention is its own.
        prompts: texts, or arguments of the pipeline's call. Eight or more: a recipe fits what it was made from.
        target: PSNR in dB, in the median of the prompts, to full attention's own images. Or:
        share: of full attention's operations in the layers that are swapped, at most.
        mechanisms: that may be chosen, beside full attention. None: `routing` at five shares and `clear` with means,
            as far as they fit the size.
        reuse: that may be chosen: an output for so many steps.
        parts: equal parts of the run, each with a choice of its own.
        component: the part of the pipeline; None: its unet or its transformer, the first there is.
        seed: image i starts from the seed + i.
        folder: keeps what was measured; a calibration that was stopped goes on there.
        call: arguments of the pipeline's call, such as height, width, num_inference_steps.

    Raises `ValueError` for arguments that do not fit, before anything is run. Cost: for each prompt one run whose
    forwards are repeated layers x (mechanisms + largest reuse - 1) times; then a dozen runs of all prompts or two.
    """
    if (target is None) == (share is None):
        raise ValueError(f"expected either target= in dB or share= of the pairs; got target={target} and share={share}")
    target = read("target", target, Annotated[float | None, POSITIVE])
    share = read("share", share, Annotated[float | None, Must("above 0 and below 1", lambda value: 0 < value < 1)])
    reuse = read("reuse", tuple(reuse), tuple[Annotated[int, at_least(1)], ...])
    parts = read("parts", parts, Annotated[int, at_least(1)])
    runs = Runs(pipe, prompts, seed, call)
    runs.progress = progress
    component = component_of(pipe, component)
    probe = Prober(pipe, component, [], 0, layers)
    with probe.watching():
        runs.draw(0)
    grids = [grid for grid, _, _ in probe.path.shapes.values()]
    chosen = list(mechanisms) if mechanisms is not None else default_mechanisms(max(grids, key=lambda g: g.tokens))
    for mechanism in chosen:
        for grid in grids:
            mechanism.check(grid)
    setup = _setup(component, runs, chosen, reuse, parts, layers)
    store = Store(None if folder is None else Path(folder), setup)
    prober = Prober(pipe, component, chosen, max(reuse) - 1, layers)
    prober.names, prober.path.shapes, prober.path.begin = probe.names, probe.path.shapes, probe.path.begin
    measured = _measure(runs, store, prober)
    several = [Choice(mechanism, count) for mechanism in (FULL, *chosen) for count in sorted({*reuse, 1})]
    rows = rows_of_plans(measured, several, parts)
    name = type(probe.model).__name__

    def recipe_of(plan: Plan) -> Recipe:
        frames, rows, columns = max((grid.shape for grid in measured.grids), key=np.prod)
        own = ModelRecipe(name, (frames, rows, columns), plan.schedules(measured))
        return Recipe({component: own})

    def tried(plan: Plan) -> list[float]:
        recipe = recipe_of(plan)
        known = store.tried(recipe.to_dict())
        if known is None:
            known = runs.compare(recipe, [_image(store, number) for number in range(len(prompts))])
            store.keep_tried(recipe.to_dict(), known)
        return known

    plan = nearest_within(rows, tried, share) if share is not None else cheapest_reaching(rows, tried, target or 0.0)
    made = {**setup, "target": target, "budget": share, "share": plan.share, "psnr": tried(plan)}
    return Recipe(recipe_of(plan).models, made)


def _measure(runs: Runs, store: Store, prober: Prober) -> Measured:
    """Errors in the mean over the prompts, each against its own sum; those that a folder has are not run again.

    So the mean of the logarithms is made least, as PSNR has them: no prompt outweighs the others.
    """
    for number in runs.bar("measuring", len(runs)):
        if store.run(number) is None:
            with prober.watching():
                image = runs.draw(number)
            store.keep_run(number, prober.errors().weighed(), image)
    several = [store.run(number) for number in range(len(runs))]
    errors = [run[0].relative() for run in several if run is not None]
    shapes = [prober.path.shapes[layer] for layer in range(len(prober.names))]
    begin, steps = prober.path.begin, errors[0].own.shape[2]
    return Measured(
        tuple(prober.names),
        tuple(grid for grid, _, _ in shapes),
        tuple((heads, size) for _, heads, size in shapes),
        tuple(prober.mechanisms),
        np.mean([own.own for own in errors], axis=0),
        np.mean([own.stale for own in errors], axis=0),
        skipped=round(begin * steps / (1 - begin)),
    )


def _image(store: Store, number: int) -> np.ndarray:
    run = store.run(number)
    assert run is not None
    return run[1]


Trial = Callable[[Plan], list[float]]
"""PSNR of every prompt under a plan."""


def nearest_within(rows: Sequence[Sequence[Plan]], tried: Trial, share: float) -> Plan:
    """The best plan in the mean of those that are the dearest of their row within a budget."""
    fitting = [next((plan for plan in row if plan.share <= share), None) for row in rows]
    found = [plan for plan in fitting if plan is not None]
    if not found:
        least = min(row[-1].share for row in rows)
        raise ValueError(f"the cheapest choices take {least:.1%} of the pairs, above share={share}")
    return max(found, key=lambda plan: statistics.mean(tried(plan)))


def cheapest_reaching(rows: Sequence[Sequence[Plan]], tried: Trial, target: float) -> Plan:
    """The cheapest plan whose median reaches the target, by halving in each row: fidelity falls with the share."""
    best = rows[0][0]  # full attention
    for row in rows:
        cheaper = [plan for plan in row if plan.share < best.share]
        good, bad = -1, len(cheaper)
        while bad - good > 1:
            middle = (good + bad) // 2
            if statistics.median(tried(cheaper[middle])) >= target:
                good = middle
            else:
                bad = middle
        best = cheaper[good] if good >= 0 else best
    return best


def default_mechanisms(grid: Any) -> list[Mechanism]:
    """`routing` at several shares and `clear` with means, with tiles for the size, as far as they fit."""
    side = next((tile for tile in (8, 4, 2) if grid.height * grid.width >= 64 * tile**2), 2)
    tile = pool = side if grid.frames == 1 else (1, side, side)
    several: list[Mechanism] = [RoutingAttention(share=share, tile=tile, pool=pool) for share in SHARES]
    several += [ClearAttention(radius=radius, pool=pool) for radius in (2 * side, side)]
    return [mechanism for mechanism in several if _fits(mechanism, grid)]


def _fits(mechanism: Mechanism, grid: Any) -> bool:
    try:
        mechanism.check(grid)
    except ValueError:
        return False
    return mechanism.flops(grid, 1, 64) < 4 * 64 * grid.pairs


def _setup(
    component: str,
    runs: Runs,
    mechanisms: Sequence[Mechanism],
    reuse: Sequence[int],
    parts: int,
    layers: LayerChoice,
) -> dict[str, Any]:
    """Everything that a calibration depends on, as plain values."""
    return {
        **runs.describe(),
        "component": component,
        "mechanisms": [mechanism.to_dict() for mechanism in mechanisms],
        "reuse": list(reuse),
        "parts": parts,
        "layers": shown(layers),
        "versions": {name: version(name) for name in ("diffattn", "diffusers", "torch")},
    }
