"""Write what the kernels for CUDA take, counted without a GPU, into a Markdown file.

    make cuda-figures                                            installs Triton apart and runs this
    python scripts/cuda_figures.py docs/cuda.md                  needs Triton, and TRITON_INTERPRET=1

Keys that a query computes, by geometry; registers, spilled bytes, shared memory and instructions, from the machine code
of the kernels that torch.compile would make for each card (`tests/cuda_code`).
"""

import argparse
import os
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import triton  # noqa: E402
from cuda_code.cards import CARDS  # noqa: E402
from cuda_code.checks import Check, compiled, on_cuda, window, write_backward, write_forward  # noqa: E402

from diffattn import ClearAttention, HaloAttention, NeighborhoodAttention, TokenGrid  # noqa: E402
from diffattn.kernels import flex  # noqa: E402
from diffattn.measure.bench.row_major import row_major_blocks  # noqa: E402
from diffattn.measure.modelled import keys_computed  # noqa: E402

MARKERS = "<!-- compiled -->", "<!-- /compiled -->"
WINDOWS = {
    "clear(radius=8)": ClearAttention(radius=8),
    "clear(radius=16)": ClearAttention(radius=16),
    "neighborhood(kernel_size=13)": NeighborhoodAttention(kernel_size=13),
    "halo(tile=8, halo=1)": HaloAttention(tile=8, halo=1),
}
HEAD_DIMS = 64, 128, 160, 256
GRID = TokenGrid(128, 128, before=512)


def keys_table() -> list[str]:
    """Keys of a query in blocks of 128 x 128 in the order of the rows, in ours, and those it sees."""
    lines = ["| window | cells | sees | rows, 128 x 128 | tiles |", "|---|---|---:|---:|---:|"]
    for side in (64, 128):
        grid = TokenGrid(side, side)
        for name, mechanism in WINDOWS.items():
            pattern = mechanism.pattern(grid)
            rows = row_major_blocks(pattern, grid).lists
            by_rows = float((rows.partial_count + rows.full_count).float().mean()) * 128
            seen = pattern.pairs(grid) / grid.cells
            ours = keys_computed(pattern, grid)
            lines.append(f"| `{name}` | {side} x {side} | {seen:,.0f} | {by_rows:,.0f} | {ours:,.0f} |")
    return lines


def sources() -> list[tuple[str, int, bool, str]]:
    """Card, head dim, backward, and the module that Inductor writes."""
    found = []
    for card in CARDS:
        for head_dim in HEAD_DIMS:
            for backward in (False, True):
                check = Check(card, ClearAttention(radius=8), GRID, head_dim=head_dim, backward=backward)
                with on_cuda(backward):
                    ordered = flex.ordered_call(window(check))
                written = (write_backward if backward else write_forward)(card, ordered)
                found.append((card, head_dim, backward, written.source))
                print(f"written: {check}", file=sys.stderr)
    return found


def kernels_table() -> list[str]:
    """One row for each card, head dim and direction."""

    def row(entry: tuple[str, int, bool, str]) -> str:
        card, head_dim, backward, source = entry
        with tempfile.TemporaryDirectory() as folder:
            (kernel,) = compiled(card, source, Path(folder))
        loops = " / ".join(map(str, kernel.loops))
        direction = "gradients" if backward else "forward"
        print(f"compiled: {card} {head_dim} {direction}", file=sys.stderr)
        shared = f"{kernel.shared:,} of {CARDS[card].shared:,}"
        return f"| {card} | {head_dim} | {direction} | {kernel.registers} | {kernel.spilled} | {shared} | {loops} |"

    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(row, sources()))
    head = "| card | head dim | | registers | spilled bytes | shared memory | instructions of a loop |"
    return [head, "|---|---:|---|---:|---:|---:|---|", *rows]


def section() -> str:
    """All that stands between the markers."""
    releases = f"torch {torch.__version__.split('+')[0]} and Triton {triton.__version__}"
    lines = [
        MARKERS[0],
        f"Counted with {releases}; nothing ran on a GPU. Keys that a query computes:",
        "",
        *keys_table(),
        "",
        "`clear(radius=8)` on 128 x 128 cells with 512 text tokens, bfloat16. Instructions of a warp in a step of each",
        "loop; of the forward kernel first a block with a rule, then one without:",
        "",
        *kernels_table(),
        MARKERS[1],
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("set TRITON_INTERPRET=1, or run make cuda-figures")
    before = given.file.read_text()
    text, count = re.subn(
        re.escape(MARKERS[0]) + r".*?" + re.escape(MARKERS[1]), lambda _: section(), before, flags=re.S
    )
    if count != 1:
        sys.exit(f"{given.file} must have one pair of {MARKERS[0]} and {MARKERS[1]}, found {count}")
    given.file.write_text(text)


if __name__ == "__main__":
    main()
