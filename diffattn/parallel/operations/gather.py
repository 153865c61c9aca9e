"""Chosen frames of the whole video, on every rank.

Who holds which frame follows from the plan, so nothing is asked for: each rank puts its share into one collective, and
all put the frames into the order of the list.

Cost: one all-gather of `ranks * (largest share)` frames; the share of a rank that has fewer is filled up. Evenly spread
frames in even clips leave nothing to fill: a rank then sends 1/ranks of the frames and receives the rest.
"""

import functools
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor
from torch.nn import functional as F

from .collectives import all_gather, all_sum
from .shares import FramePlan


@overload
def gather_frames(
    x: Tensor, absolute_indices: Sequence[int], dim: int, plan: FramePlan, label: str = "gather"
) -> Tensor: ...
@overload
def gather_frames(
    x: Sequence[Tensor], absolute_indices: Sequence[int], dim: int, plan: FramePlan, label: str = "gather"
) -> tuple[Tensor, ...]: ...
def gather_frames(
    x: Tensor | Sequence[Tensor], absolute_indices: Sequence[int], dim: int, plan: FramePlan, label: str = "gather"
) -> Tensor | tuple[Tensor, ...]:
    """Frames `absolute_indices` of the video along `dim`, in that order and as often as listed; the same on all ranks.

    Differentiable; every rank must then run the backward pass.

    Args:
        x: this rank's clip, or several tensors of one dtype that travel together, as `(k, v)`.
        absolute_indices: numbers of frames in the whole video; the same list on every rank.
        label: the name under which `plan.traffic` counts it.
    """
    tensors = (x,) if isinstance(x, Tensor) else tuple(x)
    for tensor in tensors:
        plan.check(tensor.shape[dim])
    owners = [plan.owner(frame) for frame in absolute_indices]
    shares = [[frame for frame, owner in zip(absolute_indices, owners, strict=True) if owner == rank]
              for rank in range(plan.ranks)]  # fmt: skip
    places = _index(tuple(frame - plan.own.start for frame in shares[plan.rank]), tensors[0].device)
    if plan.ranks == 1 or not owners:
        out = tuple(tensor.index_select(dim, places) for tensor in tensors)
    else:
        out = _gather(tensors, places, owners, max(map(len, shares)), dim, plan, label)
    return out[0] if isinstance(x, Tensor) else out


def gather_all(x: Tensor, dim: int, plan: FramePlan, label: str = "gather") -> Tensor:
    """All frames of the video along `dim`, on every rank; clips that are shorter than the longest are filled up."""
    plan.check(x.shape[dim])
    longest = max(plan.lengths)
    rows = x.movedim(dim, 0)
    filled = torch.cat([rows, rows.new_zeros(longest - plan.length, *rows.shape[1:])])
    gathered = all_gather(filled, plan, label)
    return torch.cat([part[:length] for part, length in zip(gathered, plan.lengths, strict=True)]).movedim(0, dim)


def gather_by_sample(x: Sequence[Tensor], places: Tensor, plan: FramePlan, label: str = "gather") -> tuple[Tensor, ...]:
    """Frames `places` `(b, chosen)` of the video, others for each sample: `(b, h, chosen, cells, ..)` of each tensor.

    Each rank gives what it holds of them and zeros for the rest, and all is summed up. Differentiable; every rank must
    then run the backward pass.

    Args:
        x: this rank's clip, `(b|1, h|1, frames, cells, ..)`, several tensors of one dtype that travel together.
    """
    own = places - plan.own.start
    held = ((own >= 0) & (own < plan.length))[:, None, :, None, None]
    found = []
    for tensor in x:
        tensor = tensor.expand(len(places), *tensor.shape[1:])
        index = own.clamp(0, plan.length - 1)[:, None, :, None, None]
        picked = tensor.gather(2, index.expand(-1, tensor.shape[1], -1, *tensor.shape[3:]))
        found.append(picked.masked_fill(~held, 0.0))
    total = all_sum(torch.cat([part.flatten() for part in found]), plan, label)
    pieces = total.split([part.numel() for part in found])
    return tuple(piece.view(part.shape) for piece, part in zip(pieces, found, strict=True))


def _gather(
    tensors: tuple[Tensor, ...], places: Tensor, owners: list[int], share: int, dim: int, plan: FramePlan, label: str
) -> tuple[Tensor, ...]:
    frame_first = [tensor.movedim(dim, 0) for tensor in tensors]
    rows = torch.cat([x.index_select(0, places).flatten(1) for x in frame_first], dim=1)
    gathered = all_gather(F.pad(rows, (0, 0, 0, share - len(rows))), plan, label).flatten(0, 1)
    order = tuple(owner * share + owners[:i].count(owner) for i, owner in enumerate(owners))
    in_order = order == tuple(range(len(gathered)))  # as of evenly spread frames: no second copy of them
    chosen = gathered if in_order else gathered.index_select(0, _index(order, rows.device))
    parts = chosen.split([x[0].numel() for x in frame_first], dim=1)
    return tuple(part.unflatten(1, x.shape[1:]).movedim(0, dim) for part, x in zip(parts, frame_first, strict=True))


@functools.lru_cache(256)
def _index(places: tuple[int, ...], device: torch.device) -> Tensor:
    """The same index in every layer and step: kept, for copying it to a GPU each time would wait for the GPU."""
    with torch.inference_mode(False):
        return torch.tensor(places, dtype=torch.long, device=device)
