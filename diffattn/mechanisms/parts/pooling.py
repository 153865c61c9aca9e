"""Adaptive average pooling over the one to three axes of a grid, for any number of averages along each.

Along an axis of n cells, average i of a covers the cells from floor(i n / a) up to, exclusive, ceil((i + 1) n / a).
"""

import math

from torch import Tensor
from torch.nn import functional as F

from diffattn.grid import TokenGrid


def averages_per_axis(shape: tuple[int, int, int], most: int) -> tuple[int, int, int]:
    """Spread at most `most` averages over frames, rows and columns: the axis with most cells for each gains next.

    >>> averages_per_axis((1, 64, 64), 256), averages_per_axis((1, 32, 48), 100)
    ((1, 16, 16), (1, 8, 12))
    """
    counts = (1, 1, 1)
    while True:
        for axis in sorted(range(3), key=lambda axis: -shape[axis] / counts[axis]):
            grown = (counts[0] + (axis == 0), counts[1] + (axis == 1), counts[2] + (axis == 2))
            if grown[axis] <= shape[axis] and math.prod(grown) <= most:
                counts = grown
                break
        else:
            return counts


def pool(cells: Tensor, grid: TokenGrid, layout: tuple[int, int, int]) -> Tensor:
    """Average `(b, h, cells, d)` to `(b, h, averages, d)`; `layout` counts them along frames, rows and columns."""
    volume = cells.transpose(-1, -2).reshape(-1, cells.shape[-1], *grid.shape)  # bh d f y x
    averages = F.adaptive_avg_pool3d(volume, layout).flatten(2)
    # the attention kernels are several times slower where d is not the innermost axis
    return averages.transpose(-1, -2).contiguous().unflatten(0, cells.shape[:2])


def pool_groups(grid: TokenGrid, layout: tuple[int, int, int]) -> list[list[int]]:
    """Which cells `pool` averages each time, by loops."""
    frames, rows, columns = (
        [range(i * n // a, -(-(i + 1) * n // a)) for i in range(a)] for n, a in zip(grid.shape, layout, strict=True)
    )
    return [
        [(f * grid.height + y) * grid.width + x for f in frame for y in row for x in column]
        for frame in frames
        for row in rows
        for column in columns
    ]
