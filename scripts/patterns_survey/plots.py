"""Fidelity against share: every setting a dot with the spread over its prompts, its name beside the plot.

And what training brought: for every setting that was trained two dots on a line, before and after.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffattn.files.writing import written
from diffattn.media.drawing import figure_class

from .cells import CELLS
from .page import DISTILLED, measured, trained
from .settings import CHOSEN, FEW, KINDS, PATTERN, PATTERN_POOLED, POOLED, REUSED, WINDOW

COLOURS = {
    WINDOW: "#9aa0a6",
    POOLED: "#3c4043",
    PATTERN: "#8ab4f8",
    PATTERN_POOLED: "#1a56c4",
    CHOSEN: "#d93025",
    FEW: "#b07d12",
    REUSED: "#188038",
}
GAP = 1.0
"""Of two names, in lines of text."""


def draw(docs: Path, values: dict[str, Any]) -> None:
    """`patterns.png` with all cells, `patterns-NAME.png` with each by itself, `patterns-distilled.png` of training."""
    names = [name for name in CELLS if measured(values["cells"].get(name))]
    if not names:
        return
    for name in names:
        figure = figure_class()(figsize=(8, 7), layout="constrained", dpi=110)
        _panel(figure.subplots(), name, values["cells"][name])
        _legend(figure, columns=2)
        with written(docs / f"patterns-{name}.png") as path:
            figure.savefig(path)
    rows = -(-len(names) // 2)
    figure = figure_class()(figsize=(15, 6.6 * rows), layout="constrained", dpi=110)
    panels = figure.subplots(rows, min(len(names), 2), squeeze=False).flatten()
    for panel, name in zip(panels, names, strict=False):
        _panel(panel, name, values["cells"][name])
    for panel in panels[len(names) :]:
        panel.remove()
    _legend(figure, columns=4)
    with written(docs / "patterns.png") as path:
        figure.savefig(path)
    if rows_trained := trained(values["cells"].get(DISTILLED)):
        figure = figure_class()(figsize=(8, 1.6 + 0.27 * len(rows_trained)), layout="constrained", dpi=110)
        _pairs(figure.subplots(), rows_trained)
        _legend(figure, columns=2, kinds=[kind for kind in KINDS if kind in {row["kind"] for row in rows_trained}])
        with written(docs / "patterns-distilled.png") as path:
            figure.savefig(path)


def _pairs(axes: Any, rows: list[dict[str, Any]]) -> None:
    """A line for each setting, the nearest after training on top: a ring before, a dot after, the spread after."""
    for place, row in enumerate(reversed(rows)):
        colour, own = COLOURS[row["kind"]], row["distilled"]["psnr"]
        before, after = statistics.median(row["psnr"]), statistics.median(own)
        axes.plot([min(own), max(own)], [place, place], color=colour, linewidth=0.8, alpha=0.35)
        axes.plot([before, after], [place, place], color=colour, linewidth=2)
        axes.plot([before], [place], "o", color=colour, markersize=6, markerfacecolor="white")
        axes.plot([after], [place], "o", color=colour, markersize=6)
    axes.set_yticks(range(len(rows)), [row["setting"] for row in reversed(rows)], fontsize=8)
    axes.set_xlabel("PSNR to full attention's image, dB: ring before training, dot after")
    axes.grid(axis="x", color="#dadce0", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _legend(figure: Any, columns: int, kinds: Sequence[str] = KINDS) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="o", linestyle="", color=COLOURS[kind], label=kind) for kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _panel(axes: Any, name: str, cell: dict[str, Any]) -> None:
    """One cell: dots on the left, names in a column on the right, a thin line from each to its dot."""
    rows = measured(cell)
    shares = [row["share"] for row in rows]
    middles = [statistics.median(row["psnr"]) for row in rows]
    for row, share, middle in zip(rows, shares, middles, strict=True):
        colour = COLOURS[row["kind"]]
        axes.plot([share, share], [min(row["psnr"]), max(row["psnr"])], color=colour, linewidth=0.8, alpha=0.35)
        axes.plot([share], [middle], "o", color=colour, markersize=5)
    low, high = axes.get_ylim()
    right = 1.06 * max(shares)
    axes.set_xlim(0, 1.75 * right)
    axes.set_ylim(low, high)
    places = _apart(middles, low, high, len(rows))
    for row, share, middle, place in zip(rows, shares, middles, places, strict=True):
        colour = COLOURS[row["kind"]]
        axes.plot([share, right, 1.05 * right], [middle, place, place], color=colour, linewidth=0.5, alpha=0.6)
        axes.text(1.06 * right, place, row["setting"], color=colour, fontsize=8, va="center")
    axes.axvline(cell["budget"], color="#dadce0", linewidth=0.8, zorder=0)
    ticks = [tick for tick in axes.get_xticks() if 0 <= tick <= right]
    axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axes.set_xlabel("share of all pairs that is computed", loc="left")
    axes.set_ylabel("PSNR to full attention's image, dB")
    axes.set_title(CELLS[name].title, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _apart(wanted: list[float], low: float, high: float, count: int) -> list[float]:
    """Heights of the names, from the top down: as near to what is wanted as lines of text may stand."""
    step = GAP * (high - low) / max(count, 34)
    places: list[float] = []
    for value in wanted:  # falling
        places.append(min(value, places[-1] - step) if places else min(value, high))
    missing = low + step / 2 - places[-1]
    if missing > 0:  # the last would stand below the plot: those above make room
        places[-1] += missing
        for index in range(len(places) - 2, -1, -1):
            places[index] = max(places[index], places[index + 1] + step)
    return places
