"""What a layer computes in which part of a run.

    step i of n belongs to the first part with (s + i) / (s + n) < until

Parts are shares of the schedule, not numbers of steps, so that one serves 4 steps and 50. They count from pure noise:
image-to-image, which skips the first s steps, begins late.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ...mechanisms.base import Mechanism
from ...mechanisms.softmax import SoftmaxAttention

FULL = SoftmaxAttention()
"""The model's own attention, as a mechanism."""


@dataclass(frozen=True)
class Part:
    """One part: a mechanism, computed in one of `reuse` steps, up to `until` of the run."""

    mechanism: Mechanism
    reuse: int = 1
    until: float = 1.0

    @property
    def own(self) -> bool:
        """Is it the model's own attention in every step?"""
        return self.mechanism.exact and self.reuse == 1

    def __str__(self) -> str:
        what = "full" if self.mechanism == FULL else str(self.mechanism)
        return f"{what}, reuse {self.reuse}" if self.reuse > 1 else what


@dataclass(frozen=True)
class Schedule:
    """The parts of a run in turn; the last one lasts to its end."""

    parts: tuple[Part, ...]

    @classmethod
    def always(cls, mechanism: Mechanism, reuse: int = 1) -> "Schedule":
        """One mechanism throughout."""
        return cls((Part(mechanism, reuse),))

    @property
    def main(self) -> Part:
        """The first part that is not the model's own attention, or the first one."""
        return next((part for part in self.parts if not part.own), self.parts[0])

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Those of the parts, but for the model's own attention beside others."""
        return tuple(dict.fromkeys(part.mechanism for part in self.parts if not part.own)) or (self.main.mechanism,)

    @property
    def own(self) -> bool:
        """Is it the model's own attention in all parts?"""
        return self.main.own

    @property
    def reuse(self) -> int:
        """The largest of the parts."""
        return max(part.reuse for part in self.parts)

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `Context` that the mechanisms read, and those that tell the part."""
        several = {"progress"} if len(self.parts) > 1 else set()
        kept = {"memory"} if self.reuse > 1 else set()
        return frozenset(several | kept).union(*(mechanism.needs for mechanism in self.mechanisms))

    def number(self, progress: float | None) -> int:
        """The part at this share of the schedule; outside a run the main one."""
        if progress is None:
            return self.parts.index(self.main)
        ends = (part.until for part in self.parts[:-1])
        return sum(progress >= until for until in ends)

    def at(self, progress: float | None) -> Part:
        """The part at this share of the schedule."""
        return self.parts[self.number(progress)]

    def __str__(self) -> str:
        if len(self.parts) == 1:
            return str(self.parts[0])
        return "; ".join(f"{part} to {part.until:.0%}" for part in self.parts)


def with_shares(mechanism: Mechanism, reuse: int, shares: Iterable[float], start: float, end: float) -> Schedule:
    """Shares of the pairs one after the other, each for an equal part of the run from `start` to `end`."""
    several = tuple(shares)
    if not several:
        return Schedule.always(mechanism, reuse)
    if "share" not in type(mechanism).__dataclass_fields__:
        raise ValueError(f"shares= are those of routing's pairs, and {mechanism.type} has no share: leave them out")
    of_tiles = getattr(mechanism, "top_share", None) is not None
    long = (end - start) / len(several)
    ends = [start + long * (number + 1) for number in range(len(several) - 1)] + [1.0]
    cheaper = (replace(mechanism, **{"top_share" if of_tiles else "share": share}) for share in several)
    return Schedule(tuple(Part(own, reuse, until) for own, until in zip(cheaper, ends, strict=True)))
