"""`calibrate_heads`: for every head of every layer the mechanism that changes its output least, within a budget.

    error(l, h, m)  = mean over the calls of |out_m - out_full|^2 of head h / |out_full|^2 of all heads of layer l
    choice(l, h)    = the m of the least error + price * operations(l, m)

The price is the least one whose choices are within the budget. Errors are those of a layer by itself, on the model's
own path. Cost: one run for each prompt, in which every layer computes all mechanisms; then each prompt once more.

After Fu et al., MoA, https://arxiv.org/abs/2406.14909, which chooses a window for every head; here any mechanisms, and
the change of a head's output in place of that of the loss, which would take gradients.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..grid import TokenGrid
from ..measure.draws import Prompt
from ..mechanisms import Mechanism, PerHeadAttention
from ..mechanisms.base import Context
from ..mechanisms.parts.heads import ByHead
from ..options import Must, read
from ..swap.apply import commit
from ..swap.plan import plan_all
from ..swap.settings.placement import LayerChoice, Placement
from ..swap.settings.recipe import ModelRecipe, Recipe
from ..swap.settings.schedule import FULL, Part, Schedule
from .runs import Runs, component_of

FINEST = 60
"""Halvings of the price."""


@dataclass
class HeadErrors:
    """What was measured: by number of the layer."""

    mechanisms: Sequence[Mechanism]
    grids: dict[int, TokenGrid] = field(default_factory=dict)
    heads: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Heads of each layer, and their size."""
    errors: dict[int, np.ndarray] = field(default_factory=dict)
    """`(heads, mechanisms)`: sums over the calls."""

    def note(self, layer: int, grid: TokenGrid, full: Tensor, others: Sequence[Tensor]) -> None:
        """Add a call of a layer: its own output `(b, h, n, c)`, and each mechanism's."""
        total = full.double().square().sum().clamp(min=torch.finfo(torch.float64).tiny)
        found = [(out.double() - full.double()).square().sum((0, 2, 3)) / total for out in others]
        own = torch.stack(found, dim=1).cpu().numpy()
        self.errors[layer] = self.errors.get(layer, 0) + own
        self.grids[layer], self.heads[layer] = grid, (full.shape[1], full.shape[3])

    def operations(self, layer: int) -> np.ndarray:
        """Of one head under each mechanism."""
        return np.array([float(own.flops(self.grids[layer], 1, self.heads[layer][1])) for own in self.mechanisms])

    def choose(self, price: float) -> dict[int, np.ndarray]:
        """Layer -> number of the mechanism of each head."""
        found = {}
        for layer, errors in self.errors.items():
            full = 4.0 * self.grids[layer].pairs * self.heads[layer][1]
            found[layer] = (errors + price * self.operations(layer) / full).argmin(axis=1)
        return found

    def share(self, chosen: dict[int, np.ndarray]) -> float:
        """Operations of a choice over full attention's."""
        own = sum(float(self.operations(layer)[numbers].sum()) for layer, numbers in chosen.items())
        full = sum(4.0 * self.grids[layer].pairs * self.heads[layer][1] * self.heads[layer][0] for layer in chosen)
        return own / full

    def within(self, share: float) -> dict[int, np.ndarray]:
        """The choice of the least price that is within a budget; raises `ValueError` where none is."""
        low, high = 0.0, 1e6 * max(float(own.max()) for own in self.errors.values()) + 1.0
        if self.share(self.choose(high)) > share:
            raise ValueError(
                f"the cheapest mechanisms take {self.share(self.choose(high)):.1%} of the pairs, above share={share}; "
                "add a cheaper one"
            )
        for _ in range(FINEST):
            middle = (low + high) / 2
            low, high = (low, middle) if self.share(self.choose(middle)) <= share else (middle, high)
        return self.choose(high)

    def mechanism(self, numbers: np.ndarray) -> Mechanism:
        """Of a layer with these choices."""
        used = sorted({int(number) for number in numbers})
        if len(used) == 1:
            return self.mechanisms[used[0]]
        heads = tuple(used.index(int(number)) for number in numbers)
        return PerHeadAttention(mechanisms=tuple(self.mechanisms[number] for number in used), heads=heads)


@dataclass(frozen=True, kw_only=True)
class HeadProbe(Mechanism):
    """Full attention, beside which every mechanism is computed and compared head by head."""

    type: ClassVar[str] = "head probe"
    found: HeadErrors = field(compare=False)

    def __post_init__(self) -> None:
        """It has no options."""

    @property
    def approximates(self) -> bool:
        return True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"call_index"}).union(*(own.needs for own in self.found.mechanisms))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        backend: str = "auto",
        context: Context = Context(),
    ) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, context.mask, scale=scale)
        others = [own.attend(q, k, v, grid, scale=scale, context=context) for own in self.found.mechanisms]
        self.found.note(context.call_index, grid, out, others)
        return out

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, *, context: Context = Context()) -> int:
        return 4 * grid.pairs * heads * head_dim

    def __str__(self) -> str:
        return self.type


def calibrate_heads(
    pipe: Any,
    prompts: Sequence[Prompt],
    mechanisms: Sequence[Mechanism],
    *,
    share: float,
    layers: LayerChoice = None,
    component: str | None = None,
    seed: int = 0,
    progress: bool = True,
    **call: Any,
) -> Recipe:
    """Find which mechanism each head of each layer needs; the pipeline is left as it was.

    Args:
        pipe: a pipeline whose attention is its own.
        prompts: texts, or arguments of the pipeline's call; four or more.
        mechanisms: that may be chosen, beside full attention. None that tells heads apart, or with weights.
        share: of full attention's operations in the layers that are swapped, at most.
        component: the part of the pipeline; None: its unet or its transformer, the first there is.
        seed: image i starts from the seed + i.
        call: arguments of the pipeline's call, such as height, width, num_inference_steps.

    Returns the recipe, `per_head` in every layer whose heads differ, with the PSNR of every prompt in `made`. Raises
    `ValueError` for arguments that do not fit, and where no choice is within the budget.
    """
    share = read("share", share, Annotated[float, Must("above 0 and below 1", lambda value: 0 < value < 1)])
    unfit = [str(own) for own in mechanisms if isinstance(own, ByHead) or own.weights(1, 8) is not None]
    if unfit or not mechanisms:
        raise ValueError(f"expected mechanisms of single heads without weights, got {unfit[0] if unfit else 'none'}")
    component = component_of(pipe, component)
    runs, found = Runs(pipe, prompts, seed, call), HeadErrors([FULL, *mechanisms])
    runs.progress = progress
    handle = commit(plan_all(pipe, HeadProbe(found=found), Placement(layers=layers, components=[component])), True)
    names = [layer.name for layer in handle.layers]
    with handle:
        images = [runs.draw(number) for number in runs.bar("measuring heads", len(runs))]
    chosen = found.within(share)
    schedules = {names[layer]: Schedule((Part(found.mechanism(own)),)) for layer, own in chosen.items()}
    kept = {name: own for name, own in schedules.items() if own.parts[0].mechanism != FULL}
    model = type(pipe.components[component]).__name__
    largest = max((grid.shape for grid in found.grids.values()), key=np.prod)
    recipe = Recipe({component: ModelRecipe(model, largest, kept)})
    versions = {name: version(name) for name in ("diffattn", "diffusers", "torch")}
    made = {**runs.describe(), "mechanisms": [own.to_dict() for own in mechanisms], "budget": share}
    made |= {"share": found.share(chosen), "psnr": runs.compare(recipe, images), "versions": versions}
    return Recipe(recipe.models, made)


def summary_of(recipe: Recipe) -> str:
    """A line for a terminal."""
    return (
        f"{recipe.made['share']:.1%} of the attention computed; PSNR to full attention "
        f"{statistics.median(recipe.made['psnr']):.1f} dB in the median of {len(recipe.made['psnr'])} prompts, "
        f"{min(recipe.made['psnr']):.1f} at worst"
    )
