"""What all swapped layers of one model share."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from ..grid import TokenGrid
from .calls.frames import Reading, Recall
from .calls.records import DENSE_STEP
from .calls.steps import Runs
from .settings.recipe import ModelRecipe

_paused: ContextVar[frozenset["State"]] = ContextVar("diffattn paused", default=frozenset())


@dataclass(eq=False)
class State:
    """What all swapped layers of one model share, the same in all calls."""

    runs: Runs = field(default_factory=Runs)
    chosen: Any = None
    """Predicate on step and number of steps, given by `steps=`, `start=` and `end=`; None: every step."""
    left_out: str = DENSE_STEP
    """Why the others stay dense."""
    needs: frozenset[str] = frozenset()
    """`Mechanism.needs`: what is not needed is not looked up."""
    exact_frames: tuple[int, int] = (0, 0)
    """How many of the first and of the last frames see all tokens and are seen by all."""
    made_for: ModelRecipe | None = None
    """The recipe that the layers follow, which is not for all sizes."""
    recall: Recall = field(default_factory=Recall)

    def grids(self, reading: Reading, tokens: int, queries: int) -> tuple[TokenGrid, ...]:
        """What mechanisms are given of a forward: one grid for the whole batch, or one per sample."""
        grids = reading.grids(tokens, queries)
        if self.made_for is not None:
            for grid in grids:
                self.made_for.check(grid)
        return tuple(grid.with_exact_frames(*self.exact_frames) for grid in grids)

    @property
    def counts_steps(self) -> bool:
        """Does anything depend on the step of the pipeline?"""
        return self.chosen is not None or bool(self.needs & {"progress", "sigma", "memory"})

    @property
    def paused(self) -> bool:
        """Is it the model's own attention for now, in this thread?"""
        return self in _paused.get()

    def pause(self) -> Any:
        """Begin a pause, in this thread; returns what ends it."""
        return _paused.set(_paused.get() | {self})

    def go_on(self, token: Any) -> None:
        """End the pause."""
        _paused.reset(token)
