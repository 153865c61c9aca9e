"""The tables of docs/patterns.md, each between two markers: text outside them is left as it is."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffattn.files.writing import write_text

from .cells import CELLS

Values = dict[str, Any]
HEAD = (
    "| setting | options | share | GFLOPs | ms (quartiles) | SDPA's | PSNR | min-max | error |",
    "|---|---|---:|---:|---:|---:|---:|---:|---:|",
)
TRAINED = (
    "| setting | share | GFLOPs | ms (quartiles) | SDPA's | steps"
    " | PSNR | trained | min-max | nearer | error | trained |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
)
OTHERWISE = (
    "| setting | options | share | trained otherwise | minutes | steps | PSNR | min-max | error |",
    "|---|---|---:|---|---:|---:|---:|---:|---:|",
)
DISTILLED = "256"


def write(file: Path, values: Values) -> None:
    """Put every table between its markers."""
    text = file.read_text(encoding="utf-8")
    for name, table in tables(values).items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{file} must hold {begin} and {end}, each on its own line")
        text = f"{before}{begin}\n{table}\n{end}{after}"
    write_text(file, text)


def tables(values: Values) -> dict[str, str]:
    """What is between the markers, by their name: `machine`, every cell's `cell NAME`, `distilled` and `otherwise`."""
    found = {"machine": machine(values)}
    for name in CELLS:
        found[f"cell {name}"] = cell_table(values["cells"].get(name))
    found["distilled"] = distilled_table(values["cells"].get(DISTILLED))
    found["otherwise"] = otherwise_table(values["cells"].get(DISTILLED))
    return found


def machine(values: Values) -> str:
    """What it was measured on."""
    machines = values.get("machines")
    if not machines:
        return "*Not measured yet.*"
    first, *others = machines
    text = (
        f"Measured on {_processor(first)}, one thread, torch {first['torch']}, diffusers {first['diffusers']}, by "
        "`scripts/patterns.py`."
    )
    marks = "; ".join(f"{_mark(number)} {_processor(own)}" for number, own in enumerate(others, 2))
    return f"{text}\nTimes and steps of training with a mark are of another processor: {marks}." if marks else text


def _processor(machine: Values) -> str:
    return f"{machine['cpu']} with {machine['vectors']}"


def _mark(number: int) -> str:
    """Beside a figure of another machine than the first."""
    return "" if number == 1 else f"[{number}]"


def cell_table(cell: Values | None) -> str:
    """A cell's settings, the nearest first."""
    rows = measured(cell)
    if cell is None or not rows:
        return "*Not measured yet.*"
    count = max(len(row["psnr"]) for row in rows)
    lines = [f"At most {cell['budget']:.0%} of all pairs, {cell['steps']} steps, {count} prompts.", "", *HEAD]
    lines += [_line(row) for row in rows]
    lines += _parts(rows)
    left_out = [row for row in cell["settings"] if row not in rows]
    if left_out:
        lines += ["", "Not in the table: " + "; ".join(f"{row['setting']} ({_why(row)})" for row in left_out) + "."]
    return "\n".join(lines)


def _parts(rows: Sequence[Values]) -> list[str]:
    """What a call of `per_head` costs over the calls of its parts, each with its heads alone."""
    found = [
        f"{statistics.median(row['seconds']) / statistics.median(row['parts_seconds']):.2f} times its parts"
        f" ({row['setting']})"
        for row in rows
        if row.get("parts_seconds")
    ]
    return ["", f"One call takes {', '.join(found)}, each with its heads alone."] if found else []


def measured(cell: Values | None) -> list[Values]:
    """The settings that have images, by their median PSNR."""
    rows = [row for row in (cell or {"settings": []})["settings"] if row.get("psnr")]
    return sorted(rows, key=lambda row: -statistics.median(row["psnr"]))


def _why(row: Values) -> str:
    return str(row.get("failed") or row.get("note") or "not measured")


def _line(row: Values) -> str:
    options = f"`{row['mechanism']}`" + (f", reuse {row['reuse']}" if row["reuse"] > 1 else "")
    note = f"; {row['note']}" if row.get("note") else ""
    return (
        f"| {row['setting']} | {options}{note} | {row['share']:.3f} | {row['gflops']:.3g} | {_times(row)} | "
        f"{statistics.median(row['psnr']):.1f} | {_spread(row['psnr'])} | {_error(row)} |"
    )


def _times(row: Values) -> str:
    """Time of a call, and how often full attention's fits the same rounds' median."""
    if "seconds" not in row:
        return "- | -"
    own, full = statistics.median(row["seconds"]), statistics.median(row["full_seconds"])
    mark = _mark(row.get("time_machine", 1))
    low, _, high = statistics.quantiles(row["seconds"], n=4, method="inclusive")
    return f"{own * 1e3:.3g} ({low * 1e3:.3g}-{high * 1e3:.3g}){mark} | {full / own:.2f}x"


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.1f}-{max(values):.1f}"


def _error(row: Values) -> str:
    return f"{statistics.mean(one for prompt in row['error'] for one in prompt):.4f}" if row.get("error") else "-"


def trained(cell: Values | None) -> list[Values]:
    """The settings that were trained, the nearest after it first."""
    rows = [row for row in measured(cell) if row.get("distilled")]
    return sorted(rows, key=lambda row: -statistics.median(row["distilled"]["psnr"]))


def distilled_table(cell: Values | None) -> str:
    """What training brought, the nearest after it first."""
    rows = trained(cell)
    if not rows:
        return "*Not measured yet.*"
    first = rows[0]["distilled"]
    lines = [f"{first['minutes']:g} minutes of one core each, batches of {first['batch']}.", "", *TRAINED]
    for row in rows:
        own = row["distilled"]
        before, after = statistics.median(row["psnr"]), statistics.median(own["psnr"])
        lines.append(
            f"| {row['setting']} | {row['share']:.3f} | {row['gflops']:.3g} | {_times(row)} | {_steps(own)} | "
            f"{before:.1f} | {after:.1f} | {_spread(own['psnr'])} | {_nearer(row)} | {_error(row)} | {_error(own)} |"
        )
    left_out = [row for row in measured(cell) if not row.get("distilled")]
    if left_out:
        told = "; ".join(f"{row['setting']} ({_why_untrained(row, rows)})" for row in left_out)
        lines += ["", f"Not in the table: {told}."]
    return "\n".join(lines)


def _nearer(row: Values) -> str:
    """On how many of the prompts training brought the image nearer."""
    pairs = list(zip(row["psnr"], row["distilled"]["psnr"], strict=True))
    return f"{sum(after > before for before, after in pairs)} of {len(pairs)}"


def _why_untrained(row: Values, trained: Sequence[Values]) -> str:
    """Images and errors of two settings that are equal on all prompts are those of one pattern by two kernels."""
    if row["reuse"] > 1 or row["mechanism"].startswith("softmax"):
        return "outputs used again"
    if row["mechanism"].startswith("a recipe"):
        return "a recipe, with a mechanism for each head"
    same = [own["setting"] for own in trained if all(own.get(key) == row.get(key) for key in ("psnr", "error"))]
    return f"the same pairs as {same[0]}" if same else "not trained yet"


def _steps(row: Values) -> str:
    return f"{row['steps_trained']}{_mark(row.get('machine', 1))}"


def otherwise_table(cell: Values | None) -> str:
    """Settings that were trained for another time, at another budget or with other losses."""
    rows = (cell or {}).get("otherwise", [])
    if not rows:
        return "*Not measured yet.*"
    lines = list(OTHERWISE)
    for row in rows:
        how = f"`{' '.join(row['changes'])}`" if row.get("changes") else "the preset's"
        lines.append(
            f"| {row['setting']} | `{row['mechanism']}` | {row['share']:.3f} | {how} | {row['minutes']:g} | "
            f"{_steps(row)} | {statistics.median(row['psnr']):.1f} | {_spread(row['psnr'])} | {_error(row)} |"
        )
    return "\n".join(lines)
