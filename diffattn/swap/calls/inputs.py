"""The tensors of one attention call."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Inputs:
    """Queries, keys and values `(b, h, n, d)`, the model's mask, the block's input `(b, n, channels)`, the scale."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    features: Tensor | None
    """The input of the block, or of the layer itself where its mechanism asks for hidden states."""
    scale: float | None
    first_head: int = 0
    """Number of the first head, where other ranks have those before."""

    def sample(self, number: int) -> "Inputs":
        """One of the batch, as a batch of one."""
        q, k, v = (x[number : number + 1] for x in (self.query, self.key, self.value))
        mask, features = (None if x is None else x[number % len(x)][None] for x in (self.mask, self.features))
        return Inputs(q, k, v, mask, features, self.scale, self.first_head)


def as_asked(kept: Tensor | None, needs: frozenset[str]) -> dict[str, Any]:
    """The input that was kept, under the name of the context's field that a mechanism needs."""
    return {"hidden" if "hidden" in needs else "features": kept}
