"""Any mechanism, and a trained linear branch beside it.

    out_i = base(q, k, v)_i + P_h l_i      for the cells i;   other tokens have what the base gives them
    l_i   = sum_{j in R(i)} w_j (f_i g_j) v_j / sum_{j in R(i)} w_j (f_i g_j),    f = phi(q),  g = phi(k)

R(i) are cells: all of them, or the rest, which i does not see exactly (`over`). The rest is known by tiles where the
base leaves out whole tiles of the grid, which are then summed up at little cost: `routing` with `order="space"` and the
windows with `pool`, whose means the branch corrects. Of every other base the branch is over all cells.

P, one matrix for each head or one for the layer, is zero before training: so an untrained hybrid is its base bit for
bit, and P learns first. `parts/linear_branch.py` has the feature maps; a model's mask over the keys, the same for all
queries, is in w.

Source: Zhang et al., SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention,
https://arxiv.org/abs/2509.24006, which adds a projected linear branch to exact blocks (`sla`). Here the exact part is
any mechanism, with means where it has some.

Time that of the base and O(n d^2). Sums are taken in float32 at least.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ... import config
from ...config import register
from ...options import Must, shown
from ..base import Mechanism, changed_options
from ..parts.linear_branch import FEATURE_MAPS
from ..parts.linear_weights import LinearWeights
from .branched import Branched, BranchWeights

BASE = "a mechanism, such as 'routing(share=0.25)'"


class HybridWeights(BranchWeights):
    """One layer's weights: those of the base, of the feature maps, and the projection, zero at first."""

    def __init__(self, base: nn.Module | None, maps: LinearWeights | None, heads: int, head_dim: int) -> None:
        super().__init__()
        self.base, self.maps = base, maps
        self.projection = nn.Parameter(torch.zeros(heads, head_dim, head_dim))

    @property
    def part(self) -> nn.Module | None:  # type: ignore[override]
        return self.base

    def project(self, found: Tensor) -> Tensor:
        return found @ self.projection.to(found)


@register("hybrid")
@dataclass(frozen=True, kw_only=True)
class HybridAttention(Branched):
    """A mechanism, and a trained linear branch for what it leaves out.

    >>> print(HybridAttention(base="routing(share=0.25)", feature_map="elu"))
    hybrid(base=routing(share=0.25), feature_map=elu)
    """

    base: Annotated[Mechanism | str, Must(BASE)]
    """The mechanism, its dict, or a text such as `routing(share=0.25)`."""
    over: Literal["auto", "rest", "all"] = "auto"
    """Cells in the branch: those that the base does not see exactly, or all; auto: the rest where the base knows it."""
    feature_map: Annotated[str, Must(f"one of {', '.join(FEATURE_MAPS)}", lambda name: name in FEATURE_MAPS)] = (
        "softmax"
    )
    """What queries and keys go through: softmax, elu, relu or learned."""
    projection: Literal["heads", "layer"] = "heads"
    """A matrix for each head, or one for the layer."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", _base(self.base))
        super().__post_init__()
        if self.over == "rest" and not self.part.leaves_tiles:
            raise ValueError(
                f"hybrid: over='rest' needs a base that leaves out whole tiles of the grid, as routing in its "
                f"order=space and windows with pool= do; got {self.part}; give one of those, or over='all'"
            )
        if getattr(self.part, "ntk_factor", 1.0) != 1.0:
            raise ValueError(
                f"hybrid: ntk_factor changes the positions of the branch too, got base={self.part}; leave it out"
            )

    @property
    def part(self) -> Mechanism:
        """The base."""
        return self.base  # type: ignore[return-value]

    @property
    def takes_rest(self) -> bool:
        """Is the branch over the rest alone?"""
        return self.over != "all" and self.part.leaves_tiles

    @property
    def kinds(self) -> frozenset[str]:  # type: ignore[override]
        return self.part.kinds

    @property
    def across_frames(self) -> bool:  # type: ignore[override]
        return self.part.across_frames

    @property
    def across_rows(self) -> bool:  # type: ignore[override]
        return self.part.across_rows

    @property
    def joins_grids(self) -> bool:  # type: ignore[override]
        return self.part.joins_grids

    @property
    def approximates(self) -> bool:
        return self.part.approximates or self.part.exact

    @property
    def needs_steps(self) -> bool:
        return self.part.needs_steps

    @property
    def scales(self) -> bool:
        return self.part.scales

    def weights(self, heads: int, head_dim: int) -> HybridWeights:
        maps = None
        if self.feature_map == "learned":
            maps = LinearWeights(heads, head_dim, maps=True, residual=None)
        count = heads if self.projection == "heads" else 1
        return HybridWeights(self.part.weights(heads, head_dim), maps, count, head_dim)

    def __str__(self) -> str:
        others = [f"{name}={value}" for name, value in changed_options(self).items() if name != "base"]
        return f"hybrid({', '.join([f'base={self.part}', *others])})"


def _base(given: Any) -> Mechanism:
    """What `base` may be, as a mechanism."""
    if isinstance(given, dict) and "type" in given:
        given = config.from_dict(given)
    elif isinstance(given, str):
        given = config.from_text(given, f"hybrid: base must be {BASE}")
    if not isinstance(given, Mechanism):
        raise ValueError(f"hybrid: base must be {BASE}, got {shown(given)}")
    return given
