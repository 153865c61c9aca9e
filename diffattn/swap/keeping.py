"""What a layer keeps from one step of a run to the next: its mechanism's own, and outputs that `reuse=` gives again."""

from typing import Any, Protocol

import torch
from torch import Tensor

from ..mechanisms.base import Mechanism
from .calls.frames import Call
from .calls.situation import Situation

OUTPUT, STEP = "output", "step of output"


class Keeps(Protocol):
    """What is asked of a `SwappedLayer`."""

    mechanism: Mechanism
    reuse: int


def memories(layer: Keeps, call: Call, situation: Situation, query: Tensor) -> list[dict[str, Any]]:
    """What was kept in the run for this call, one dict for each grid; none outside a pipeline and in training."""
    wanted = layer.reuse > 1 or "memory" in layer.mechanism.needs
    if not wanted or call.run is None or torch.is_grad_enabled():
        return []
    turn = call.turns[id(layer)] = call.turns.get(id(layer), -1) + 1
    shape = (len(query) // len(situation.grids), *query.shape[1:])
    return [
        call.run.memory((id(layer), call.sample, turn, number), (grid, shape, situation.order))
        for number, grid in enumerate(situation.grids)
    ]


def output(reuse: int, call: Call, kept: list[dict[str, Any]]) -> Tensor | None:
    """The output of an earlier step, where this one is to take it; the first step and the last are computed."""
    moment = call.moment
    if reuse == 1 or moment is None or moment.step == moment.total - 1:
        return None
    parts = [memory[OUTPUT] for memory in kept if OUTPUT in memory and 0 < moment.step - memory[STEP] < reuse]
    return torch.cat(parts) if parts and len(parts) == len(kept) else None


def keep(call: Call, kept: list[dict[str, Any]], out: Tensor) -> None:
    """Keep copies, for what a layer gives away may be written over in a compiled model; after the last step nothing."""
    moment = call.moment
    if moment is None or not kept:
        return
    for memory, part in zip(kept, out.split(len(out) // len(kept)), strict=True):
        if moment.step == moment.total - 1:
            memory.pop(OUTPUT, None)
        else:
            memory[OUTPUT], memory[STEP] = part.clone(), moment.step
