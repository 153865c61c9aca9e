"""Options that are one number for all axes of a grid, or one for each."""

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
