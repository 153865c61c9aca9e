"""What one forward of a model computes, counted on the meta device: no weights, no memory."""

import collections
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ...grid import TokenGrid
from ...mechanisms.base import Context
from ...swap.apply import commit
from ...swap.plan import plan
from ...swap.settings.placement import LayerChoice, Placement
from ...swap.settings.schedule import Schedule
from .inputs import make_inputs
from .sizes import assume_grid

HALFWAY = Context(progress=0.5, timestep=500.0, sigma=0.5)
"""Mechanisms that change from step to step count as in the middle of the schedule."""


@dataclass(frozen=True)
class AttentionCall:
    """Calls of one kind: those of layers with the same grid, heads and schedule."""

    grid: TokenGrid
    heads: int
    head_dim: int
    schedule: Schedule

    @property
    def full(self) -> int:
        """Floating-point operations of full attention on one sample."""
        return 4 * self.grid.pairs * self.heads * self.head_dim


@dataclass(frozen=True)
class Work:
    """One forward of a model for one sample."""

    calls: collections.Counter[AttentionCall]
    """The calls that a swap takes, and how many layers make each."""
    rest: int
    """Floating-point operations of all else."""
    weights: int
    """Numbers that the model has."""

    @property
    def attention(self) -> int:
        """Floating-point operations of full attention in the layers that are swapped."""
        return sum(call.full * count for call, count in self.calls.items())

    @property
    def share(self) -> float:
        """That of all."""
        return self.attention / (self.attention + self.rest)


def on_meta(model: nn.Module) -> nn.Module:
    """The same model without weights, in one dtype: some classes keep parts in float32."""
    own: Any = model
    with init_empty_weights(include_buffers=False):
        made: nn.Module = type(own).from_config(own.config)
    return made


def work_of(model: nn.Module, schedule: Schedule, grid: TokenGrid, text: int, layers: LayerChoice = None) -> Work:
    """Count a forward of `grid`'s cells and `text` tokens, with the layers that `schedule` takes apart."""
    empty = on_meta(model).to("meta")
    like = torch.empty(0, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        empty(**make_inputs(empty, grid, text, 1, like))
    calls: collections.Counter[AttentionCall] = collections.Counter()
    with commit([plan(empty, schedule, Placement(layers=layers))], trained=True) as handle:
        assume_grid(empty, handle, grid, like)
        for layer in handle.layers:
            query = layer.last.query  # type: ignore[union-attr]
            calls[AttentionCall(layer.grid, query.shape[1], query.shape[3], layer.schedule)] += 1  # type: ignore[arg-type]
    attention = sum(call.full * count for call, count in calls.items())
    weights = sum(parameter.numel() for parameter in empty.parameters())
    return Work(calls, counter.get_total_flops() - attention, weights)
