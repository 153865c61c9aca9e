"""How much each key of a block counts in its mean: by the mean query of the head, or by trained weights.

    w_k = softmax over the cells of the block of s_k
    s_k = scale * u k                      u: mean of the queries of the grid's cells          `MeanQuery`
    s_k = a_place(k) + scale * u k         a, u: trained, for each head; zero at first         `PoolWeights`
    k_b = sum_k w_k k,    v_b = sum_k w_k v,    logit of the block for a query q: scale * q k_b + entropy of w

Why the entropy, for any w: by Gibbs' inequality the block's true mass for logits l_k = scale * q k is
log sum_k exp(l_k) >= sum_k w_k l_k + entropy(w), with equality where w is the softmax of l itself. So no weights let a
block count for more than its keys, and the best ones let it count for as much. Even weights have the entropy log c in a
block of c cells.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from diffattn.grid import TokenGrid
from diffattn.kernels.pattern import Shape
from diffattn.kernels.routed import probed

from ..base import Context


class Weighing(Protocol):
    """What says s."""

    def logits(self, keys: Tensor, block: Shape, scale: float) -> Tensor:
        """Of keys in tiles of whole blocks, `(b h, tiles, cells, d)` to `(b h, tiles, cells)`."""
        ...

    def logits_of_cells(self, keys: Tensor, grid: TokenGrid, block: Shape, scale: float) -> Tensor:
        """Of the cells of a grid in its order, `(b, h, cells, d)` to `(b, h, 1, cells)`."""
        ...


@dataclass(frozen=True, eq=False)
class MeanQuery:
    """By the mean query of each head."""

    query: Tensor  # b h d

    @classmethod
    def of(cls, q: Tensor, grid: TokenGrid) -> "MeanQuery":
        """That of the cells of `q` `(b, h, n, d)`."""
        return cls(grid.split(q)[0].to(torch.promote_types(q.dtype, torch.float32)).mean(2))

    def logits(self, keys: Tensor, block: Shape, scale: float) -> Tensor:
        return probed(keys, scale * self.query.flatten(0, 1))

    def logits_of_cells(self, keys: Tensor, grid: TokenGrid, block: Shape, scale: float) -> Tensor:
        return scale * self.query[:, :, None] @ keys.mT


class PoolWeights(nn.Module):
    """One layer's weights, for blocks of `block` (frames, rows, columns); on a shorter side its first places count."""

    def __init__(self, heads: int, head_dim: int, block: Shape) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(heads, *block))
        self.query = nn.Parameter(torch.zeros(heads, head_dim))

    def logits(self, keys: Tensor, block: Shape, scale: float) -> Tensor:
        samples, number = keys.shape[0] // len(self.query), torch.promote_types(keys.dtype, torch.float32)
        found = probed(keys, scale * self.query.to(number).repeat(samples, 1))
        frames, rows, columns = block
        places = self.places[:, :frames, :rows, :columns].flatten(1).to(number)
        several = keys.shape[2] // places.shape[1]
        return found + places.repeat(samples, several)[:, None]

    def logits_of_cells(self, keys: Tensor, grid: TokenGrid, block: Shape, scale: float) -> Tensor:
        frame, row, column = (axis % side for axis, side in zip(grid.positions(keys.device), block, strict=True))
        places = self.places[:, frame, row, column].to(keys)
        return (places + scale * (keys @ self.query.to(keys)[:, :, None]).squeeze(-1)).unsqueeze(-2)


def weighing_of(means: str, q: Tensor, grid: TokenGrid, context: Context) -> Weighing | None:
    """How much each key counts where `means` are even, weighted or learned; None: all alike, as before training."""
    if means == "weighted":
        return MeanQuery.of(q, grid)
    weights = context.weights if means == "learned" else None
    if weights is not None and not isinstance(weights, PoolWeights):
        raise ValueError(
            f"means='learned': Context.weights must come from mechanism.weights(heads, head_dim), got a "
            f"{type(weights).__name__}"
        )
    return weights
