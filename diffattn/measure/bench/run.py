"""Run a benchmark: every kernel of a grid once per round, all checked before and weighed after."""

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from diffattn.grid import TokenGrid
from diffattn.mechanisms import ClearAttention, SoftmaxAttention

from ..cost import attention_share
from ..hardware import hardware
from ..latency import Timing, latency
from ..memory import peak_memory
from ..progress import bar_options
from .accuracy import TOLERANCE, difference, error_of
from .contestants import Contestant, others, windows
from .results import FULL, OFFICIAL, ROW_MAJOR, Case, Result, Row, Scaling, Settings

OTHERS = "other mechanisms"


def run(settings: Settings, progress: bool = False) -> Result:
    """Time everything, grid by grid; all kernels of one grid take turns in every round."""
    start = time.perf_counter()
    machine, cases, skipped = hardware(settings.device), [], []
    with torch.no_grad():
        for grid in settings.grids:
            found, left_out = run_grid(settings, grid, progress)
            cases += found
            skipped += left_out
        scaling = tuple(run_scaling(settings, progress)) if settings.scaling else ()
    return Result(settings, machine, tuple(cases), scaling, tuple(skipped), time.perf_counter() - start)


def run_grid(settings: Settings, grid: TokenGrid, progress: bool) -> tuple[list[Case], list[str]]:
    """All cases of one grid, and what was skipped."""
    q, k, v = settings.tensors(grid)
    full = Contestant(FULL, SoftmaxAttention(), lambda: F.scaled_dot_product_attention(q, k, v))
    groups: dict[str, list[Contestant]] = {}
    skipped: list[str] = []
    for radius in settings.radii:
        groups[f"CLEAR, radius {radius:g}"], left_out = windows(
            settings.rows, grid, ClearAttention(radius=radius), q, k, v
        )
        skipped += left_out
    if settings.mechanisms:
        groups[OTHERS] = [others(mechanism, grid, q, k, v) for mechanism in settings.mechanisms]
    everyone = {(title, one.name): one for title, group in groups.items() for one in group}
    everyone = {("", FULL): full, **everyone}
    errors: dict[tuple[str, str], tuple[float, float | None]] = {}
    official: dict[str, Tensor] = {}
    for key, one in tqdm(everyone.items(), desc=f"{grid}: compiling and checking", **bar_options(progress)):
        out = one.finish(one.run())
        if one.name == OFFICIAL:
            official[key[0]] = out
        beside = official.get(key[0])
        errors[key] = error_of(one.mechanism, out, grid, q, k, v), None if beside is None else difference(out, beside)
        del out
    official.clear()
    timings = latency(
        {key: one.run for key, one in everyone.items()},
        settings.rounds,
        warmup=0,
        device=settings.device,
        progress=progress,
    )
    measured = {}
    for key, one in everyone.items():
        measured[key] = _row(settings, one, grid, timings[key], peak_of(one, settings.device), *errors[key])
    cases = []
    for title, group in groups.items():
        rows = with_ratios([measured["", FULL], *(measured[title, one.name] for one in group)])
        density = attention_share([(group[0].mechanism, grid, 1, 1)]) if title != OTHERS and group else None
        cases.append(Case(grid, title, tuple(rows), density))
    return cases, skipped


def peak_of(one: Contestant, device: torch.device) -> int | None:
    """Bytes that one run holds at its peak beyond its inputs."""
    gc.collect()
    with peak_memory(device) as memory:
        one.run()
    return memory.bytes


def _row(
    settings: Settings,
    one: Contestant,
    grid: TokenGrid,
    timing: Timing,
    peak: int | None,
    error: float,
    official_error: float | None,
) -> Row:
    passed = error <= TOLERANCE[settings.dtype]  # False for NaN
    flops = one.mechanism.flops(grid, settings.heads, settings.head_dim)
    return Row(one.name, str(one.mechanism), timing, flops, peak, error, passed, official_error, None, None, None)


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Rows with their speedups over the baselines; none for rows, or over baselines, that failed."""
    medians = {row.name: row.timing.median for row in rows if row.passed}

    def ratio(row: Row, baseline: str) -> float | None:
        return medians[baseline] / row.timing.median if row.passed and baseline in medians else None

    return [
        replace(
            row,
            full_ratio=ratio(row, FULL),
            official_ratio=ratio(row, OFFICIAL),
            row_major_ratio=ratio(row, ROW_MAJOR),
        )
        for row in rows
    ]


def run_scaling(settings: Settings, progress: bool) -> Iterator[Scaling]:
    """CLEAR as a model calls it, at the first grid and at one with twice its rows and columns, in turns."""
    small = settings.grids[0]
    large = TokenGrid(2 * small.height, 2 * small.width, small.frames, small.before, small.after)
    inputs = {grid: settings.tensors(grid) for grid in (small, large)}
    for radius in settings.radii:
        mechanism = ClearAttention(radius=radius)
        functions = {grid: partial(mechanism.attend, *inputs[grid], grid) for grid in (small, large)}
        for grid, function in functions.items():
            error = error_of(mechanism, function(), grid, *inputs[grid])
            if not error <= TOLERANCE[settings.dtype]:
                raise ValueError(f"no scaling: {mechanism} on {grid} is {error:.1e} from its reference")
        timings = latency(functions, settings.rounds, device=settings.device, progress=progress)
        yield Scaling(str(mechanism), small, large, timings[small], timings[large])
