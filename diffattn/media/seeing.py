"""Draw what one query of a layer sees, over the picture that the pipeline made."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..grid import TokenGrid
from .drawing import PALE, QUERY, UNSEEN, figure_class
from .pixels import as_pixels

MASS_FLOOR = 1e-6
"""Of the attention mass that is drawn, in decades."""


@dataclass(frozen=True)
class Mass:
    """Where full attention has its weight, by what a query sees of it: shares that add up to 1."""

    keys: float
    """On cells that it sees each by itself."""
    means: float
    """On other cells, which it sees by the mean of their block."""
    unseen: float
    others: float
    """On other tokens, such as text."""

    @classmethod
    def of(cls, grid: TokenGrid, keys: np.ndarray, blocks: np.ndarray, mass: np.ndarray) -> "Mass":
        """Arguments as in `plot_seen`."""
        cells = mass[grid.cell_slice]
        by_mean = blocks.any(0) & ~keys if len(blocks) else np.zeros_like(keys)
        rest = ~keys & ~by_mean
        own, means, unseen = (float(cells[part].sum()) for part in (keys, by_mean, rest))
        return cls(own, means, unseen, float(mass.sum() - cells.sum()))


def plot_seen(
    picture: Image.Image,
    grid: TokenGrid,
    cell: tuple[int, int],
    keys: np.ndarray,
    blocks: np.ndarray,
    mass: np.ndarray,
    title: str,
) -> Any:
    """A figure of three panels: the picture, what the query sees of it, and where full attention would look.

    Args:
        cell: (row, column) of the query.
        keys: the cells that it sees each by itself, bool `(cells,)`.
        blocks: the blocks that it sees by their mean, bool `(blocks seen, cells)`.
        mass: softmax over all keys, `(tokens,)`.
    """
    pixels = as_pixels(picture)
    cells = mass[grid.cell_slice]
    by_mean = blocks.any(0) if len(blocks) else np.zeros_like(keys)
    figure = figure_class()(figsize=(15, 5.9), layout="constrained", dpi=110)
    left, middle, right = figure.subplots(1, 3)
    side = (-0.5, grid.width - 0.5, grid.height - 0.5, -0.5)
    left.imshow(pixels, extent=side, interpolation="nearest")
    left.set_title("the picture, and the query", fontsize=12)
    middle.imshow(seen_pixels(pixels, grid, keys, blocks), extent=side, interpolation="nearest")
    _outline(middle, keys.reshape(grid.height, grid.width))
    middle.set_title(
        f"sees {keys.sum()} cells, outlined, and {len(blocks)} means of {by_mean.sum()} cells", fontsize=12
    )
    heat = right.imshow(
        np.log10(np.maximum(cells, MASS_FLOOR)).reshape(grid.height, grid.width),
        extent=side, cmap="magma", interpolation="nearest",
    )  # fmt: skip
    _outline(right, keys.reshape(grid.height, grid.width))
    figure.colorbar(heat, ax=right, label="log10 of full attention's weight", shrink=0.85)
    right.set_title("where full attention looks", fontsize=12)
    for axes in (left, middle, right):
        _mark(axes, cell)
    own = Mass.of(grid, keys, blocks, mass)
    text = f"full attention has {own.keys:.1%} of its weight on the outlined cells"
    if len(blocks):
        text += f", {own.means:.1%} on cells seen by their mean"
    if (~keys & ~by_mean).any():
        text += f", {own.unseen:.1%} on cells that are not seen"
    figure.supxlabel(text + (f", {own.others:.1%} on {grid.others} other tokens" if grid.others else ""), fontsize=12)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    return figure


def seen_pixels(pixels: np.ndarray, grid: TokenGrid, keys: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """The picture as a query sees it: cells as they are, blocks in their mean colour, all else blank."""
    height, width, _ = pixels.shape
    rows = np.arange(height) * grid.height // height
    columns = np.arange(width) * grid.width // width
    cell = rows[:, None] * grid.width + columns
    blank = np.array([int(UNSEEN[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    seen = np.broadcast_to(blank, pixels.shape).copy()
    for block in blocks:
        inside = block[cell]
        seen[inside] = pixels[inside].mean(0)
    own = keys[cell]
    seen[own] = pixels[own]
    return seen


def _mark(axes: Any, cell: tuple[int, int]) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((cell[1] - 0.5, cell[0] - 0.5), 1, 1, fill=False, edgecolor=QUERY, linewidth=2.5))
    axes.set_xticks([])
    axes.set_yticks([])


def _outline(axes: Any, keys: np.ndarray) -> None:
    """The edges between cells that are seen and cells that are not."""
    colour = tuple(channel / 255 for channel in PALE)
    padded = np.pad(keys, 1)
    for row, column in zip(*np.nonzero(padded[:-1] != padded[1:]), strict=True):
        axes.plot([column - 1.5, column - 0.5], [row - 0.5, row - 0.5], color=colour, linewidth=1.2)
    for row, column in zip(*np.nonzero(padded[:, :-1] != padded[:, 1:]), strict=True):
        axes.plot([column - 0.5, column - 0.5], [row - 1.5, row - 0.5], color=colour, linewidth=1.2)
