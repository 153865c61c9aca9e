"""Draw: the pattern of a mechanism, and sheets of images side by side.

Sheets are made with Pillow. `plot_mask` needs matplotlib, the extra `demo`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .. import config
from ..grid import TokenGrid
from ..mechanisms.base import Mechanism
from .pixels import as_pixels

INK, PALE, PAPER = (25, 28, 33), (105, 110, 120), (255, 255, 255)
SEEN, UNSEEN, OTHER, QUERY = "#1f6fb4", "#eef1f5", "#e3a33a", "#d1342f"
"""Colours of a mask: keys that are seen, those that are not, other tokens (text), the query."""

ERROR_GAIN = 2.0
"""Error maps are darkest from half the range of a channel on."""

LARGEST_MASK = 4096
"""Most tokens whose whole matrix is drawn; more would be finer than the picture's pixels."""

FIGURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".svg", ".pdf", ".eps")
"""Of the files that matplotlib writes a figure to."""


def figure_class() -> Any:
    """matplotlib's `Figure`; used without pyplot, which keeps global state and wants a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "diffattn[demo]"') from error
    return Figure


def masks() -> list[str]:
    """Short names of the mechanisms that are masks over the tokens."""
    base: Any = Mechanism
    several: Any = config.registered()
    own = {name: (cls.mask, cls.head_masks) for name, cls in several.items()}
    return [name for name, methods in own.items() if methods != (base.mask, base.head_masks)]


def plot_mask(mechanism: Mechanism, grid: TokenGrid, query: tuple[int, int, int]) -> Any:
    """A figure: the matrix of who sees whom, and what the cell `query` (frame, row, column) sees, a panel per frame.

    Where heads are of several kinds, each kind has its row.
    """
    mechanism.check(grid)
    if grid.tokens > LARGEST_MASK:
        raise ValueError(
            f"a mask of {grid.tokens} tokens is too fine to draw; use a grid of at most {LARGEST_MASK} tokens"
        )
    kinds = mechanism.head_masks(grid)
    columns = min(grid.frames, 4)
    rows = -(-grid.frames // columns)
    panel = 5.6 if grid.frames == 1 else 3.4
    height = max(5.6, panel * rows)
    size = (5.6 + panel * columns, height * len(kinds))
    figure = figure_class()(figsize=size, layout="constrained", dpi=110)
    lines = figure.subfigures(len(kinds), 2, width_ratios=[5.6, panel * columns], squeeze=False)
    for (words, mask), (left, right) in zip(kinds, lines, strict=True):
        seen = mask.numpy()
        _plot_matrix(left.subplots(), seen, grid, words)
        _plot_windows(right, seen, grid, query, rows, columns)
    shares = ", ".join(f"{mask[:, : grid.tokens].float().mean():.1%}" for _, mask in kinds)
    figure.suptitle(f"{mechanism} on {grid}: {shares} of the pairs of tokens", fontsize=14, fontweight="bold")
    return figure


def _plot_matrix(axes: Any, mask: np.ndarray, grid: TokenGrid, words: str) -> None:
    from matplotlib.colors import ListedColormap

    axes.imshow(mask, cmap=ListedColormap([UNSEEN, SEEN]), vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    edges = [edge for edge in (grid.before, grid.before + grid.cells) if 0 < edge < grid.tokens]
    edges += [grid.tokens] if mask.shape[1] > grid.tokens else []
    for edge in edges:
        axes.axvline(edge - 0.5, color=OTHER, linewidth=1.5)
        if edge < grid.tokens:
            axes.axhline(edge - 0.5, color=OTHER, linewidth=1.5)
    pooled = mask.shape[1] - grid.tokens
    axes.set_xlabel(f"keys ({grid.tokens}" + (f" and {pooled} pooled)" if pooled else ")"), fontsize=12)
    axes.set_ylabel(f"queries ({grid.tokens})", fontsize=12)
    axes.set_title(f"who sees whom, {words}" if words else "who sees whom", fontsize=12)


def _plot_windows(
    figure: Any, mask: np.ndarray, grid: TokenGrid, query: tuple[int, int, int], rows: int, columns: int
) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    frame, row, column = query
    index = grid.before + (frame * grid.height + row) * grid.width + column
    seen = mask[index]
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    cells = seen[grid.cell_slice].reshape(grid.shape)
    for number, axes in enumerate(panels):
        if number >= grid.frames:
            axes.set_axis_off()
            continue
        axes.imshow(cells[number], cmap=ListedColormap([UNSEEN, SEEN]), vmin=0, vmax=1, interpolation="nearest")
        if max(grid.height, grid.width) <= 64:
            axes.set_xticks(np.arange(-0.5, grid.width), minor=True)
            axes.set_yticks(np.arange(-0.5, grid.height), minor=True)
            axes.grid(which="minor", color="white", linewidth=0.6)
            axes.tick_params(which="minor", length=0)
        if number == frame:
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=QUERY, edgecolor="none"))
        axes.set_title(f"frame {number}" if grid.frames > 1 else f"row {row}, column {column} sees", fontsize=12)
    text = f"{int(cells.sum())} of {grid.cells} cells"
    if grid.others:
        text += f", {int(seen[: grid.tokens].sum() - cells.sum())} of {grid.others} other tokens"
    if len(seen) > grid.tokens:
        text += f", {int(seen[grid.tokens :].sum())} of {len(seen) - grid.tokens} pooled keys"
    figure.supxlabel(text, fontsize=12)


@dataclass(frozen=True)
class Entry:
    """One image of a sheet, with lines of text below it; with `error`, its distance to another image as a map."""

    picture: Image.Image
    lines: tuple[str, ...] = ()
    error: np.ndarray | None = None


def sheet(
    rows: Sequence[Sequence[Entry]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    title: str = "",
    note: str = "",
    side: int = 256,
) -> Image.Image:
    """Images in rows and columns with labels; a picture's longer side is drawn `side` pixels long."""
    unit = side // 16
    fonts = {"title": _font(unit * 1.6), "label": _font(unit * 1.15), "text": _font(unit)}
    map_side = side // 3
    width, height = _fit(rows[0][0].picture, side)
    label_width, gap = int(side * 0.8), unit
    top = int(unit * (3.2 if title else 1)) + int(unit * 1.6) * (1 + max(label.count("\n") for label in column_labels))
    below = max(map_side, int(unit * 1.35) * max(len(entry.lines) for row in rows for entry in row)) + gap
    step = height + below + gap
    size = (
        label_width + len(column_labels) * (width + gap) + gap,
        top + len(rows) * step + (int(unit * 2.2) if note else 0),
    )
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, gap), title, fill=INK, font=fonts["title"])
    for number, label in enumerate(column_labels):
        head, *rest = label.split("\n")
        at = (label_width + number * (width + gap), top - int(unit * 1.6) * (1 + len(rest)))
        draw.text(at, head, fill=INK, font=fonts["label"])
        draw.multiline_text((at[0], at[1] + int(unit * 1.5)), "\n".join(rest), fill=PALE, font=fonts["text"])
    for number, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + number * step
        draw.multiline_text(
            (gap, y),
            _wrap(draw, label, fonts["label"], label_width - 2 * gap),
            fill=INK,
            font=fonts["label"],
            spacing=unit // 3,
        )
        for place, entry in enumerate(row):
            x = label_width + place * (width + gap)
            _draw_entry(canvas, draw, entry, (x, y), (width, height), map_side, fonts["text"])
    draw.text((gap, size[1] - int(unit * 1.9)), note, fill=PALE, font=fonts["text"])
    return canvas


def _draw_entry(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    entry: Entry,
    at: tuple[int, int],
    size: tuple[int, int],
    map_side: int,
    font: ImageFont.FreeTypeFont,
) -> None:
    x, y = at
    canvas.paste(entry.picture.convert("RGB").resize(size, Image.Resampling.LANCZOS), at)
    below = y + size[1] + map_side // 14
    if entry.error is not None:
        heat = heat_map(entry.error * ERROR_GAIN)
        heat = heat.resize(_fit(heat, map_side - map_side // 14), Image.Resampling.NEAREST)
        canvas.paste(heat, (x, below))
        draw.rectangle((x - 1, below - 1, x + heat.width, below + heat.height), outline=PALE)
        x += map_side
    draw.multiline_text((x, below), "\n".join(entry.lines), fill=INK, font=font, spacing=int(font.size // 3))


def error_map(a: Any, b: Any) -> np.ndarray:
    """Largest absolute difference of the channels of two images, `(height, width)` in 0-1."""
    return np.asarray(np.abs(as_pixels(a) - as_pixels(b)).max(axis=-1))


def heat_map(values: np.ndarray) -> Image.Image:
    """Values in 0-1 from white over red to black."""
    values = np.clip(values, 0, 1)
    stops = np.array([PAPER, (250, 160, 90), (190, 30, 45), (40, 5, 20)], dtype=float)
    channels = [np.interp(values, np.linspace(0, 1, len(stops)), stops[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def _fit(picture: Image.Image, side: int) -> tuple[int, int]:
    """The picture's size, scaled so that its longer side is `side`."""
    scale = side / max(picture.size)
    return max(1, round(picture.width * scale)), max(1, round(picture.height * scale))


def _font(size: float) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ImportError(
            "Pillow was built without FreeType, so it cannot write text of a readable size: install its wheel"
        )
    return font


def _wrap(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Break lines at spaces so that none is wider than `width` pixels, where words allow it."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font=font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
