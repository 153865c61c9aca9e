"""SLA: exact attention to the blocks that matter most, and a projected linear attention added to it.

    s_I,j = (mean of q in block I) (mean of k in block j)         S_I: the t = int(share * blocks) of the largest s_I,j
    o_q   = softmax over the tokens of S_I of (scale * q k^T) v  +  W l_q + b
    l_q   = phi(q) sum_k phi(k)^T v / (1e-5 + phi(q) sum_k phi(k)^T)         phi = softmax over the channels

Blocks are stretches of tokens in the model's own order, 128 of queries and 64 of keys as in the released video models;
the last one may be shorter. `W` and `b` are one linear layer for all heads of a layer, zero before training, when what
is not in a chosen block is not seen at all: so a pretrained model needs training after the swap.

`over` says which keys are in `l`: all, as in the authors' code that made the published weights; or the rest, those of
the blocks that I has not chosen, as in the paper and in the first release of the code.

Source: Zhang et al., SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention,
https://arxiv.org/abs/2509.24006, and its released code. Differences: other tokens (text) are in no block, all queries
see them exactly, and they see all (the code knows one sequence; Wan's has no text in it); masks over the keys; at least
one block is chosen. All is in the dtype of the inputs, and means and linear sums in float32 at least, where the code
takes bfloat16. The paper's third kind of blocks, which it drops, is in neither release.

`diffattn.load` reads published weights (`diffattn/adapters/published`).
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from ...config import register
from ...grid import TokenGrid
from ...options import Must, at_least
from ..base import Context
from .branched import Branched, BranchWeights, ZeroLinear
from .chosen_tiles import ChosenTiles

SHARE = Must("a number above 0 and at most 1", lambda share: 0 < share <= 1)
FEATURE_MAPS = ("softmax", "elu", "relu")


class SLAWeights(BranchWeights):
    """One layer's projection of the linear attention, zero at first. Names and shapes are those of published files."""

    part = None
    maps = None

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.proj_l = ZeroLinear(head_dim, head_dim)

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        return self.proj_l.bias

    def project(self, found: Tensor) -> Tensor:
        return found @ self.proj_l.weight.mT.to(found)


@register("sla")
@dataclass(frozen=True, kw_only=True)
class SparseLinearAttention(Branched):
    """Exact attention to chosen blocks, and linear attention. Time O(share n^2 d + n d^2).

    >>> SparseLinearAttention(top_share=0.1).part.exact_tiles(TokenGrid(30, 52, frames=21))
    51
    """

    eps: ClassVar[float] = 1e-5

    top_share: Annotated[float, SHARE] = 0.1
    """Of the blocks of keys, rounded down: those that each block of queries sees exactly."""
    tile: Annotated[int, at_least(1)] = 64
    """Tokens of a block of keys."""
    query_tile: Annotated[int, at_least(1)] = 128
    """Tokens of a block of queries, which choose together."""
    over: Literal["all", "rest"] = "all"
    """Keys in the linear attention: all, or those of no chosen block."""
    feature_map: Annotated[str, Must(f"one of {', '.join(FEATURE_MAPS)}", lambda name: name in FEATURE_MAPS)] = (
        "softmax"
    )
    """What queries and keys go through: softmax, elu or relu."""

    chosen_tiles: ClassVar[ChosenTiles]
    """What each is without the linear attention; made once, as a compiler cannot trace the checks of options."""

    def __post_init__(self) -> None:
        super().__post_init__()
        part = ChosenTiles(
            share=self.top_share,
            up=False,
            tile=(1, 1, self.tile),
            asking=(1, 1, self.query_tile),
            in_a_row=True,
        )
        object.__setattr__(self, "chosen_tiles", part)

    @property
    def part(self) -> ChosenTiles:
        return self.chosen_tiles

    @property
    def takes_rest(self) -> bool:
        return self.over == "rest"

    @property
    def scales(self) -> bool:
        return True

    def weights(self, heads: int, head_dim: int) -> SLAWeights:
        return SLAWeights(head_dim)

    def choose(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, scale: float | None = None, context: Context = Context()
    ) -> Tensor:
        """The chosen blocks `(b, h, blocks of queries, chosen)`."""
        return self.part.choose(q, k, v, grid, scale, context)
