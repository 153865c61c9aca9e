"""What is true of one attention call beside its tensors."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffattn.grid import TokenGrid
from diffattn.kernels.order import TileOrder

COLUMNS = 13
"""Numbers of a situation as a tensor, for each sample."""


@dataclass(frozen=True)
class Situation:
    """Grid and step of one call. `dense`: the model's own attention computes it, and nobody read a grid."""

    grids: tuple[TokenGrid, ...] = ()
    """One for the whole batch, or one per sample."""
    also: tuple[TokenGrid, ...] = ()
    """Further grids of the sequence, the same for the whole batch."""
    dense: bool = False
    part: int = 0
    """Of the layer's schedule."""
    downsample: int = 1
    progress: float | None = None
    timestep: float | None = None
    sigma: float | None = None
    order: TileOrder | None = None
    """That of the cells, in a call without gradients; None: row-major."""

    def to_tensor(self, samples: int) -> Tensor:
        """`(samples, 13)` float64 on the CPU: what a compiled graph saves for its backward pass."""
        grids = self.grids * samples if len(self.grids) == 1 else self.grids or (None,) * samples
        told = [math.nan if value is None else value for value in (self.progress, self.timestep, self.sigma)]
        rows = [
            [
                *((0,) * 7 if g is None else (*g.shape, g.before, g.after, *g.silent)),
                self.dense + 2 * bool(self.also),
                self.part,
                self.downsample,
                *told,
            ]
            for g in grids
        ]
        return torch.tensor(rows, dtype=torch.float64, device="cpu")

    @classmethod
    def from_tensor(cls, table: Tensor) -> "Situation":
        """Undo `to_tensor`."""
        rows = table.tolist()
        if rows[0][7] > 1:
            raise NotImplementedError(
                "a compiled model has no backward pass where a sequence holds several grids; train it without "
                "torch.compile"
            )
        places = [tuple(map(int, row[:7])) for row in rows]
        if len(set(places)) == 1:
            places = places[:1]
        grids = tuple(TokenGrid(h, w, f, a, b, (first, last)) for f, h, w, a, b, first, last in places if f)
        dense, part, downsample, *told = rows[0][7:]
        progress, timestep, sigma = (None if math.isnan(value) else value for value in told)
        return cls(grids, (), bool(dense), int(part), int(downsample), progress, timestep, sigma)


def downsample(pixels: int, grid: TokenGrid) -> int:
    """How many times coarser `grid` is than a latent image of `pixels` cells, along a side, rounded up."""
    return max(1, math.ceil((pixels // (grid.height * grid.width)) ** 0.5))
