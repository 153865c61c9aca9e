"""The order the model has, as CLEAR's released code keeps it: the yardstick of `diffattn bench`."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from diffattn.grid import TokenGrid
from diffattn.kernels.block_lists import Touched, lists, transposed
from diffattn.kernels.block_mask import Blocks, MaskMod
from diffattn.kernels.order import TileOrder
from diffattn.kernels.pattern import Cells, Pattern, cached


@dataclass(frozen=True)
class RowMajorRule:
    """The pattern on positions in the order the model has."""

    pattern: Pattern
    grid: TokenGrid
    released: bool
    """Find the rows by integer division, as the released code does, or as our rules do?"""

    def mask_mod(self, coordinates: tuple[Tensor, ...] = ()) -> MaskMod:
        start, stop = self.grid.before, self.grid.before + self.grid.cells

        def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            allowed = self.pattern.allowed(self._cells(query - start), self._cells(key - start))
            if self.grid.others:
                allowed = allowed | (query < start) | (query >= stop) | (key < start) | (key >= stop)
            return allowed

        return rule

    def _cells(self, index: Tensor) -> Cells:
        """Frames, which the released code does not know, take two more divisions."""
        rows, columns = self.grid.height, self.grid.width
        if not self.released:
            return TileOrder(self.grid.shape, (1, 1, 1)).coordinates(index)
        if self.grid.frames == 1:
            return Cells(torch.zeros_like(index), index // columns, index % columns)
        return Cells(index // (rows * columns), index // columns % rows, index % columns)


@cached(16)
def row_major_blocks(
    pattern: Pattern, grid: TokenGrid, device: torch.device | str = "cpu", *, released: bool = True, block: int = 128
) -> Blocks:
    """The blocks of 128 x 128 tokens that the released code computes. Time O(tokens^2)."""
    blocks = -(-grid.tokens // block)
    key = torch.arange(grid.tokens)
    seen, full = torch.zeros(blocks, blocks, dtype=torch.bool), torch.zeros(blocks, blocks, dtype=torch.bool)
    rule = RowMajorRule(pattern, grid, released)
    judge = rule.mask_mod()
    for number in range(blocks):
        query = torch.arange(number * block, min((number + 1) * block, grid.tokens))[:, None]
        allowed = judge(key, key, query, key)
        missing = blocks * block - grid.tokens
        seen[number] = F.pad(allowed, (0, missing)).unflatten(1, (-1, block)).any(2).any(0)
        full[number] = F.pad(allowed, (0, missing), value=True).unflatten(1, (-1, block)).all(2).all(0)
    touched = Touched(torch.arange(blocks, dtype=torch.int32).expand(blocks, -1), seen, full)
    backward = None if torch.device(device).type == "cpu" else transposed(touched, blocks).to(device)
    lengths = grid.tokens, grid.tokens
    return Blocks(rule, lists(touched, blocks).to(device), backward, (block, block), lengths)
