"""What calibrations share: runs of all prompts with progress, and which model of a pipeline they are about."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..measure.draws import Draws
from ..measure.fidelity import psnr
from ..measure.progress import bar_options
from ..swap.apply import apply
from ..swap.plan import COMPONENTS
from ..swap.settings.recipe import Recipe

BEST_SEEN = 120.0
"""PSNR of equal images."""


class Runs(Draws):
    """Calls of the pipeline, with progress."""

    progress = True

    def bar(self, what: str, total: int) -> Any:
        """Numbers with progress in words."""
        return tqdm(range(total), desc=what, **bar_options(self.progress))

    def compare(self, recipe: Recipe, full: Sequence[np.ndarray]) -> list[float]:
        """PSNR of every prompt under a recipe, to a thousandth: what is behind depends on the number of threads."""
        if not any(own.layers for own in recipe.models.values()):
            return [BEST_SEEN] * len(full)
        with apply(self.pipe, recipe):
            images = [self.draw(number) for number in self.bar("trying a recipe", len(full))]
        return [round(min(psnr(one, other), BEST_SEEN), 3) for one, other in zip(images, full, strict=True)]


def component_of(pipe: Any, component: str | None) -> str:
    """The part of a pipeline that is meant; None: its unet or its transformer, the first there is."""
    found = component or next((name for name in COMPONENTS if pipe.components.get(name) is not None), None)
    if found is None or found not in pipe.components:
        raise ValueError(f"{type(pipe).__name__} has no part {found!r}; name its model by component=")
    return found
