"""What swapped layers did: for `diffattn.summary` after a run."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .situation import Situation

SWAPPED, EXACT = "swapped", "exact by the model's own kernel"
DENSE_STEP = "dense in steps that steps= leaves out"
DENSE_SHARE = "dense in steps before start= and from end= on"
DENSE_PART = "dense in the parts of the run that its schedule leaves full"
TOO_FEW = "dense with fewer tokens than min_tokens"
REUSED = "with the output of an earlier step"
PERTURBED = "dense in guidance that replaces attention by its values"
PAUSED = "dense in a pause"
ASIDE = "dense among other tokens"
"""A call beside a layer's own, which is not counted."""

Done = dict[tuple[int, str, Any], tuple[int, "Record"]]
"""(id of a layer, outcome, what the call was) -> number of such calls, and one of them."""


@dataclass(frozen=True, eq=False)
class Record:
    """What one call was, with the number of its keys; tensors are without data."""

    situation: Situation
    query: Tensor
    keys: int
    mask: Tensor | None

    @property
    def signature(self) -> tuple[Any, ...]:
        """Equal for calls that cost the same."""
        mask = None if self.mask is None else (tuple(self.mask.shape), self.mask.dtype)
        return self.situation, tuple(self.query.shape), self.keys, mask


def note(done: Done, layer: object, outcome: str, record: Record) -> None:
    """Count one call of a layer."""
    key = id(layer), outcome, record.signature
    count, first = done.get(key, (0, record))
    done[key] = count + 1, first


def add(done: Done, more: Done) -> None:
    """Count what another forward did."""
    for key, (count, record) in more.items():
        former, first = done.get(key, (0, record))
        done[key] = former + count, first


def without_data(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, dtype and device that holds a single number."""
    return tensor.new_empty(()).expand(tensor.shape)
