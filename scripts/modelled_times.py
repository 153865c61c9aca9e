"""Write what `routing` costs on GPUs, modelled from data sheets, into a Markdown file.

python scripts/modelled_times.py docs/cuda.md [--check]
"""

import argparse
import re
import sys
from pathlib import Path

from diffattn import RoutingAttention, TokenGrid
from diffattn.measure.modelled import CARDS, MATMUL, MEMORY, Part, full_parts, routing_parts, seconds

MARKERS = "<!-- modelled routing -->", "<!-- /modelled routing -->"
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


def section() -> str:
    """All that stands between the markers."""
    cards = "; ".join(f"{card.name} {card.tflops:g} TFLOP/s, {card.gigabytes:g} GB/s" for card in CARDS.values())
    head = [
        f"**Modelled, not measured**: one call of {HEADS} heads x {HEAD_DIM} in bfloat16. Each part takes the longer",
        f"of FLOPs at {MATMUL:.0%} of the peak and bytes at {MEMORY:.0%} of the bandwidth; parts do not overlap,",
        f"caches and launches cost nothing. Data sheets: {cards}.",
    ]
    return "\n".join([MARKERS[0], *head, *cards_table(), *parts_table(), MARKERS[1]])


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
        sys.exit(0 if new == text else f"{given.file} is out of date: python scripts/modelled_times.py {given.file}")
    given.file.write_text(new)


if __name__ == "__main__":
    main()
