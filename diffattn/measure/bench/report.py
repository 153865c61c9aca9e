"""Write a benchmark down: tables for the terminal, Markdown, JSON and a plot."""

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from diffattn.files.writing import write_json, write_text, written
from diffattn.media.drawing import figure_class

from ..hardware import hardware_line
from .accuracy import TOLERANCE
from .results import FULL, OFFICIAL, ROW_MAJOR, Case, Result, Row

BAR_COLOURS = {FULL: "#8a8f98", OFFICIAL: "#e3a33a", ROW_MAJOR: "#e3a33a"}
HEADS = ("kernel", "ms", "min-max", "x full", "x official", "x row-major", "GFLOP", "MiB", "error", "to official")
ON_SCREEN = ("kernel", "ms", "min-max", "x full", "x official", "x row-major", "error")
"""The columns that fit a narrow terminal."""


def cells_of(row: Row) -> dict[str, str]:
    """A row's entries as text, by `HEADS`."""
    refused = "-" if row.passed else "refused"
    ratios = (row.full_ratio, row.official_ratio, row.row_major_ratio)
    texts = (
        row.name,
        milliseconds(row.timing.median),
        f"{milliseconds(row.timing.min)}-{milliseconds(row.timing.max)}",
        *(refused if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
        f"{row.flops / 1e9:.3g}",
        "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
        f"{row.error:.1e}" + ("" if row.passed else " FAILED"),
        "-" if row.official_error is None else f"{row.official_error:.1e}",
    )
    return dict(zip(HEADS, texts, strict=True))


def milliseconds(seconds: float) -> str:
    """Milliseconds with three digits, or whole."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def caption(result: Result, case: Case) -> str:
    """What a case was run with, in one line."""
    settings = result.settings
    text = f"{case.title} on {case.grid} tokens, {settings.heads} heads x {settings.head_dim}, "
    text += str(settings.dtype).removeprefix("torch.")
    if case.bound is not None and case.density is not None:
        text += f"; bound {milliseconds(case.bound)} ms (full x {case.density:.1%} of the pairs)"
    return text


def tables(result: Result) -> list[Table]:
    """A table per case, one for the scaling."""
    found = []
    for case in result.cases:
        table = Table(
            title=caption(result, case), title_justify="left", caption_justify="left", box=SIMPLE_HEAD, pad_edge=False
        )
        table.caption = hardware_line(result.machine)
        for number, head in enumerate(ON_SCREEN):
            table.add_column(head, justify="left" if number == 0 else "right", no_wrap=number > 0)
        for row in case.rows:
            texts = cells_of(row)
            table.add_row(*(texts[head] for head in ON_SCREEN), style=None if row.passed else "red")
        found.append(table)
    if result.scaling:
        table = Table("mechanism", "grid", "ms", "us per token", "ratio", title="Time per token", box=SIMPLE_HEAD)
        for line in result.scaling:
            for grid, timing in ((line.small, line.seconds_small), (line.large, line.seconds_large)):
                ratio = f"{line.ratio:.2f}x" if grid is line.large else ""
                per_token = f"{timing.median / grid.tokens * 1e6:.3g}"
                table.add_row(line.mechanism, str(grid), milliseconds(timing.median), per_token, ratio)
        found.append(table)
    return found


def markdown(result: Result) -> str:
    """The tables as Markdown."""
    settings = result.settings
    lines = [
        "# Attention benchmark",
        "",
        f"{hardware_line(result.machine)}. Times in ms, medians of {settings.rounds} interleaved rounds, batch 1;",
        "speedups are ratios of medians: over full SDPA, over the official order as released, and over our kernel",
        "on the official order's blocks. Errors: largest absolute difference to softmax in float64 at some queries",
        f"(tolerance {TOLERANCE[settings.dtype]:.0e}), and to the official order's output.",
    ]
    for case in result.cases:
        lines += ["", f"## {caption(result, case)}", ""]
        lines += [f"| {' | '.join(HEADS)} |", "|---|" + "---:|" * (len(HEADS) - 1)]
        lines += [f"| {' | '.join(cells_of(row).values())} |" for row in case.rows]
    if result.scaling:
        lines += ["", "## Time per token", ""]
    for line in result.scaling:
        lines.append(f"- {line.mechanism}: {line.large} takes {line.ratio:.2f}x the time per token of {line.small}")
    lines += ["", *(f"Skipped: {text}" for text in result.skipped)]
    return "\n".join(lines).rstrip() + "\n"


def plot(result: Result) -> Any:
    """A figure: a panel per case, a bar per kernel from its median, whiskers from min to max, the bound as a line."""
    heights = [len(case.rows) + 1.2 for case in result.cases]
    figure = figure_class()(figsize=(11, 0.45 * sum(heights) + 0.8), layout="constrained", dpi=110)
    panels = figure.subplots(len(heights), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, case in zip(panels, result.cases, strict=True):
        _plot_case(axes, case)
    rows = [row for case in result.cases for row in case.rows]
    shortest = min([row.timing.median for row in rows] + [case.bound for case in result.cases if case.bound])
    panels[-1].set_xscale("log")
    panels[-1].set_xlim(shortest * 600, max(row.timing.max for row in rows) * 5000)
    panels[-1].xaxis.set_major_formatter("{x:g}")
    panels[-1].set_xlabel("milliseconds, and full SDPA's time over it")
    figure.suptitle(hardware_line(result.machine), fontsize=11)
    return figure


def _plot_case(axes: Any, case: Case) -> None:
    timings = [row.timing for row in case.rows]
    medians = [timing.median * 1e3 for timing in timings]
    below = [(timing.median - timing.min) * 1e3 for timing in timings]
    above = [(timing.max - timing.median) * 1e3 for timing in timings]
    colours = [BAR_COLOURS.get(row.name, "#1f6fb4") if row.passed else "#d1342f" for row in case.rows]
    places = range(len(case.rows))
    whiskers = {"ecolor": "#333", "capsize": 3}
    axes.barh(places, medians, xerr=[below, above], color=colours, height=0.68, error_kw=whiskers)
    for place, row in zip(places, case.rows, strict=True):
        text = "error too large" if not row.passed else "" if row.full_ratio is None else f"{row.full_ratio:.1f}x"
        label = f"{milliseconds(row.timing.median)} ms  {text}"
        axes.annotate(label, (row.timing.max * 1e3, place), (8, 0), textcoords="offset points", va="center")
    axes.set_yticks(places, [row.name for row in case.rows])
    axes.set_ylim(len(case.rows) - 0.5, -0.95)
    if case.bound is not None:
        axes.axvline(case.bound * 1e3, color="#333", linestyle="--", linewidth=1.2)
        axes.annotate("bound", (case.bound * 1e3, -0.9), (4, 0), textcoords="offset points", fontsize=9, va="top")
    axes.set_title(f"{case.title}, {case.grid} tokens", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def save(result: Result, folder: Path) -> list[Path]:
    """Write `bench.json`, `bench.md` and `bench.png`; the image needs matplotlib."""
    paths = [write_json(folder / "bench.json", result.to_dict()), write_text(folder / "bench.md", markdown(result))]
    with written(folder / "bench.png") as path:
        plot(result).savefig(path)
    return [*paths, folder / "bench.png"]
