"""Splits of videos into clips that the tests of parallel operations run on."""

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from diffattn.parallel.operations.shares import FramePlan

SPLITS: list[tuple[int, ...]] = [
    (7,),
    (6, 6),
    (7, 4),
    (4, 4, 4),
    (1, 9, 2),
    (5, 1, 6),
    (3, 3, 3, 3),
    (1, 1, 1, 1),
    (2, 1, 1, 8),
]
"""Even and uneven ones, on one to four ranks, with clips of a single frame."""


def plan_of(mesh: DeviceMesh, lengths: Sequence[int]) -> FramePlan:
    return FramePlan.split(sum(lengths), mesh, lengths)


def clip_of(x: Tensor, plan: FramePlan, dim: int) -> Tensor:
    """A rank's frames of the whole, as a tensor of its own."""
    return x.narrow(dim, plan.own.start, plan.length).clone()
