"""Write a comparison down: Markdown, JSON, a plot of speed against fidelity, a sheet of images."""

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files.writing import write_json, write_text, written
from ..measure.hardware import hardware_line
from ..measure.strips import to_image
from ..media.drawing import Entry, error_map, figure_class, sheet
from .opening import RESULT
from .results import BEST, Comparison, Line

HEAD = (
    "setting",
    "seconds",
    "min-max",
    "speed-up",
    "attention",
    "PSNR",
    "min-max",
    "SSIM",
    "flicker",
    "LPIPS",
    "MB",
    "",
)
FRONTIER = "frontier"
POINT, BEST_POINT = "#8a8f98", "#1f6fb4"


def cells(line: Line, is_full: bool) -> list[str]:
    """A line's entries as text, by `HEAD`."""
    return [
        f"`{line.setting}`",
        f"{statistics.median(line.seconds):.2f}",
        f"{min(line.seconds):.2f}-{max(line.seconds):.2f}",
        f"{line.speedup:.2f}x",
        f"{line.computed:.1%}",
        "" if is_full else f"{statistics.median(line.psnr):.1f}",
        "" if is_full else f"{min(line.psnr):.1f}-{max(line.psnr):.1f}",
        _number(line.ssim, 3),
        _number(line.flicker, 4),
        _number(line.lpips, 3),
        "" if line.peak_bytes is None else f"{line.peak_bytes / 1e6:.0f}",
        FRONTIER if line.frontier else "",
    ]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def table(comparison: Comparison) -> list[str]:
    """Markdown; columns that nothing fills are left out."""
    rows = [cells(line, number == 0) for number, line in enumerate(comparison.lines)]
    kept = [column for column in range(len(HEAD)) if any(row[column] for row in rows)]
    lines = ["| " + " | ".join(HEAD[column] for column in kept) + " |"]
    lines.append("|" + "|".join("---" if column in (0, len(HEAD) - 1) else "---:" for column in kept) + "|")
    return lines + ["| " + " | ".join(row[column] for column in kept) + " |" for row in rows]


def markdown(comparison: Comparison, title: str = "Comparison") -> str:
    """The table with what it is of."""
    count = len(comparison.of(comparison.settings[0]))
    text = [
        f"# {title}",
        "",
        f"{hardware_line(comparison.machine)}; {count} prompts, every setting on each in turn, the same seeds.",
        "Seconds are of the whole call of the pipeline, PSNR in dB and SSIM to the model's own attention: medians. No",
        "setting is both faster and nearer than one on the frontier.",
        "",
        *table(comparison),
    ]
    return "\n".join(text) + "\n"


def plot(comparison: Comparison) -> Any:
    """A figure: speed-up against PSNR, a point for each setting, the frontier as a line."""
    figure = figure_class()(figsize=(9, 6), layout="constrained", dpi=110)
    axes = figure.subplots()
    lines = comparison.lines[1:]
    points = [(line.speedup, min(statistics.median(line.psnr), BEST), line) for line in lines]
    best = sorted((point for point in points if point[2].frontier), key=lambda point: point[0])
    axes.plot([x for x, _, _ in best], [y for _, y, _ in best], color=BEST_POINT, linewidth=1, zorder=1)
    for x, y, line in points:
        axes.scatter([x], [y], color=BEST_POINT if line.frontier else POINT, zorder=2)
        axes.annotate(line.setting, (x, y), (5, 4), textcoords="offset points", fontsize=8)
    axes.axvline(1.0, color="#333", linestyle="--", linewidth=1)
    axes.set_xlabel("times faster than full attention, whole call")
    axes.set_ylabel("PSNR to full attention's image, dB, median")
    axes.set_title(hardware_line(comparison.machine), fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_sheet(comparison: Comparison) -> Image.Image:
    """A row for each setting: its nearest, its median and its furthest image, each beside full attention's."""
    full, *others = comparison.settings
    rows = []
    for name in others:
        ordered = sorted(comparison.of(name), key=lambda row: -row.psnr)
        chosen = [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
        row = []
        for own in chosen:
            image, reference = (_shown(comparison.pixels(own.prompt, which)) for which in (name, full))
            text = f"{own.psnr:.1f} dB, {own.seconds:.1f} s" if math.isfinite(own.psnr) else f"{own.seconds:.1f} s"
            row += [Entry(reference, (f"prompt {own.prompt}",)), Entry(image, (text,), error_map(image, reference))]
        rows.append(row)
    labels = [what for name in ("nearest", "median", "furthest") for what in (f"full attention\n{name}", "setting")]
    return sheet(rows, others, labels, note="Small maps: largest difference of a channel to full attention.")


def _shown(pixels: np.ndarray) -> Image.Image:
    """The image, or the middle frame of a video."""
    return to_image(pixels if pixels.ndim == 3 else pixels[len(pixels) // 2])


def save(comparison: Comparison, folder: Path, title: str = "Comparison") -> list[Path]:
    """Write compare.md, compare.json, frontier.png and sheet.png."""
    paths = [
        write_text(folder / "compare.md", markdown(comparison, title)),
        write_json(folder / RESULT, comparison.to_dict()),
    ]
    with written(folder / "frontier.png") as path:
        plot(comparison).savefig(path)
    with written(folder / "sheet.png") as path:
        draw_sheet(comparison).save(path)
    return [*paths, folder / "frontier.png", folder / "sheet.png"]
