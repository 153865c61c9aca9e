"""Write what windows and `routing` cost on GPUs, modelled from data sheets, into a Markdown file.

    python scripts/numbers/modelled_times.py docs/cuda.md [--check]

The sizes from which `auto` takes which kernel on CUDA go into diffattn/kernels/thresholds.json, unless measured ones
are there.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from diffattn import ClearAttention, HaloAttention, RoutingAttention, TokenGrid
from diffattn.kernels.choose import THRESHOLDS
from diffattn.measure.modelled import (
    CARDS,
    LAUNCH,
    MASKED,
    MATMUL,
    MEMORY,
    Part,
    dense_parts,
    full_parts,
    keys_computed,
    routing_parts,
    seconds,
    window_parts,
)

MARKERS = "<!-- modelled -->", "<!-- /modelled -->"
MODELLED = "modelled from data sheets"
GAIN = 1.2
"""Times that FlexAttention must be modelled faster than a dense mask on every card, for `auto` to take it."""
WINDOWS = {
    "`clear(radius=8)`": ClearAttention(radius=8),
    "`clear(radius=16)`": ClearAttention(radius=16),
    "`halo(tile=8, halo=1)`": HaloAttention(tile=8, halo=1),
}
HEADS, HEAD_DIM = 24, 128
CASES = {
    "64 x 64 cells, 512 text": (TokenGrid(64, 64, before=512), RoutingAttention(top_k=3, tile=(8, 16), pool=8)),
    "128 x 128 cells, 512 text": (TokenGrid(128, 128, before=512), RoutingAttention(top_k=12, tile=(8, 16), pool=8)),
    "21 x 45 x 80 cells": (
        TokenGrid(45, 80, frames=21),
        RoutingAttention(top_k=50, tile=(2, 8, 8), pool=(2, 4, 4)),
    ),
}


def parts_table() -> list[str]:
    """GFLOPs and megabytes of every part."""
    lines = []
    for name, (grid, mechanism) in CASES.items():
        full = full_parts(grid, HEADS, HEAD_DIM)[0]
        lines += [
            "",
            f"{name}, `{mechanism}`, {mechanism.share_on(grid):.1%} of the pairs:",
            "",
            "| part | GFLOPs | MB | modelled ms on H100 |",
            "|---|---:|---:|---:|",
        ]
        parts = [full, *routing_parts(mechanism, grid, HEADS, HEAD_DIM)]
        lines += [row(part.name if part is not full else "full attention", part) for part in parts]
    return lines


def row(name: str, part: Part) -> str:
    return f"| {name} | {part.flops / 1e9:,.0f} | {part.bytes / 1e6:,.0f} | {part.seconds(CARDS['H100']) * 1e3:.2f} |"


def cards_table() -> list[str]:
    """Modelled milliseconds of full attention and of `routing`, and from which side on it is faster."""
    heads = "".join(f" {name} | |" for name in CASES)
    lines = ["", f"| modelled ms |{heads} pays from |", "|---|" + "---:|---:|" * len(CASES) + "---:|"]
    lines.append("| |" + " full | `routing` |" * len(CASES) + " cells a side |")
    for card in CARDS.values():
        cells = []
        for grid, mechanism in CASES.values():
            cells += [
                f"{seconds(full_parts(grid, HEADS, HEAD_DIM), card) * 1e3:.2f}",
                f"{seconds(routing_parts(mechanism, grid, HEADS, HEAD_DIM), card) * 1e3:.2f}",
            ]
        lines.append(f"| {card.name} | " + " | ".join(cells) + f" | {pays_from(card.name)} |")
    return lines


def pays_from(name: str) -> int:
    """Rows and columns from which about an eighth of the pairs is modelled to be faster than all."""
    for side in range(16, 512, 8):
        grid = TokenGrid(side, side, before=512)
        own = RoutingAttention(top_k=max(1, side * side // 128 // 10), tile=(8, 16), pool=8)
        full = seconds(full_parts(grid, HEADS, HEAD_DIM), CARDS[name])
        if seconds(routing_parts(own, grid, HEADS, HEAD_DIM), CARDS[name]) < full:
            return side
    return 512


def windows_table() -> list[str]:
    """Keys that a query computes, and modelled milliseconds of windows by FlexAttention."""
    lines = ["", "| window, 512 text | keys a query |" + "".join(f" {name} |" for name in CARDS) + " pays from |"]
    lines.append("|---|---:|" + "---:|" * (len(CARDS) + 1))
    for side in (64, 128, 256):
        grid = TokenGrid(side, side, before=512)
        times = [seconds(full_parts(grid, HEADS, HEAD_DIM), card) for card in CARDS.values()]
        lines.append(f"| {side} x {side}, full attention | {grid.cells:,} |" + cells_of(times) + " |")
        for name, mechanism in WINDOWS.items():
            pattern = mechanism.pattern(grid)
            times = [seconds(window_parts(pattern, grid, HEADS, HEAD_DIM), card) for card in CARDS.values()]
            keys = f"| {keys_computed(pattern, grid):,.0f} |"
            lines.append(f"| {side} x {side}, {name} {keys}{cells_of(times)} {window_pays_from(name)} |")
    return lines


def cells_of(times: list[float]) -> str:
    return "".join(f" {value * 1e3:.2f} |" for value in times)


def window_pays_from(name: str) -> str:
    """Cells a side from which a window is modelled faster than full attention on an H100."""
    for side in range(16, 256, 8):
        grid = TokenGrid(side, side, before=512)
        own = window_parts(WINDOWS[name].pattern(grid), grid, HEADS, HEAD_DIM)
        if seconds(own, CARDS["H100"]) < seconds(full_parts(grid, HEADS, HEAD_DIM), CARDS["H100"]):
            return str(side)
    return "-"


def flex_cells() -> int:
    """Cells from which FlexAttention is modelled `GAIN` times faster than a dense mask on every card."""
    for side in range(16, 128, 4):
        grid = TokenGrid(side, side, before=512)
        own = window_parts(ClearAttention(radius=8).pattern(grid), grid, HEADS, HEAD_DIM)
        dense = dense_parts(grid, HEADS, HEAD_DIM)
        if all(GAIN * seconds(own, card) <= seconds(dense, card) for card in CARDS.values()):
            return side * side
    raise RuntimeError("a window never pays")


def thresholds() -> str:
    """The content of thresholds.json: measured rows stay."""
    found = json.loads(THRESHOLDS.read_text())
    if found["cuda"]["source"].startswith("modelled"):
        cells = flex_cells()
        found["cuda"] = {"dense_cells": cells - 1, "flex_cells": cells, "source": MODELLED}
    return json.dumps(found, indent=1) + "\n"


def section() -> str:
    """All that stands between the markers."""
    cards = "; ".join(f"{card.name} {card.tflops:g} TFLOP/s, {card.gigabytes:g} GB/s" for card in CARDS.values())
    head = [
        f"**Modelled, not measured**: one call of {HEADS} heads x {HEAD_DIM} in bfloat16. Each part takes the longer",
        f"of FLOPs at {MATMUL:.0%} of the peak and bytes at {MEMORY:.0%} of the bandwidth; parts do not overlap,",
        f"caches cost nothing. A window's blocks, and SDPA under a mask, are taken to reach {MASKED:.0%}, and every",
        f"launch to take {LAUNCH * 1e6:.0f} microseconds. Data sheets: {cards}.",
        "",
        "Milliseconds; the last column: cells a side from which an H100 is modelled faster than with full attention.",
    ]
    return "\n".join([MARKERS[0], *head, *windows_table(), *cards_table(), *parts_table(), MARKERS[1]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--check", action="store_true", help="only say whether the file is up to date")
    given = parser.parse_args()
    text = given.file.read_text()
    new, count = re.subn(re.escape(MARKERS[0]) + r".*?" + re.escape(MARKERS[1]), lambda _: section(), text, flags=re.S)
    if count != 1:
        sys.exit(f"{given.file} must have one pair of {MARKERS[0]} and {MARKERS[1]}, found {count}")
    if given.check:
        same = new == text and thresholds() == THRESHOLDS.read_text()
        sys.exit(0 if same else f"{given.file} is out of date: python scripts/numbers/modelled_times.py {given.file}")
    given.file.write_text(new)
    THRESHOLDS.write_text(thresholds())


if __name__ == "__main__":
    main()
