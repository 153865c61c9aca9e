"""One attention layer of LTX-2.5's diffusion decoder by its own processor and by `apply_exact`: memory and time.

    python scripts/numbers/decoder_memory.py
    python scripts/numbers/decoder_memory.py --most-own 20000 --rounds 5

The layer is one of the last stage: 256 channels, 4 heads of 64, windows of 11 x 11 x 11 cells. Every figure comes from
a process of its own; memory is what the process grew by from before the calls to its peak. A stage has eight such
layers, which share the mask that the decoder's own processor needs.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers.models.autoencoders import ltx2_diffusion_decoder as ltx

import diffattn
from diffattn.measure.hardware import hardware, hardware_line

WINDOW = (11, 11, 11)
CHANNELS, HEAD_DIM = 256, 64
GRIDS = ((11, 16, 16), (11, 28, 32), (17, 32, 40), (17, 56, 72))
"""Frames, rows, columns."""
OWN, EXACT = "own", "exact"
app = typer.Typer(rich_markup_mode=None)


def memory(line: str) -> float:
    """Memory of this process in GB: now ("VmRSS") or the most that it had ("VmHWM")."""
    found = re.search(rf"{line}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e9


def child(way: str, grid: tuple[int, int, int], rounds: int, output: Path) -> dict[str, float]:
    """Seconds of the mask and of a call with it (medians), and the memory; the result goes to `output`."""
    torch.manual_seed(0)
    layer = ltx.LTX2VideoVaeNeighborhoodAttention(CHANNELS, WINDOW, head_dim=HEAD_DIM).eval()
    hidden, result = torch.randn(1, *grid, CHANNELS), torch.empty(0)
    if way == EXACT:
        diffattn.apply_exact(layer)
    before, masks, calls = memory("VmRSS"), [], []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FlexAttention warns where it is not compiled
        for _ in range(rounds + 1):  # the first traces or compiles
            start = time.perf_counter()
            mask = layer.build_block_mask(hidden)
            made = time.perf_counter()
            result = layer(hidden, mask)
            calls.append(time.perf_counter() - made)
            masks.append(made - start)
    grown = memory("VmHWM") - before
    torch.save(result, output)
    return {"mask": statistics.median(masks[1:]), "call": statistics.median(calls[1:]), "memory": grown}


def measured(way: str, grid: tuple[int, int, int], rounds: int, output: Path) -> dict[str, float]:
    """`child` in a process of its own."""
    command = [sys.executable, __file__, "--child", way, "--rounds", str(rounds), "--output", str(output)]
    done = subprocess.run([*command, *(f"--grid={size}" for size in grid)], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(grid: tuple[int, int, int], own: dict[str, float] | None, exact: dict[str, float], error: float | None) -> str:
    """One line of the table."""
    tokens = grid[0] * grid[1] * grid[2]
    before = "- | - | -" if own is None else f"{own['memory']:.2f} GB | {own['mask']:.2f} s | {own['call']:.2f} s"
    difference = "-" if error is None else f"{error:.0e}"
    size = f"{' x '.join(map(str, grid))} = {tokens:,}"
    after = f"{exact['memory']:.2f} GB | {exact['call']:.2f} s"
    return f"| {size} | {tokens**2 / 1e9:.2f} GB | {before} | {after} | {difference} |"


@app.command()
def main(
    most_own: Annotated[int, typer.Option(help="The decoder's own processor runs up to this many tokens.")] = 10000,
    rounds: Annotated[int, typer.Option(min=1, help="Calls of which the median is taken.")] = 3,
    child_way: Annotated[str, typer.Option("--child", hidden=True)] = "",
    grid: Annotated[list[int] | None, typer.Option(hidden=True)] = None,
    output: Annotated[Path, typer.Option(hidden=True)] = Path(),
) -> None:
    """Print a table, one line for each grid."""
    if child_way and grid:
        print(json.dumps(child(child_way, (grid[0], grid[1], grid[2]), rounds, output)))
        return
    print(f"{hardware_line(hardware())}, float32\n")
    print("| tokens | mask | own: memory | own: mask | own: call | exact: memory | exact: call | largest difference |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        files = {way: Path(folder, way) for way in (OWN, EXACT)}
        for size in GRIDS:
            own = measured(OWN, size, rounds, files[OWN]) if size[0] * size[1] * size[2] <= most_own else None
            exact = measured(EXACT, size, rounds, files[EXACT])
            results: list[Any] = [torch.load(file) for file in files.values()] if own else []
            error = float((results[0] - results[1]).abs().max()) if results else None
            print(row(size, own, exact, error), flush=True)


if __name__ == "__main__":
    app()
