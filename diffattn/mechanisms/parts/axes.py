"""Options that are one number for all axes of a grid, or one for each; tiles and blocks of a grid."""

import math

from diffattn.kernels.pattern import Shape
from diffattn.options import Must

PerAxis = int | tuple[int, int] | tuple[int, int, int]
"""One for all axes, (rows, columns), or (frames, rows, columns)."""


def sizes(least: int) -> Must:
    """What a `PerAxis` must be."""
    return Must(
        f"an int of at least {least}, (rows, columns) or (frames, rows, columns) of such",
        lambda value: all(size >= least for size in (value if isinstance(value, tuple) else (value,))),
    )


def per_axis(value: PerAxis, missing: int) -> Shape:
    """(frames, rows, columns); `missing` stands for the frames of an image."""
    if isinstance(value, int):
        return value, value, value
    return value if len(value) == 3 else (missing, *value)


def check_divides(name: str, tile: PerAxis, pool: PerAxis) -> None:
    """Raise `ValueError` where a tile is not made of whole blocks. One of (rows, columns) says nothing of frames."""
    first = 1 if isinstance(tile, tuple) and len(tile) == 2 else 0
    if any(side % part for side, part in zip(per_axis(tile, 1)[first:], per_axis(pool, 1)[first:], strict=True)):
        raise ValueError(f"{name}: pool must divide the tile along each axis, got pool={pool}, tile={tile}")


def halved(tile: Shape, shape: Shape, most: int) -> Shape:
    """The tile, halved along each axis while `most` blocks of that side or fewer make the grid and are no cells."""
    block = tile
    while all(side == 1 or side % 2 == 0 for side in block):
        finer: Shape = tuple(max(side // 2, 1) for side in block)  # type: ignore[assignment]
        if max(finer) == 1 or math.prod(-(-whole // side) for whole, side in zip(shape, finer, strict=True)) > most:
            break
        block = finer
    return block


def most_own(shape: Shape, asking: Shape, tile: Shape) -> int:
    """The most tiles that a tile of queries lies on."""
    most = 1
    for whole, wide, side in zip(shape, asking, tile, strict=True):
        most *= max(-(-min(low + wide, whole) // side) - low // side for low in range(0, whole, wide))
    return most
