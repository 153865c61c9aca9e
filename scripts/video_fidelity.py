"""Video attention without training, compared on the bundled Wan pipeline: how far from full attention's own videos.

    python scripts/video_fidelity.py native           33 frames of 48 px, a quarter of all pairs
    python scripts/video_fidelity.py settings         what tile, block, order and frames kept exact do to routing
    python scripts/video_fidelity.py enlarged         four times the tokens: wall time of whole calls, and fidelity
    python scripts/video_fidelity.py all              all of these

PSNR is of each frame, between floats in 0-1 before rounding; its mean over the frames counts. Flicker is the error of
what changes from frame to frame. Shares count every pair that is computed; with reuse over all steps. The judge finds
colour, shape and motion of the caption. Each command writes Markdown, JSON and a sheet of strips into --output.
"""

import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from fidelity.filming import HEAD, Filmer, Verdict, gains
from fidelity.methods import Method, clear_of, share_of
from tqdm import tqdm

from diffattn import HaloAttention, RoutingAttention, SoftmaxAttention, TokenGrid
from diffattn.files.writing import write_json, write_text, written
from diffattn.measure import hardware, hardware_line
from diffattn.measure.strips import strips

NATIVE, ENLARGED = TokenGrid(12, 12, frames=9), TokenGrid(24, 24, frames=9)
STEPS = range(20)
TILES = ((1, 4, 4), (3, 2, 2), (3, 4, 4), (3, 6, 6), (9, 2, 2), (3, 3, 3))
"""Of halo attention: the best for the share counts."""
app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)
Count = Annotated[int, typer.Option(min=1, max=64, help="Captions that training never saw.")]
Seed = Annotated[int, typer.Option(help="Of the choice of captions; video i starts from noise of its own.")]
Share = Annotated[float, typer.Option(help="Of all pairs, at most.")]
Output = Annotated[Path, typer.Option(help="Folder.")]
FOLDER = Path("outputs/video-fidelity")


def halo_of(share: float, grid: TokenGrid, **options: Any) -> HaloAttention:
    """Halo attention of the tile and reach with the largest share that is no larger."""
    reaches = itertools.product(range(9), range(6))
    several = (
        HaloAttention(tile=tile, halo=(along, across, across), **options)
        for along, across in reaches
        for tile in TILES
        if not any(side % part for side, part in zip(tile, options.get("pool", (1, 1, 1)), strict=True))
    )
    fitting = [mechanism for mechanism in several if share_of(mechanism, grid) <= share]
    return max(fitting, key=lambda mechanism: share_of(mechanism, grid))


def compare(filmer: Filmer, methods: Sequence[Method], full: Sequence[np.ndarray], **options: Any) -> list[Verdict]:
    """Every method's videos against full attention's."""
    verdicts = []
    for method in methods:
        videos = film(filmer, method, len(full), **options)
        verdicts.append(Verdict.of(method.name, method.share(NATIVE, STEPS), videos, full, filmer.scenes))
        tqdm.write(verdicts[-1].line)
    return verdicts


def film(filmer: Filmer, method: Method | None, count: int, **options: Any) -> list[np.ndarray]:
    """The videos of the first captions under a method; None: the model's own attention."""
    name = "full attention" if method is None else method.name
    numbers = tqdm(range(count), desc=name, leave=False, disable=None)
    if method is None:
        return [filmer.film(number, **options) for number in numbers]
    with method.on(filmer.pipe):
        return [filmer.film(number, **options) for number in numbers]


def save(verdicts: Sequence[Verdict], name: str, title: str, text: Sequence[str], output: Path) -> None:
    """`name`.md with `text`, `name`.json with every value."""
    document = "\n".join([f"{title}; {hardware_line(hardware())}", "", *text]) + "\n"
    write_text(output / f"{name}.md", document)
    content = {"title": title, "machine": hardware(), "methods": [vars(verdict) for verdict in verdicts]}
    write_json(output / f"{name}.json", content)
    typer.echo(document)


@app.command()
def native(
    count: Count = 12,
    seed: Seed = 1,
    share: Share = 0.25,
    shown: Annotated[int, typer.Option(min=0, help="Of these captions, the one whose videos are drawn.")] = 0,
    output: Output = FOLDER,
) -> None:
    """33 frames of 48 px: 9 x 12 x 12 tokens, 20 steps."""
    filmer = Filmer(count, seed)
    fine: dict[str, Any] = {"tile": (2, 2, 2), "pool": (2, 2, 2)}
    methods = [
        Method("clear (ball)", clear_of(share, NATIVE)),
        Method("halo", halo_of(share, NATIVE)),
        Method("reuse 5 alone", SoftmaxAttention(), 5),
        Method("clear, pool 1x3x3", clear_of(share, NATIVE, pool=(1, 3, 3))),
        Method("halo, pool 1x4x4", halo_of(share, NATIVE, pool=(1, 4, 4))),
        Method("routing", RoutingAttention(share=share, **fine)),
        Method("routing, order=content", RoutingAttention(share=share, **fine, order="content")),
        Method("routing, order=content, reuse 2", RoutingAttention(share=0.45, **fine, order="content"), 2),
    ]
    full = film(filmer, None, count)
    verdicts = [Verdict.of("full attention", 1.0, full, full, filmer.scenes)]
    verdicts += compare(filmer, methods, full)
    text = [*HEAD, *(verdict.line for verdict in verdicts), "", *gains(verdicts[1:], "clear (ball)")]
    text += ["", *(f"- {method.name}: {method.mechanism}" for method in methods)]
    save(verdicts, "native", f"33 frames of 48 px, 20 steps, {count} captions never seen", text, output)
    drawn = [methods[number] for number in (0, 3, 5, 6)]
    draw_strips(filmer, full[shown], drawn, shown, output / "native.png")


def draw_strips(filmer: Filmer, full: np.ndarray, methods: Sequence[Method], number: int, path: Path) -> None:
    """A sheet of one caption's video by full attention, and below it by each method."""
    found = {}
    for method in methods:
        with method.on(filmer.pipe):
            found[method.name] = filmer.film(number)
    note = "Small maps: largest difference of a channel to full attention."
    with written(path) as place:
        strips(full, found, name="full attention", note=note).save(place)


@app.command()
def settings(count: Count = 6, seed: Seed = 1, share: Share = 0.25, output: Output = FOLDER) -> None:
    """Routing with other tiles, blocks, orders and choices, at one share."""
    filmer = Filmer(count, seed)
    block: dict[str, Any] = {"tile": (3, 2, 2), "pool": (3, 2, 2)}
    several: dict[str, dict[str, Any]] = {
        "tile 1x8x8, pool 1x4x4 (default)": {},
        "tile 1x4x4": {"tile": (1, 4, 4), "pool": (1, 4, 4)},
        "tile 1x3x3": {"tile": (1, 3, 3), "pool": (1, 3, 3)},
        "tile 3x4x4, pool 3x2x2": {"tile": (3, 4, 4), "pool": (3, 2, 2)},
        "tile 9x2x2": {"tile": (9, 2, 2), "pool": (9, 2, 2)},
        "tile 3x2x2": block,
        "tile 3x2x2, chosen_by=mean": {**block, "chosen_by": "mean"},
        "tile 3x2x2, query_tile 1x2x2": {**block, "query_tile": (1, 2, 2)},
        "tile 3x2x2, order=content": {**block, "order": "content"},
        "tile 3x2x2, order=content, query_tile 1x2x2": {**block, "order": "content", "query_tile": (1, 2, 2)},
    }
    methods = [Method(name, RoutingAttention(share=share, **options)) for name, options in several.items()]
    most = RoutingAttention(share=1.8 * share, **block)
    methods.append(Method("tile 3x2x2, reuse 2", most, 2))
    methods.append(Method("tile 3x2x2, reuse 2, first frame exact", most, 2, exact_frames=(1, 0)))
    methods.insert(0, Method("clear (ball)", clear_of(share, NATIVE)))
    full = film(filmer, None, count)
    verdicts = compare(filmer, methods, full)
    text = [*HEAD, *(verdict.line for verdict in verdicts), "", *gains(verdicts, "clear (ball)")]
    save(verdicts, "settings", f"settings of routing, {count} captions never seen", text, output)


@app.command()
def enlarged(
    count: Count = 2,
    seed: Seed = 1,
    share: Share = 0.15,
    rounds: Annotated[int, typer.Option(min=1, help="Calls timed of each, in turn.")] = 3,
    output: Output = FOLDER,
) -> None:
    """33 frames of 96 px: 9 x 24 x 24 tokens; whole pipeline calls, full and routing in turn."""
    filmer = Filmer(count, seed)
    filmer.spread(2)
    size = {"height": 96, "width": 96}
    near, fast = RoutingAttention(share=share), RoutingAttention(share=share, pool=(1, 8, 8))
    content = RoutingAttention(share=0.25, order="content", refresh=5, chosen_by="mean")
    methods: dict[str, Method | None] = {
        "full attention": None,
        "routing": Method("routing", near),
        "routing, reuse 2": Method("routing, reuse 2", near, 2),
        "routing, pool 1x8x8": Method("routing, pool 1x8x8", fast),
        "routing, pool 1x8x8, reuse 2": Method("routing, pool 1x8x8, reuse 2", fast, 2),
        "routing, order=content, reuse 3": Method("routing, order=content, reuse 3", content, 3),
    }
    for method in methods.values():  # compiles
        film(filmer, method, 1, **size, num_inference_steps=2)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            start = time.perf_counter()
            film(filmer, method, 1, **size)
            seconds[name].append(time.perf_counter() - start)
    full = film(filmer, None, count, **size)
    clear = Method("clear (ball)", clear_of(share, ENLARGED))
    verdicts = []
    for other in [method for method in [*methods.values(), clear] if method is not None]:
        videos = film(filmer, other, count, **size)
        verdicts.append(Verdict.of(other.name, other.share(ENLARGED, STEPS), videos, full, filmer.scenes))
    base = statistics.median(seconds["full attention"])
    text = ["| | seconds (min-max) | over full |", "|---|---:|---:|"]
    for name, values in seconds.items():
        middle = statistics.median(values)
        text.append(f"| {name} | {middle:.1f} ({min(values):.1f}-{max(values):.1f}) | {base / middle:.2f}x |")
    text += ["", *HEAD, *(verdict.line for verdict in verdicts), "", f"routing: {near}; by content: {content}"]
    save(verdicts, "enlarged", f"33 frames of 96 px, 20 steps, {rounds} rounds, {count} captions", text, output)


@app.command("all")
def everything(seed: Seed = 1, output: Output = FOLDER) -> None:
    """Every table."""
    native(seed=seed, output=output)
    settings(seed=seed, output=output)
    enlarged(seed=seed, output=output)


if __name__ == "__main__":
    app()
