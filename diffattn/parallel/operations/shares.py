"""How the frames of one video are split among ranks: a clip of neighbouring frames for each.

    clip r = frames first_r ... first_r + lengths_r - 1,    first_r = lengths_0 + ... + lengths_(r-1)

Frames are numbered from the start of the whole video everywhere, so what is computed from their numbers does not
depend on the split. Clips may differ in length and may be shorter than the context that a layer needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


@dataclass
class Traffic:
    """Bytes that one rank sent and received, and the calls it took; summed up over operations of one label."""

    sent: dict[str, int] = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def count(self, label: str, sent: int, received: int) -> None:
        """Add one operation. A collective counts what a rank puts in once, however many ranks get it."""
        for table, amount in ((self.sent, sent), (self.received, received), (self.calls, 1)):
            table[label] = table.get(label, 0) + amount

    def reset(self) -> None:
        """Forget everything."""
        for table in (self.sent, self.received, self.calls):
            table.clear()


@dataclass
class Clock:
    """Where a run stands, told by what steps through it: for settings that change from step to step."""

    progress: float | None = None
    """Share of the schedule that is behind, in [0, 1)."""


@dataclass(frozen=True)
class FramePlan:
    """Which rank holds which frames; without a group, one rank alone.

    >>> plan = FramePlan((5, 2, 5), rank=1)
    >>> plan.own, plan.window(left=3, right=9), plan.owner(7)
    (range(5, 7), range(2, 12), 2)
    """

    lengths: tuple[int, ...]
    """Frames of each rank's clip, in the order of the ranks."""
    rank: int = 0
    """This rank's place in `lengths`."""
    group: Any = field(default=None, compare=False, repr=False)
    """Process group of the ranks; None: nothing can be exchanged."""
    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)
    """Counts what this rank sends and receives by operations on this plan."""
    clock: Clock = field(default_factory=Clock, compare=False, repr=False)
    """Set by a loop of its own before every step; a pipeline given to `apply` counts by itself."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(self.lengths))
        if not self.lengths or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in self.lengths):
            raise ValueError(f"every rank needs at least one frame, got clips of {self.lengths} frames")
        if not 0 <= self.rank < len(self.lengths):
            raise ValueError(f"rank must be one of the {len(self.lengths)} that have clips, got {self.rank}")

    @classmethod
    def split(cls, frames: int, mesh: DeviceMesh | None = None, lengths: Sequence[int] | None = None) -> "FramePlan":
        """Share `frames` out among the ranks of a one-dimensional `mesh` (None: this process alone).

        Every rank calls it with the same arguments; where any is wrong, or the ranks disagree, all raise `ValueError`.

        Args:
            lengths: frames of each rank's clip. None: as even as possible, the longer clips first.
        """
        if mesh is not None and mesh.ndim != 1:
            raise ValueError(f"the mesh must have one dimension, got {mesh}; pass one of them, as mesh['frames']")
        rank, ranks, group = (0, 1, None) if mesh is None else (mesh.get_local_rank(), mesh.size(), mesh.get_group())
        plan: FramePlan | None = None
        error = _wrong_split(frames, ranks, lengths)
        if not error:
            even = [frames // ranks + (r < frames % ranks) for r in range(ranks)]
            plan = cls(tuple(even if lengths is None else lengths), rank, group)
        told = _gather_objects(group, ranks, (error, None if plan is None else plan.lengths))
        if error:
            raise ValueError(error)
        for r, (wrong, _) in enumerate(told):
            if wrong:
                raise ValueError(f"rank {r}: {wrong}")
        _same_everywhere("the split of the frames", [clips for _, clips in told])
        assert plan is not None
        return plan

    @property
    def frames(self) -> int:
        """Frames of the whole video."""
        return sum(self.lengths)

    @property
    def ranks(self) -> int:
        """How many ranks share the video."""
        return len(self.lengths)

    @property
    def length(self) -> int:
        """Frames of this rank's clip."""
        return self.lengths[self.rank]

    @property
    def own(self) -> range:
        """The frames of this rank."""
        return self.clip(self.rank)

    def clip(self, rank: int) -> range:
        """The frames of `rank`."""
        first = sum(self.lengths[:rank])
        return range(first, first + self.lengths[rank])

    def window(self, left: int, right: int, rank: int | None = None) -> range:
        """The frames of a rank (None: this one) with those around them, as far as the video goes."""
        clip = self.clip(self.rank if rank is None else rank)
        return range(max(clip.start - left, 0), min(clip.stop + right, self.frames))

    def coarser(self, size: int) -> "FramePlan":
        """The same split in patches of `size` frames; raises `ValueError` where it would cut one."""
        if any(length % size for length in self.lengths):
            raise ValueError(
                f"the model takes {size} latent frames as one patch, so clips must have multiples of {size} frames, "
                f"got {self.lengths}; pass lengths= to FramePlan.split"
            )
        lengths = tuple(length // size for length in self.lengths)
        return FramePlan(lengths, self.rank, self.group, self.traffic, self.clock)

    def owner(self, frame: int) -> int:
        """The rank that holds `frame`; `ValueError` where the video has no such frame."""
        for rank in range(self.ranks):
            if frame in self.clip(rank):
                return rank
        raise ValueError(f"the video has the frames 0 to {self.frames - 1}, got {frame}")

    def check(self, frames: int) -> None:
        """Raise `ValueError` where a tensor does not hold this rank's clip."""
        if frames != self.length:
            raise ValueError(
                f"rank {self.rank} of {self.ranks} has a clip of {self.length} frames, got {frames}; "
                f"give every rank its own frames, or make the plan anew"
            )

    def check_group(self) -> None:
        """Raise `ValueError` where there are other ranks but no way to reach them."""
        if self.ranks > 1 and self.group is None:
            raise ValueError(
                f"{self.ranks} clips need a process group; make the plan by FramePlan.split(frames, mesh), with a mesh "
                f"such as torch.distributed.device_mesh.init_device_mesh('cuda', ({self.ranks},))"
            )

    def agree(self, what: str, value: Any) -> None:
        """Raise `ValueError` on every rank unless all of them pass an equal `value`. A small exchange of objects."""
        _same_everywhere(what, self.gather_objects(value))

    def gather_objects(self, value: Any) -> list[Any]:
        """`value` of every rank: small things, and slowly."""
        self.check_group()
        return _gather_objects(self.group, self.ranks, value)


def _wrong_split(frames: int, ranks: int, lengths: Sequence[int] | None) -> str:
    """What is wrong with a split, if anything."""
    if frames < ranks:
        return f"{frames} frames can't be split among {ranks} ranks: each needs one; start fewer ranks"
    if lengths is not None and (len(lengths) != ranks or sum(lengths) != frames or min(lengths) < 1):
        return (
            f"lengths must name a clip of at least one frame for each of {ranks} ranks, {frames} frames in all, "
            f"got {list(lengths)} with {sum(lengths)} frames"
        )
    return ""


def _gather_objects(group: Any, ranks: int, value: Any) -> list[Any]:
    if group is None:
        return [value]
    values: list[Any] = [None] * ranks
    dist.all_gather_object(values, value, group=group)
    return values


def _same_everywhere(what: str, values: Sequence[Any]) -> None:
    for rank, value in enumerate(values):
        if value != values[0]:
            raise ValueError(
                f"the ranks disagree on {what}: rank 0 has {values[0]}, rank {rank} has {value}; start all ranks with "
                f"the same settings"
            )
