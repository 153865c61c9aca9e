"""How much every layer's attention matters, measured on the model's own path.

A run goes on by full attention. At every call of the model its forward is made again with one layer's attention
replaced, for every layer and every mechanism, and for outputs of steps before: what the replacement does to the model's
output is its error. Cost: layers x (mechanisms + lags) forwards for each forward of a run; memory: `lags` outputs of
every layer.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from ..grid import TokenGrid
from ..mechanisms.base import Context, Mechanism
from ..swap.apply import commit
from ..swap.plan import plan_all
from ..swap.settings.placement import LayerChoice, Placement


@dataclass
class Path:
    """What the layers did in the model's own forward, and what is tried in its repetitions."""

    step: int = 0
    sigma: float | None = None
    begin: float = 0.0
    """Share of the schedule that was behind at the first step."""
    turn: int = 0
    """Number of this forward within its step: guidance has two."""
    outputs: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    """(turn, step, layer) -> output of full attention."""
    shapes: dict[int, tuple[TokenGrid, int, int]] = field(default_factory=dict)
    """Layer -> grid, heads, size of a head."""
    tried: tuple[int, Mechanism | int] | None = None
    """A layer, and its mechanism or how many steps old its output is; None: the model's own forward."""

    def forget(self, before: int) -> None:
        """Drop outputs of steps before this one."""
        self.outputs = {key: out for key, out in self.outputs.items() if key[1] >= before}


@dataclass(frozen=True, kw_only=True)
class Probe(Mechanism):
    """Full attention, but for the layer that is tried."""

    type: ClassVar[str] = "probe"
    path: Path = field(compare=False)

    def __post_init__(self) -> None:
        """It has no options."""

    @property
    def approximates(self) -> bool:
        return True

    @property
    def grouped_heads(self) -> bool:
        return True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"call_index", "progress", "sigma"})

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
        layer, path = context.call_index, self.path
        tried = path.tried[1] if path.tried is not None and path.tried[0] == layer else None
        if isinstance(tried, int):
            return path.outputs[path.turn, path.step - tried, layer]
        if tried is not None:
            return tried.attend(q, k, v, grid, scale=scale, context=context)
        grouped = k.shape[1] != q.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, context.mask, scale=scale, enable_gqa=grouped)
        if path.tried is None:
            path.shapes[layer] = grid, q.shape[1], q.shape[3]
            path.sigma = context.sigma
            path.begin = (context.progress or 0.0) if path.step == 0 else path.begin
            path.outputs[path.turn, path.step, layer] = out
        return out

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, *, context: Context = Context()) -> int:
        return 4 * grid.pairs * heads * head_dim

    def __str__(self) -> str:
        return "probe"


@dataclass
class Errors:
    """Of one run: squares of the change of the model's output, relative to nothing, for each step."""

    own: np.ndarray
    """`(layers, mechanisms, steps)`."""
    stale: np.ndarray
    """`(layers, lags, steps)`; 0 where there is no step so long before."""
    sigmas: list[float]
    """Share of noise at each step."""

    def weighed(self) -> "Errors":
        """Times the square of how far each step moves the latents."""
        moved = np.diff(np.array([*self.sigmas, 0.0])) ** 2
        return Errors(self.own * moved, self.stale * moved, self.sigmas)

    def relative(self) -> "Errors":
        """Against the sum of all."""
        total = max(float(self.own.sum() + self.stale.sum()), 1e-30)
        return Errors(self.own / total, self.stale / total, self.sigmas)


class Prober:
    """The hooks that measure one model in a run of its pipeline."""

    def __init__(
        self,
        pipe: Any,
        component: str,
        mechanisms: Sequence[Mechanism],
        lags: int,
        layers: LayerChoice,
    ) -> None:
        self.model: nn.Module = pipe.components[component]
        self.path = Path()
        self.names: list[str] = []
        self._pipe, self._component, self._layers = pipe, component, layers
        self.mechanisms, self._lags = list(mechanisms), lags
        self._rows: list[tuple[float, np.ndarray, np.ndarray]] = []
        self._inside, self._last = False, -1

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Measure every forward of the model in this block."""
        self._rows.clear()
        self.path.outputs.clear()
        placement = Placement(layers=self._layers, components=[self._component])
        handle = commit(plan_all(self._pipe, Probe(path=self.path), placement), trained=True)
        self.names = [layer.name for layer in handle.layers]
        hooks = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, with_kwargs=True),
        ]
        try:
            with handle:
                yield
        finally:
            for hook in hooks:
                hook.remove()
            self.path.outputs.clear()

    def _place(self) -> int:
        """Of the scheduler."""
        index = getattr(self._pipe.scheduler, "step_index", None)
        begin = getattr(self._pipe.scheduler, "begin_index", None) or 0
        return int(begin if index is None else index)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._inside:
            return
        place = self._place()
        if not self._rows or place != self._last:
            self._last, self.path.turn, self.path.step = place, 0, len(self._rows)
            self._rows.append((0.0, *self._zeros()))
        else:
            self.path.turn += 1

    def _zeros(self) -> tuple[np.ndarray, np.ndarray]:
        layers = len(self.names)
        return np.zeros((layers, len(self.mechanisms))), np.zeros((layers, self._lags))

    def _after(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if self._inside:
            return
        self._inside = True
        try:
            full, path = first_of(output), self.path
            _, own, stale = self._rows[-1]
            self._rows[-1] = path.sigma or 0.0, own, stale
            path.forget(path.step - self._lags)
            for layer in range(len(self.names)):
                for number, mechanism in enumerate(self.mechanisms):
                    own[layer, number] += self._error(module, args, kwargs, full, layer, mechanism)
                for lag in range(1, min(self._lags, path.step) + 1):
                    stale[layer, lag - 1] += self._error(module, args, kwargs, full, layer, lag)
        finally:
            self._inside, self.path.tried = False, None

    def _error(self, module: Any, args: Any, kwargs: Any, full: Tensor, layer: int, tried: Mechanism | int) -> float:
        self.path.tried = layer, tried
        got = first_of(module(*args, **kwargs))
        return float((got - full).float().square().mean())

    def errors(self) -> Errors:
        """Of the run that was watched."""
        sigmas, own, stale = zip(*self._rows, strict=True)
        return Errors(np.stack(own, axis=2), np.stack(stale, axis=2), list(sigmas))


def first_of(output: Any) -> Tensor:
    """The tensor that a model gives."""
    found: Tensor = output[0] if isinstance(output, (tuple, list)) else output.sample
    return found
