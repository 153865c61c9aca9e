"""Attention within the groups of a partition, as a mechanism that others are made of."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from diffattn.grid import TokenGrid
from diffattn.kernels.call import WindowCall, window_call
from diffattn.kernels.choose import GENERAL_BACKENDS
from diffattn.kernels.choose import run as run_window
from diffattn.kernels.dense import combine_masks
from diffattn.kernels.grouped import Partition, attend_complement, attend_groups, block_of_cells
from diffattn.kernels.order import TileOrder
from diffattn.kernels.pattern import Shape, dense_mask

from ..base import Context, Mechanism, Seen, default_scale, mask_as
from ..softmax import softmax_reference
from .axes import PerAxis, per_axis, sizes
from .exact_tiles import key_bias, only_densely


@dataclass(frozen=True, kw_only=True)
class Partitioned(Mechanism):
    """Softmax attention to the cells of the own group and to all other tokens; with `pool` to the means of the rest."""

    type: ClassVar[str] = "partition"

    name: str = "partition"
    """Of the mechanism that this is a part of, for errors."""
    window: Annotated[PerAxis, sizes(1)] = 8
    """Cells of a group along each axis."""
    shifted: bool = False
    """Do windows begin half a window before the grid?"""
    dilated: bool = False
    """Do the cells of a group lie spread over the whole axis?"""
    pool: Annotated[PerAxis | None, sizes(1)] = None
    """Sides of the blocks whose unseen cells count by their means; None: they are not seen."""

    @property
    def approximates(self) -> bool:
        return self.pool is not None

    @property
    def backends(self) -> tuple[str, ...]:
        return ("auto", "groups", "dense") if self.pool is not None else ("auto", "groups", *GENERAL_BACKENDS)

    def partition(self, grid: TokenGrid) -> Partition:
        """The rule on a grid; no side is longer than the grid's."""
        sides = [min(own, size) for own, size in zip(per_axis(self.window, 1), grid.shape, strict=True)]
        if self.dilated:
            apart = [-(-size // own) for own, size in zip(sides, grid.shape, strict=True)]
            return Partition((apart[0], apart[1], apart[2]), dilated=True)
        shift = [own // 2 if self.shifted and own < size else 0 for own, size in zip(sides, grid.shape, strict=True)]
        return Partition((sides[0], sides[1], sides[2]), (shift[0], shift[1], shift[2]))

    def pattern(self, grid: TokenGrid) -> Partition:
        return self.partition(grid)

    def block(self, grid: TokenGrid) -> Shape | None:
        """Sides of a block on a grid; None where nothing is left for means."""
        if self.pool is None or self.partition(grid).is_whole(grid):
            return None
        frames, rows, columns = (min(own, size) for own, size in zip(per_axis(self.pool, 1), grid.shape, strict=True))
        return frames, rows, columns

    def check(self, grid: TokenGrid, *, context: Context = Context()) -> None:
        for option in ("window", "pool"):
            value = getattr(self, option)
            if grid.frames > 1 and isinstance(value, tuple) and len(value) == 2:
                raise ValueError(
                    f"{self.name}: {option}={value} says nothing of frames, and the grid {grid} has {grid.frames}; "
                    f"give (frames, rows, columns), such as {option}={(1, *value)}"
                )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        backend: str = "auto",
        context: Context = Context(),
    ) -> Tensor:
        self.check_backend(backend)
        scale = default_scale(q) if scale is None else scale
        partition, block = self.partition(grid), self.block(grid)
        if partition.is_whole(grid):
            grid.check(q, k)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_as(context.mask, q), scale=scale)
        call = window_call(q, k, v, grid, partition, scale, context.mask, None)
        if self._kernel(call, backend)[0] != "groups":
            if block is None:
                return run_window(call, "dense" if backend in ("auto", "groups") else backend)
            number = torch.promote_types(q.dtype, torch.float32)
            asking, keys, values = (x.to(number) for x in (q, k, v))
            return self.reference(asking, keys, values, grid, scale=scale, context=context).to(q.dtype)
        return attend_groups(call, partition) if block is None else attend_complement(call, partition, block)

    def _kernel(self, call: WindowCall, backend: str) -> tuple[str, str]:
        """The kernel that runs, and why "auto" chose it."""
        if backend in ("auto", "groups"):
            reason = only_densely(call.mask)
            return ("groups", "every group is a block without a mask") if reason is None else ("dense", reason)
        return backend, ""

    def explain_backend(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, backend: str, context: Context) -> str:
        if self.partition(grid).is_whole(grid):
            return "sdpa: one group covers the grid"
        call = window_call(q, k, v, grid, self.partition(grid), 1.0, context.mask, None)
        return ": ".join(part for part in self._kernel(call, backend) if part)

    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        context: Context = Context(),
    ) -> Tensor:
        block, scale = self.block(grid), default_scale(q) if scale is None else scale
        seen = dense_mask(self.partition(grid), grid).to(q.device)
        if block is None:
            return softmax_reference(q, k, v, scale=scale, mask=combine_masks(seen, context.mask))
        return reference_complement(q, k, v, grid, seen, block, scale=scale, mask=context.mask)

    def mask(self, grid: TokenGrid) -> Tensor:
        """Dense boolean `(tokens, tokens + blocks)`: keys, then the means of what is left of the blocks."""
        self.check(grid)
        seen, block = dense_mask(self.partition(grid), grid), self.block(grid)
        if block is None:
            return seen
        means = torch.zeros(grid.tokens, TileOrder(grid.shape, block).tiles, dtype=torch.bool)
        hidden = (~seen[grid.cell_slice, grid.cell_slice]).float()
        means[grid.cell_slice] = hidden @ self._members(grid, block).mT > 0
        return torch.cat([seen, means], dim=1)

    @staticmethod
    def _members(grid: TokenGrid, block: Shape) -> Tensor:
        """Which cells lie in each block, 0 or 1, `(blocks, cells)`."""
        return F.one_hot(block_of_cells(grid.shape, block, torch.device("cpu"))).mT.float()

    def seen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        context: Context = Context(),
    ) -> Seen:
        block = self.block(grid)
        if block is None:
            return super().seen(q, k, v, grid, scale=scale, context=context)
        mask = self.mask(grid)[None, None]
        members = self._members(grid, block)[None, None] > 0
        return Seen(mask[..., : grid.tokens], mask[..., grid.tokens :], members)

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, *, context: Context = Context()) -> int:
        self.check(grid)
        block = self.block(grid)
        pairs = self.partition(grid).pairs(grid) + grid.other_pairs
        if block is not None:
            pairs += grid.cells * math.prod(TileOrder(grid.shape, block).counts)
        return 4 * pairs * heads * head_dim


def reference_complement(
    q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, seen: Tensor, block: Shape, *, scale: float, mask: Tensor | None
) -> Tensor:
    """One softmax over the keys that a query sees, and the means of what it does not see of every block.

    Means are weighed by the query's own mask. Memory O(n blocks d).

    Args:
        seen: bool `(tokens, tokens)`.
    """
    bias = key_bias(mask, q, grid.tokens)
    member = F.one_hot(block_of_cells(grid.shape, block, q.device)).mT.to(q)  # blocks cells
    left = (bias.exp() * ~seen)[..., grid.cell_slice].unsqueeze(-2) * member  # b h n blocks cells
    count = left.sum(-1)
    safe = torch.where(count > 0, count, 1)[..., None]
    mean_k, mean_v = ((left @ grid.split(x)[0].unsqueeze(2)) / safe for x in (k, v))  # b h n blocks d
    exact = (scale * (q @ k.mT) + bias).masked_fill(~seen, -torch.inf)
    coarse = scale * (mean_k @ q.unsqueeze(-1)).squeeze(-1) + count.log()
    logits = torch.cat([exact, coarse.expand(*exact.shape[:-1], -1)], dim=-1)
    peak = logits.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(q.dtype).min)
    weights = (logits - peak.detach()).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
    near, far = weights.split([grid.tokens, coarse.shape[-1]], dim=-1)
    return near @ v + (far.unsqueeze(-2) @ mean_v).squeeze(-2)
