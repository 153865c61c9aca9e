"""Can a swap pay at the size of a call? A bound from counted operations, before anybody has timed anything.

    speed-up <= (attention + rest) / (computed + rest),      rest = 2 x numbers of the model x tokens

`rest` is what the linear layers of a transformer do to every token. Kernels reach less of a machine's peak at small
sizes, so that the bound is generous: where it is low, nothing can be gained. Not for UNets, whose work is convolutions.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...mechanisms.softmax import SoftmaxAttention
from .records import REUSED, SWAPPED, Record

LEAST = 1.1
"""Speed-up below which it is told that nothing is gained."""


@dataclass(frozen=True)
class Worth:
    """Of one forward."""

    tokens: int
    attention: float
    """Share of full attention in all operations."""
    bound: float
    """The speed-up is at most this."""

    def told(self, model: str) -> str:
        """That the swap gains nothing, in words."""
        return (
            f"at {self.tokens} tokens attention is {self.attention:.0%} of the work of {model}: this swap makes it at "
            f"most {self.bound:.2f} times faster; diffattn.estimate tells from which size on it pays"
        )


def worth_of(model: nn.Module, calls: Iterable[tuple[Any, str, int, Record]]) -> Worth | None:
    """The bound for what the swapped layers did; None where none of them was swapped."""
    full = own = 0.0
    tokens = samples = 0
    for layer, outcome, count, record in calls:
        if outcome not in (SWAPPED, REUSED):
            continue
        part = layer.schedule.parts[record.situation.part]
        before = count * len(record.query) * layer.flops_of(record, SoftmaxAttention())
        full += before
        try:
            own += count * len(record.query) * layer.flops_of(record) / part.reuse
        except NotImplementedError:  # a mechanism from outside need not count
            return None
        tokens, samples = max(tokens, record.query.shape[2]), max(samples, len(record.query))
    if not tokens:
        return None
    rest = 2.0 * sum(parameter.numel() for parameter in model.parameters()) * tokens * samples
    return Worth(tokens, full / (full + rest), (full + rest) / (own + rest))
