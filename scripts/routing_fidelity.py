"""Attention without training, compared on the bundled pipeline: how far the images are from full attention's own.

    python scripts/routing_fidelity.py native             text to image at 128 px, 20 steps
    python scripts/routing_fidelity.py enlarged           image to image at 256 px, 10 steps, from the native image
    python scripts/routing_fidelity.py velocity           error of the output at 512 px, on full attention's path
    python scripts/routing_fidelity.py few-steps          text to image in 4 and in 8 steps
    python scripts/routing_fidelity.py latency            one attention call, beside full SDPA in the same rounds
    python scripts/routing_fidelity.py all                all of these

PSNR is between float images in 0-1, before rounding. Shares count every pair that is computed; with reuse over all
steps. Each command writes Markdown, JSON and a plot into --output.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from fidelity.methods import Broadcast, Method, OracleRouting, clear_of, halo_of, neighborhood_of, share_of
from fidelity.painting import Painter
from fidelity.tables import Line, decibels, errors, save
from tqdm import tqdm

import diffattn
from diffattn import Mechanism, RoutingAttention, SoftmaxAttention, TokenGrid
from diffattn.measure import latency as time_all
from diffattn.measure import psnr

TEXT = 32
"""Text tokens of the bundled pipeline."""
BEST_SEEN = 120.0
"""PSNR of equal images."""
app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)
Count = Annotated[int, typer.Option(min=1, help="Held-out prompts.")]
Seed = Annotated[int, typer.Option(help="Of the choice of prompts; image i starts from noise of its own.")]
Output = Annotated[Path, typer.Option(help="Folder.")]
FOLDER = Path("outputs/fidelity")


def compare(
    painter: Painter, methods: Sequence[Method], draw: Callable[[int], np.ndarray], grid: TokenGrid, steps: range
) -> list[Line]:
    """PSNR of each method's images to full attention's."""
    numbers, shares = range(len(painter.prompts)), [method.share(grid, steps) for method in methods]
    full = [draw(number) for number in tqdm(numbers, desc="full attention", disable=None)]
    lines = []
    for method, share in zip(methods, shares, strict=True):
        with method.on(painter.image_to_image):
            images = [draw(number) for number in tqdm(numbers, desc=method.name, leave=False, disable=None)]
        values = tuple(min(psnr(one, other), BEST_SEEN) for one, other in zip(images, full, strict=True))
        lines.append(Line(method.name, share, values))
        tqdm.write(lines[-1].decibels)
    return lines


@app.command()
def native(count: Count = 16, seed: Seed = 1, output: Output = FOLDER) -> None:
    """Text to image at 128 px: 16 x 16 tokens and 32 of text."""
    painter, grid = Painter(count, seed), TokenGrid(16, 16, before=TEXT)
    half: dict[str, Any] = {"share": 0.51, "tile": 2, "pool": 2}
    methods = [
        Method("clear", clear_of(0.51, grid)),
        Method("halo", halo_of(0.51, grid)),
        Method("agent", diffattn.AgentAttention(num_agents=64)),
        Method("token_merge", diffattn.TokenMergeAttention(ratio=0.35, proportional=True, use_rand=False)),
        Broadcast("Pyramid Attention Broadcast 2", reuse=2),
        Method("reuse 2 alone", SoftmaxAttention(), 2),
        Method("reuse 3 alone", SoftmaxAttention(), 3),
        Method("reuse 4 alone", SoftmaxAttention(), 4),
        Method("clear, pool 2", clear_of(0.51, grid, pool=2)),
        Method("halo, pool 2", halo_of(0.51, grid, (2,), pool=2)),
        Method("routing", RoutingAttention(**half)),
        Method("routing, tile 4 pool 2", RoutingAttention(share=0.51, tile=4, pool=2)),
        Method("routing, means=weighted", RoutingAttention(**half, means="weighted")),
        Method("routing, order=content", RoutingAttention(**half, order="content")),
        Method("routing, order=centroids", RoutingAttention(**half, order="centroids")),
        Method("routing, order=content, query_tile 1", RoutingAttention(**half, order="content", query_tile=1)),
        Method("routing, choice by an oracle", OracleRouting(**half)),
        Method("routing, reuse 2", RoutingAttention(share=0.47, tile=2, pool=2), 2),
    ]
    lines = compare(painter, methods, painter.native, grid, range(20))
    title = f"native 128 px, text to image, 20 steps, {count} prompts"
    save(lines, "native-128-px", title, decibels(lines, "clear"), output, "dB")


@app.command("few-steps")
def few_steps(count: Count = 16, seed: Seed = 1, output: Output = FOLDER) -> None:
    """Text to image at 128 px in 4 and in 8 steps."""
    painter, grid = Painter(count, seed), TokenGrid(16, 16, before=TEXT)
    methods = [
        Method("clear", clear_of(0.51, grid)),
        Broadcast("Pyramid Attention Broadcast 2", reuse=2),
        Method("reuse 2 alone", SoftmaxAttention(), 2),
        Method("clear, pool 2", clear_of(0.51, grid, pool=2)),
        Method("routing", RoutingAttention(share=0.51, tile=2, pool=2)),
        Method("routing, reuse 2", RoutingAttention(share=0.51, tile=2, pool=2), 2),
    ]
    for steps in (4, 8):
        draw = lambda number, steps=steps: painter.native(number, num_inference_steps=steps)  # noqa: E731
        lines = compare(painter, methods, draw, grid, range(steps))
        title = f"{steps} steps, native 128 px, text to image, {count} prompts"
        save(lines, f"{steps}-steps", title, decibels(lines, "clear"), output, "dB")


@app.command()
def enlarged(count: Count = 16, seed: Seed = 1, output: Output = FOLDER) -> None:
    """Image to image at 256 px: 32 x 32 tokens and 32 of text, from the native image enlarged."""
    painter, grid = Painter(count, seed), TokenGrid(32, 32, before=TEXT)
    fifth: dict[str, Any] = {"share": 0.21, "tile": 4, "pool": 4}
    starts = [painter.native(number) for number in tqdm(range(count), desc="native images", disable=None)]
    methods = [
        Method("clear", clear_of(0.21, grid)),
        Method("halo", halo_of(0.21, grid)),
        Method("neighborhood", neighborhood_of(0.21, grid)),
        Method("agent", diffattn.AgentAttention(num_agents=100)),
        Method("token_merge", diffattn.TokenMergeAttention(ratio=0.6, proportional=True, use_rand=False)),
        Broadcast("Pyramid Attention Broadcast 5", reuse=5),
        Method("reuse 5 alone", SoftmaxAttention(), 5),
        Method("clear, pool 4", clear_of(0.21, grid, pool=4)),
        Method("halo, pool 4", halo_of(0.21, grid, (4,), pool=4)),
        Method("neighborhood, pool 4", neighborhood_of(0.21, grid, pool=4)),
        Method("routing", RoutingAttention(**fifth)),
        Method("routing, chosen_by=mean", RoutingAttention(**fifth, chosen_by="mean")),
        Method("routing, means=weighted", RoutingAttention(**fifth, means="weighted")),
        Method("routing, order=content", RoutingAttention(**fifth, order="content")),
        Method("routing, order=centroids", RoutingAttention(**fifth, order="centroids")),
        Method("routing, order=content, query_tile 2", RoutingAttention(**fifth, order="content", query_tile=2)),
        Method("routing, choice by an oracle", OracleRouting(**fifth)),
        Method("routing, reuse 2", RoutingAttention(share=0.35, tile=4, pool=4), 2),
        Method("routing, order=content, reuse 2", RoutingAttention(share=0.35, tile=4, pool=4, order="content"), 2),
    ]
    lines = compare(painter, methods, lambda number: painter.enlarged(number, starts[number]), grid, range(10, 20))
    title = f"enlarged 256 px, image to image, 10 steps, {count} prompts"
    save(lines, "enlarged-256-px", title, decibels(lines, "clear"), output, "dB")


@app.command()
def velocity(count: Count = 8, seed: Seed = 1, output: Output = FOLDER) -> None:
    """Relative error of the model's output at 512 px, 64 x 64 tokens, at 3 steps of full attention's own path."""
    painter, grid = Painter(count, seed), TokenGrid(64, 64, before=TEXT)
    share: dict[str, Any] = {"share": 0.13}
    methods = [
        Method("clear 10%", clear_of(0.10, grid)),
        Method("clear 13%", clear_of(0.13, grid)),
        Method("halo 10%", halo_of(0.10, grid)),
        Method("clear, pool 4", clear_of(0.13, grid, pool=4)),
        Method("halo, tile 8, pool 4", halo_of(0.13, grid, (8,), pool=4)),
        Method("routing, tile 8 pool 8", RoutingAttention(**share, tile=8, pool=8)),
        Method("routing, tile 8 pool 4", RoutingAttention(**share, tile=8, pool=4)),
        Method("routing, tile 8 pool 4, query_tile 16", RoutingAttention(share=0.15, tile=8, pool=4, query_tile=16)),
        Method("routing, tile 8 pool 4, chosen_by=mean", RoutingAttention(**share, chosen_by="mean")),
        Method("routing, means=weighted", RoutingAttention(**share, tile=8, pool=4, means="weighted")),
        Method("routing, order=content", RoutingAttention(**share, tile=8, pool=4, order="content")),
        Method("routing, order=centroids", RoutingAttention(**share, tile=8, pool=4, order="centroids")),
    ]
    lines = error_lines(painter, methods, zoom=4, grid=grid)
    title = f"velocity 512 px, image to image, {count} prompts x 3 steps"
    save(lines, "velocity-512-px", title, errors(lines), output, "relative error")


def error_lines(painter: Painter, methods: Sequence[Method], zoom: int, grid: TokenGrid, **options: Any) -> list[Line]:
    """Errors of each method on full attention's own path."""
    shares = [share_of(method.mechanism, grid) for method in methods]  # refuses what the grid cannot have
    calls = painter.record(zoom, **options)
    lines = []
    for method, share in zip(methods, shares, strict=True):
        lines.append(Line(method.name, share, painter.errors(calls, zoom, method)))
        tqdm.write(lines[-1].error)
    return lines


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gather, tile 8, pool 4": ("gather", {"tile": 8, "pool": 4}),
    "gather, tile 8, pool 8": ("gather", {"tile": 8, "pool": 8}),
    "gather, tile 8, pool 4, query_tile 16": ("gather", {"tile": 8, "pool": 4, "query_tile": 16}),
    "gather, tile 8, pool 8, query_tile 16": ("gather", {"tile": 8, "pool": 8, "query_tile": 16}),
    "gather, tile 16, pool 8": ("gather", {"tile": 16, "pool": 8}),
    "flex, tile 8, pool 4": ("flex", {"tile": 8, "pool": 4}),
    "flex, tile 8, pool 8": ("flex", {"tile": 8, "pool": 8}),
    "flex, tile 8, pool 4, chosen_by=mean": ("flex", {"tile": 8, "pool": 4, "chosen_by": "mean"}),
    "gather, tile 8, pool 4, order=content, refresh=5": (
        "gather",
        {"tile": 8, "pool": 4, "order": "content", "refresh": 5},
    ),
    "flex, tile 8, pool 8, order=content, refresh=5": (
        "flex",
        {"tile": 8, "pool": 8, "order": "content", "refresh": 5},
    ),
}
CALLS = 20
"""Calls of a run, over which an order by content counts."""


@app.command()
def latency(
    side: Annotated[int, typer.Option(min=16, help="Rows and columns of the grid: a multiple of 16.")] = 128,
    share: Annotated[float, typer.Option(help="Of all pairs.")] = 0.12,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    count: Annotated[int, typer.Option(min=0, help="Held-out prompts for the error; 0: none.")] = 2,
    seed: Seed = 1,
    output: Output = FOLDER,
) -> None:
    """One call of 4 heads x 64 in float32 behind 32 text tokens, choice and blocks included, and the model's error."""
    grid = TokenGrid(side, side, before=TEXT)
    q, k, v = torch.randn(3, 1, 4, grid.tokens, 64)
    mechanisms = {}
    for name, (backend, options) in SETTINGS.items():
        try:
            mechanism = RoutingAttention(share=share, **options)
            mechanism.check(grid)
        except ValueError as error:
            tqdm.write(f"{name}: {error}")
            continue
        mechanisms[name] = mechanism, backend
    functions: dict[str, Callable[[], Any]] = {
        "full": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)
    }
    for name, (mechanism, backend) in mechanisms.items():
        functions[name] = lambda mechanism=mechanism, backend=backend: run(mechanism, backend, (q, k, v), grid)
    with torch.no_grad():
        times = time_all(functions, rounds, progress=True)
    full = times["full"]
    text = [
        f"{grid} tokens, 4 heads x 64, float32, {TEXT} text tokens, no reuse, order=space unless said; "
        f"error: of the model's output on {count} prompts x 3 steps",
        "",
        "| | share | ms (min-max) | over full | of the ideal | error |",
        "|---|---:|---:|---:|---:|---:|",
        f"| full SDPA | 1 | {full.median * 1e3:.0f} ({full.min * 1e3:.0f}-{full.max * 1e3:.0f}) | 1.0x | | 0 |",
    ]
    found = model_errors({name: mechanism for name, (mechanism, _) in mechanisms.items()}, grid, count, seed)
    lines = []
    for name, (mechanism, _) in mechanisms.items():
        own, calls = mechanism.share_on(grid), CALLS if mechanism.order != "space" else 1
        low, middle, high = (x / calls for x in (times[name].min, times[name].median, times[name].max))
        lines.append(Line(name, own, (full.min / high, full.median / middle, full.max / low)))
        text.append(
            f"| {name} | {own:.3f} | {middle * 1e3:.0f} ({low * 1e3:.0f}-{high * 1e3:.0f}) | "
            f"{full.median / middle:.1f}x | {full.median * own / middle:.0%} | {found.get(name, '')} |"
        )
    save(lines, f"latency-{side}", f"one call on {grid} tokens", text, output, "times faster than full SDPA")


def run(mechanism: RoutingAttention, backend: str, qkv: tuple[Any, Any, Any], grid: TokenGrid) -> None:
    """One call; as many as a run has, with what it keeps from one to the next, of an order by content."""
    context = diffattn.mechanisms.Context(memory={})
    for _ in range(CALLS if mechanism.order != "space" else 1):
        mechanism.attend(*qkv, grid, backend=backend, context=context)


def model_errors(mechanisms: dict[str, Mechanism], grid: TokenGrid, count: int, seed: int) -> dict[str, str]:
    """Mean error of the model's output under each mechanism, with an order by content made in the same call."""
    if count == 0:
        return {}
    painter, zoom = Painter(count, seed), grid.height // 16
    distinct = {mechanism: Method(str(mechanism), mechanism) for mechanism in mechanisms.values()}
    lines = error_lines(painter, list(distinct.values()), zoom, grid, num_inference_steps=6)
    found = {mechanism: f"{np.mean(line.values):.4f}" for mechanism, line in zip(distinct, lines, strict=True)}
    return {name: found[mechanism] for name, mechanism in mechanisms.items()}


@app.command("all")
def everything(seed: Seed = 1, output: Output = FOLDER) -> None:
    """Every table. About half an hour on 2 cores."""
    native(seed=seed, output=output)
    few_steps(seed=seed, output=output)
    enlarged(seed=seed, output=output)
    velocity(seed=seed, output=output)
    latency(side=64, seed=seed, output=output)
    latency(side=128, seed=seed, output=output)


if __name__ == "__main__":
    app()
