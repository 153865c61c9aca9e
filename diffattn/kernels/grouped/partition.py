"""A partition of a grid: cells see each other where they lie in one class along every axis.

window    class(i) = floor((i + shift) / side)      side neighbours
dilated   class(i) = i mod side                      cells that are `side` apart
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...grid import TokenGrid
from ..pattern import Cells, Shape, cached, divide


@dataclass(frozen=True)
class Partition:
    """The rule on cells. Serves every kernel of windows, and says its groups to those of this folder."""

    sides: Shape
    """Along frames, rows, columns: cells of a window, or the distance of cells in a dilated class."""
    shift: Shape = (0, 0, 0)
    """How many cells the first window lacks."""
    dilated: bool = False

    @property
    def tile(self) -> Shape | None:
        """Of a rule on tiles that begin at the first cell."""
        return None if self.dilated or any(self.shift) else self.sides

    def _class(self, index: Tensor, axis: int) -> Tensor:
        side = self.sides[axis]
        if self.dilated:
            return index - divide(index, side) * side
        return divide(index + self.shift[axis], side)

    def allowed(self, query: Cells, key: Cells) -> Tensor:
        frames, rows, columns = (self._class(query[axis], axis) == self._class(key[axis], axis) for axis in range(3))
        return frames & rows & columns

    def span(self, axis: int, low: int, high: int, size: int) -> tuple[int, int]:
        side, shift = self.sides[axis], self.shift[axis]
        if self.dilated:
            return 0, size
        first, last = (low + shift) // side * side - shift, (high - 1 + shift) // side * side + side - shift
        return max(first, 0), min(last, size)

    def pairs(self, grid: TokenGrid) -> int:
        return math.prod(sum(len(own) ** 2 for own in self.classes(axis, size)) for axis, size in enumerate(grid.shape))

    def classes(self, axis: int, size: int) -> list[range]:
        """The cells of each class along an axis."""
        side, shift = self.sides[axis], self.shift[axis]
        if self.dilated:
            return [range(first, size, side) for first in range(min(side, size))]
        starts = range(-(shift % side), size, side)
        return [range(max(start, 0), min(start + side, size)) for start in starts]

    def is_whole(self, grid: TokenGrid) -> bool:
        """Are all cells in one group?"""
        return all(len(self.classes(axis, size)) == 1 for axis, size in enumerate(grid.shape))


@cached(64)
def slots(partition: Partition, shape: Shape, device: torch.device) -> Tensor:
    """Number of the cell in each slot of each group, `(groups, most cells of a group)`; -1 for padding, at the end."""
    _, rows, columns = shape
    groups = []
    for frames, ys, xs in itertools.product(*(partition.classes(axis, size) for axis, size in enumerate(shape))):
        f, y, x = torch.meshgrid(*(torch.tensor(own) for own in (frames, ys, xs)), indexing="ij")
        groups.append(((f * rows + y) * columns + x).flatten())
    return torch.nn.utils.rnn.pad_sequence(groups, batch_first=True, padding_value=-1).to(device)
