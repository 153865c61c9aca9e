"""One call of one layer, caught while a pipeline runs under a mechanism, and what its queries see."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..grid import TokenGrid
from ..mechanisms.base import Context, Mechanism, Seen, default_scale
from ..media.drawing import masks
from ..swap.apply import apply

BY_CONTENT = ("hybrid", "routing", "sla", "vsa")
"""Mechanisms that see something else in every call."""


def choosing() -> list[str]:
    """Short names of the mechanisms that choose among keys."""
    return sorted({*masks(), *BY_CONTENT})


def check_seen(mechanism: Mechanism) -> None:
    """Raise `ValueError` for a mechanism that is no choice of keys."""
    if mechanism.type not in choosing():
        raise ValueError(f"{mechanism.type} does not choose among keys; mechanisms that do: {', '.join(choosing())}")


@dataclass(frozen=True)
class Look:
    """What one query sees, and where full attention would look."""

    keys: np.ndarray
    """Cells that it sees each by itself, bool `(cells,)`."""
    blocks: np.ndarray
    """Blocks that it sees by their mean, bool `(blocks seen, cells)`."""
    mass: np.ndarray
    """Softmax over all keys, `(tokens,)`."""


@dataclass
class Caught:
    """What a layer was asked in one step."""

    mechanism: Mechanism
    grid: TokenGrid
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    context: Context
    layer: str = ""
    step: int = 0

    def seen(self) -> Seen:
        """What each query sees."""
        return self.mechanism.seen(self.q, self.k, self.v, self.grid, scale=self.scale, context=self.context)

    def look(self, head: int, row: int, column: int, seen: Seen | None = None) -> Look:
        """What the query at a cell of the first frame sees, of the first sample; `seen`: what `seen()` gave."""
        grid = self.grid
        token = grid.before + row * grid.width + column
        keys, means, blocks = (part[0, min(head, part.shape[1] - 1)].cpu() for part in seen or self.seen())
        return Look(
            keys[token, grid.cell_slice].numpy(),
            blocks[means[token]].numpy(),
            self.weights(0, head, token).cpu().numpy(),
        )

    def weights(self, sample: int, head: int, query: int) -> Tensor:
        """Softmax of one query over all keys, `(n,)`: what full attention would look at."""
        logits = self.scale * (self.k[sample, head].double() @ self.q[sample, head, query].double())
        mask = self.context.mask
        if mask is not None:
            mask = mask.expand(*self.q.shape[:2], self.grid.tokens, self.grid.tokens)[sample, head, query]
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        return logits.softmax(-1)


def watch(
    pipe: Any,
    mechanism: Mechanism,
    run: Callable[[], Any],
    *,
    layer: str | None = None,
    step: int | None = None,
    head: int = 0,
) -> tuple[Any, Caught]:
    """What `run()` gives with `mechanism` in `pipe`, and the first call of a layer in a step.

    Args:
        layer: dotted name, or a part of it that no other has; None: the middle one of the swapped layers.
        step: denoising step, counted from 0; None: the middle one.
        head: one that the layer must have.

    Raises `ValueError` for a layer that is not swapped and a head that it does not have, before the run, and for a step
    that the run does not have.
    """
    watched = _Watched(mechanism=mechanism)
    with apply(pipe, watched) as handle:
        names = [swapped.name for swapped in handle.layers]
        number = _number_of(layer, names)
        heads = getattr(handle.layers[number].module, "heads", None)
        if heads is not None and head >= heads:
            raise ValueError(f"layer {names[number]} has heads 0 to {heads - 1}, got head={head}")
        calls = watched.calls[number] = {}
        result = run()
    steps = sorted(calls)
    if not steps:
        raise ValueError(f"layer {names[number]} attended in no step by {mechanism}; see diffattn.summary(pipe)")
    place = len(steps) // 2 if step is None else step
    if not 0 <= place < len(steps):
        raise ValueError(f"the run has steps 0 to {len(steps) - 1}, got step={step}")
    found = calls[steps[place]]
    found.layer, found.step = names[number], place
    return result, found


def _number_of(layer: str | None, names: list[str]) -> int:
    if layer is None:
        return len(names) // 2
    if layer in names:
        return names.index(layer)
    fitting = [name for name in names if layer in name]
    if len(fitting) != 1:
        several = ", ".join(fitting or names)
        raise ValueError(
            f"layer={layer!r} is {'no' if not fitting else 'more than one'} swapped layer; name one of {several}"
        )
    return names.index(fitting[0])


@dataclass(frozen=True, kw_only=True)
class _Watched(Mechanism):
    """A mechanism, and the first call in every step of the layers that `calls` has."""

    type: ClassVar[str] = "watched"

    mechanism: Mechanism
    calls: dict[int, dict[float, Caught]] = field(default_factory=dict, compare=False)
    """Number of the layer -> progress of the step -> call."""

    def __post_init__(self) -> None:
        """The options are the mechanism's, which has looked at them."""

    @property
    def approximates(self) -> bool:
        return self.mechanism.approximates

    @property
    def needs(self) -> frozenset[str]:
        return self.mechanism.needs | {"call_index", "progress"}

    @property
    def backends(self) -> tuple[str, ...]:
        return self.mechanism.backends

    def check(self, grid: TokenGrid, *, context: Context = Context()) -> None:
        self.mechanism.check(grid, context=context)

    def weights(self, heads: int, head_dim: int) -> nn.Module | None:
        return self.mechanism.weights(heads, head_dim)

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, *, context: Context = Context()) -> int:
        return self.mechanism.flops(grid, heads, head_dim, context=context)

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
        if context.call_index in self.calls:
            own = default_scale(q) if scale is None else scale
            progress = 0.0 if context.progress is None else context.progress
            caught = Caught(self.mechanism, grid, q, k, v, own, context)
            self.calls[context.call_index].setdefault(progress, caught)
        return self.mechanism.attend(q, k, v, grid, scale=scale, backend=backend, context=context)

    def __str__(self) -> str:
        return str(self.mechanism)
