"""Where and when a mechanism takes the place of the model's own attention: the arguments of `apply`, checked."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import nn

from ...mechanisms.base import Mechanism
from ...options import Must, at_least, read, shown
from ..calls.records import DENSE_SHARE, DENSE_STEP
from .schedule import Schedule, with_shares

LayerChoice = str | Iterable[str] | Callable[[str], bool] | None
StepChoice = slice | Callable[[int], bool] | None
ComponentChoice = str | Iterable[str] | None
Predicate = Callable[[int, int, int], bool]
"""On a step, the number of steps, and how many of the schedule were skipped before."""
ExactFrames = tuple[Annotated[int, at_least(0)], Annotated[int, at_least(0)]]
"""How many of the first frames, and how many of the last."""
FRACTION = Annotated[float, Must("a share of the schedule from 0 to 1", lambda value: 0 <= value <= 1)]
SHARE = Annotated[float, Must("a number above 0 and at most 1", lambda value: 0 < value <= 1)]
LAYERS = "a glob such as 'transformer_blocks.*', several, or a function of a layer's name"


@dataclass(kw_only=True)
class Placement:
    """Arguments of `apply` beside target and mechanism, which are told there; wrong ones raise `ValueError`."""

    layers: LayerChoice = None
    steps: StepChoice = None
    start: float = 0.0
    end: float = 1.0
    shares: Sequence[float] = ()
    backend: str = "auto"
    components: ComponentChoice = None
    min_tokens: int = 0
    reuse: int = 1
    exact_frames: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self.layers = read("layers", self.layers, LayerChoice, LAYERS)
        self.backend = read("backend", self.backend, str, "the name of a kernel or 'auto'")
        self.min_tokens = read("min_tokens", self.min_tokens, Annotated[int, at_least(0)])
        self.reuse = read("reuse", self.reuse, Annotated[int, at_least(1)])
        self.exact_frames = read(
            "exact_frames", self.exact_frames, ExactFrames, "two ints of at least 0, for the first frames and the last"
        )
        self.start, self.end = read("start", self.start, FRACTION), read("end", self.end, FRACTION)
        self.shares = read(
            "shares", self.shares, tuple[SHARE, ...], "numbers above 0 and at most 1, such as (0.5, 0.3)"
        )
        if self.start >= self.end:
            raise ValueError(f"expected start= before end=, as shares of the schedule; got {self.start} and {self.end}")
        if self.steps is not None and (self.start, self.end) != (0.0, 1.0):
            raise ValueError("steps= counts steps, start= and end= are shares of all of them: give one of the two")
        self.chosen  # noqa: B018  a wrong `steps` raises here

    @property
    def counts_steps(self) -> str | None:
        """The argument that depends on the step of a pipeline; None where none does."""
        asked = {
            "steps=": self.steps is not None,
            "start= and end=": (self.start, self.end) != (0.0, 1.0),
            "shares=": bool(self.shares),
            "reuse=": self.reuse > 1,
        }
        return next((name for name, is_asked in asked.items() if is_asked), None)

    def check(self, target: Any) -> None:
        """Raise `ValueError` for what a model by itself cannot tell."""
        if self.counts_steps is not None and isinstance(target, nn.Module):
            raise ValueError(f"{self.counts_steps} counts the steps of a pipeline; pass the pipeline, not its model")

    @property
    def chosen(self) -> Predicate | None:
        """Which steps are swapped; None: all."""
        steps = self.steps
        if steps is None:
            first, last = self.start, self.end
            if (first, last) == (0.0, 1.0):
                return None
            return lambda step, total, skipped: first <= (skipped + step) / (skipped + total) < last
        if isinstance(steps, slice):
            part: slice = read("steps", steps, slice, "a slice of whole numbers, such as slice(4, None)")
            return lambda step, total, _: step in range(*part.indices(total))
        if callable(steps):
            return lambda step, total, _: bool(steps(step))
        raise TypeError(f"steps must be a slice or a predicate on the step number, got {shown(steps)}")

    @property
    def left_out(self) -> str:
        """Why the other steps stay dense, for `summary`."""
        return DENSE_SHARE if self.steps is None else DENSE_STEP

    def schedule(self, mechanism: Mechanism | Schedule) -> Schedule:
        """What the swapped layers compute, in the steps that are swapped."""
        if isinstance(mechanism, Schedule):
            return mechanism
        return with_shares(mechanism, self.reuse, self.shares, self.start, self.end)
