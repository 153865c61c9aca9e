"""What a layer keeps from one step of a run to the next: its mechanism's own, and outputs that `reuse=` gives again."""

from typing import Any

import torch
from torch import Tensor

from ..settings.schedule import Part
from .frames import Call
from .situation import Situation

OUTPUT, STEP = "output", "step of output"


def memories(layer: int, part: Part, call: Call, situation: Situation, query: Tensor) -> list[dict[str, Any]]:
    """What a part of a layer's schedule kept in the run for this call, one dict for each grid; none outside a pipeline
    and in training.
    """
    wanted = part.reuse > 1 or "memory" in part.mechanism.needs
    if not wanted or call.run is None or torch.is_grad_enabled():
        return []
    turn = call.turns[layer] = call.turns.get(layer, -1) + 1
    shape = (len(query) // len(situation.grids), *query.shape[1:])
    return [
        call.run.memory((layer, situation.part, call.sample, turn, number), (grid, shape, situation.order))
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
