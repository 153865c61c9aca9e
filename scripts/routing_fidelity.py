"""Attention without training, compared on the bundled pipeline: how far the images are from full attention's own.

    python scripts/routing_fidelity.py native             text to image at 128 px, 20 steps
    python scripts/routing_fidelity.py enlarged           image to image at 256 px, 10 steps, from the native image
    python scripts/routing_fidelity.py velocity           error of the output at 512 px, on full attention's path
    python scripts/routing_fidelity.py few-steps          text to image in 4 and in 8 steps
    python scripts/routing_fidelity.py latency            one attention call, beside full SDPA in the same rounds

PSNR is between float images in 0-1, before rounding. Shares count every pair that is computed; with reuse over all
steps. Each command writes Markdown, JSON and a plot into --output.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from PIL import Image
from tqdm import tqdm

import diffattn
from diffattn import ClearAttention, HaloAttention, Mechanism, RoutingAttention, TokenGrid, tiny
from diffattn.files.writing import write_json, write_text, written
from diffattn.measure import hardware, hardware_line, latency, psnr
from diffattn.media.drawing import figure_class
from diffattn.tiny.shapes import caption, held_out_scenes

TEXT = 32
"""Text tokens of the bundled pipeline."""
app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True)
Count = Annotated[int, typer.Option(help="Held-out prompts.")]
Seed = Annotated[int, typer.Option(help="Of the choice of prompts; image i starts from noise of its own.")]
Output = Annotated[Path, typer.Option(help="Folder.")]


@dataclass(frozen=True)
class Method:
    """One row: a mechanism, and in how many steps it is computed."""

    name: str
    mechanism: Any
    """Of `apply`; None: full attention."""
    reuse: int = 1


@dataclass(frozen=True)
class Line:
    """What one method came to."""

    name: str
    share: float
    values: tuple[float, ...]
    """PSNR in dB of each image, or a relative error of each call."""


def clear_of(share: float, grid: TokenGrid) -> ClearAttention:
    """CLEAR with the radius whose share is nearest."""
    return _nearest((ClearAttention(radius=radius / 10) for radius in range(10, 10 * grid.height)), share, grid)


def halo_of(share: float, grid: TokenGrid) -> HaloAttention:
    """Halo attention of the tile and radius whose share is nearest."""
    several = (HaloAttention(tile=tile, radius=r / 2) for tile in (2, 4, 8) for r in range(3, 2 * grid.height))
    return _nearest(several, share, grid)


def _nearest(several: Iterator[Any], share: float, grid: TokenGrid) -> Any:
    return min(several, key=lambda mechanism: abs(share_of(mechanism, grid) - share))


def share_of(mechanism: Mechanism, grid: TokenGrid) -> float:
    """Pairs that a mechanism computes over all."""
    if isinstance(mechanism, RoutingAttention):
        return mechanism.share_on(grid)
    pattern = mechanism.pattern(grid)
    if pattern is not None:
        return (pattern.pairs(grid) + grid.tokens**2 - grid.cells**2) / grid.tokens**2
    return mechanism.flops(grid, 1, 64) / (4 * 64 * grid.tokens**2)


class Painter:
    """Draws with the bundled pipeline; positions of larger images are scaled to those of training."""

    def __init__(self, count: int, seed: int) -> None:
        self.text_to_image = FluxPipeline.from_pretrained(tiny.path("flux"))
        self.image_to_image = FluxImg2ImgPipeline(**self.text_to_image.components)
        for pipe in (self.text_to_image, self.image_to_image):
            pipe.set_progress_bar_config(disable=True)
        self.prompts = [caption(scene) for scene in held_out_scenes(count, seed=seed)]
        self.zoom = 1
        self.text_to_image.transformer.pos_embed.register_forward_pre_hook(lambda _, args: (args[0] / self.zoom,))

    def native(self, number: int, **options: Any) -> np.ndarray:
        """One image, float (128, 128, 3)."""
        call = {**tiny.defaults("flux"), **options}
        generator = torch.Generator().manual_seed(number)
        image: np.ndarray = self.text_to_image(
            self.prompts[number], generator=generator, output_type="np", **call
        ).images[0]
        return image

    def enlarged(self, number: int, native: np.ndarray, zoom: int = 2) -> np.ndarray:
        """The native image enlarged and drawn over from half of the noise steps on."""
        side = 128 * zoom
        start = Image.fromarray((native * 255).round().astype(np.uint8)).resize((side, side), Image.Resampling.LANCZOS)
        call = {**tiny.defaults("flux"), "height": side, "width": side, "strength": 0.5, "image": start}
        self.zoom = zoom
        try:
            generator = torch.Generator().manual_seed(100 + number)
            image: np.ndarray = self.image_to_image(
                self.prompts[number], generator=generator, output_type="np", **call
            ).images[0]
        finally:
            self.zoom = 1
        return image

    @contextlib.contextmanager
    def swapped(self, method: Method) -> Iterator[Callable[[], float]]:
        """The pipelines under a method; tells the share of the attention that the last run computed."""
        if method.mechanism is None:
            yield lambda: 1.0
            return
        with diffattn.apply(self.image_to_image, method.mechanism, reuse=method.reuse):
            yield lambda: 0.0


def compare(
    painter: Painter,
    methods: Sequence[Method],
    draw: Callable[[int], np.ndarray],
    grid: TokenGrid,
    steps: Sequence[int],
) -> list[Line]:
    """PSNR of each method's images to full attention's."""
    numbers = range(len(painter.prompts))
    full = [draw(number) for number in tqdm(numbers, desc="full attention", disable=None)]
    lines = []
    for method in methods:
        with painter.swapped(method):
            images = [draw(number) for number in tqdm(numbers, desc=method.name, leave=False, disable=None)]
        computed = sum(step % method.reuse == 0 or step in (steps[0], steps[-1]) for step in steps) / len(steps)
        own = 1.0 if isinstance(method.mechanism, diffattn.SoftmaxAttention) else share_of(method.mechanism, grid)
        values = tuple(min(psnr(one, other), 120.0) for one, other in zip(images, full, strict=True))
        lines.append(Line(method.name, own * computed, values))
        tqdm.write(text_of(lines[-1]))
    return lines


def text_of(line: Line) -> str:
    """One row of the table."""
    values = np.array(line.values)
    return (
        f"| {line.name} | {line.share:.3f} | {np.median(values):.1f} | {values.mean():.1f} | {values.min():.1f}-"
        f"{values.max():.1f} |"
    )


def save(lines: Sequence[Line], title: str, output: Path, base: str | None = None) -> None:
    """Markdown, JSON and a plot."""
    name = title.split(",")[0].replace(" ", "-")
    head = ["| | share | median | mean | min-max |", "|---|---:|---:|---:|---:|"]
    text = [f"{title}; {hardware_line(hardware())}", "", *head, *map(text_of, lines)]
    if base is not None:
        first = np.array(next(line.values for line in lines if line.name.startswith(base)))
        text += ["", f"| gain over {base} | mean | median | worst |", "|---|---:|---:|---:|"]
        for line in lines:
            gain = np.array(line.values) - first
            text.append(f"| {line.name} | {gain.mean():+.1f} | {np.median(gain):+.1f} | {gain.min():+.1f} |")
    write_text(output / f"{name}.md", "\n".join(text) + "\n")
    write_json(
        output / f"{name}.json", {"title": title, "machine": hardware(), "lines": [asdict(line) for line in lines]}
    )
    figure = figure_class()(figsize=(9, 0.4 * len(lines) + 1.5), layout="constrained", dpi=110)
    axes = figure.subplots()
    axes.boxplot([line.values for line in lines], orientation="horizontal", whis=(0, 100))
    axes.set_yticks(range(1, len(lines) + 1), [f"{line.name}, {line.share:.0%}" for line in lines])
    axes.invert_yaxis()
    axes.set_title(title)
    with written(output / f"{name}.png") as path:
        figure.savefig(path)
    typer.echo("\n".join(text))


@app.command()
def native(count: Count = 16, seed: Seed = 1, output: Output = Path("outputs/fidelity")) -> None:
    """Text to image at 128 px: 16 x 16 tokens and 32 of text."""
    painter, grid = Painter(count, seed), TokenGrid(16, 16, before=TEXT)
    half = {"share": 0.51, "tile": 2, "pool": 2}
    methods = [
        Method("clear", clear_of(0.5, grid)),
        Method("halo", halo_of(0.5, grid)),
        Method("agent", diffattn.AgentAttention(num_agents=64)),
        Method("token_merge", diffattn.TokenMergeAttention(ratio=0.35, proportional=True, use_rand=False)),
        Method("reuse 2 alone", diffattn.SoftmaxAttention(), 2),
        Method("reuse 3 alone", diffattn.SoftmaxAttention(), 3),
        Method("reuse 4 alone", diffattn.SoftmaxAttention(), 4),
        Method("routing", RoutingAttention(**half)),
        Method("routing, order=content", RoutingAttention(**half, order="content")),
        Method("routing, tile 4 pool 2", RoutingAttention(share=0.51, tile=4, pool=2)),
        Method("routing, reuse 2", RoutingAttention(share=0.47, tile=2, pool=2), 2),
    ]
    lines = compare(painter, methods, painter.native, grid, range(20))
    save(lines, f"native 128 px, text to image, 20 steps, {count} prompts", output, "clear")


@app.command("few-steps")
def few_steps(count: Count = 16, seed: Seed = 1, output: Output = Path("outputs/fidelity")) -> None:
    """Text to image at 128 px in 4 and in 8 steps."""
    painter, grid = Painter(count, seed), TokenGrid(16, 16, before=TEXT)
    methods = [
        Method("clear", clear_of(0.5, grid)),
        Method("reuse 2 alone", diffattn.SoftmaxAttention(), 2),
        Method("routing", RoutingAttention(share=0.51, tile=2, pool=2)),
        Method("routing, reuse 2", RoutingAttention(share=0.51, tile=2, pool=2), 2),
    ]
    for steps in (4, 8):
        draw = lambda number, steps=steps: painter.native(number, num_inference_steps=steps)  # noqa: E731
        lines = compare(painter, methods, draw, grid, range(steps))
        save(lines, f"{steps} steps, native 128 px, text to image, {count} prompts", output, "clear")


@app.command()
def enlarged(count: Count = 16, seed: Seed = 1, output: Output = Path("outputs/fidelity")) -> None:
    """Image to image at 256 px: 32 x 32 tokens and 32 of text, from the native image enlarged."""
    painter, grid = Painter(count, seed), TokenGrid(32, 32, before=TEXT)
    fifth = {"share": 0.21, "tile": 4, "pool": 4}
    starts = [painter.native(number) for number in range(count)]
    methods = [
        Method("clear", clear_of(0.205, grid)),
        Method("halo", halo_of(0.205, grid)),
        Method("agent", diffattn.AgentAttention(num_agents=100)),
        Method("token_merge", diffattn.TokenMergeAttention(ratio=0.6, proportional=True, use_rand=False)),
        Method("reuse 5 alone", diffattn.SoftmaxAttention(), 5),
        Method("routing", RoutingAttention(**fifth)),
        Method("routing, order=content", RoutingAttention(**fifth, order="content")),
        Method("routing, order=content, query_tile 2", RoutingAttention(**fifth, order="content", query_tile=2)),
        Method("routing, reuse 2", RoutingAttention(share=0.35, tile=4, pool=4), 2),
        Method("routing, order=content, reuse 2", RoutingAttention(share=0.35, tile=4, pool=4, order="content"), 2),
    ]
    lines = compare(painter, methods, lambda number: painter.enlarged(number, starts[number]), grid, range(10, 20))
    save(lines, f"enlarged 256 px, image to image, 10 steps, {count} prompts", output, "clear")


@app.command()
def velocity(count: Count = 8, seed: Seed = 1, output: Output = Path("outputs/fidelity")) -> None:
    """Relative error of the model's output at 512 px, 64 x 64 tokens, at 3 steps of full attention's own path."""
    painter, grid = Painter(count, seed), TokenGrid(64, 64, before=TEXT)
    methods = [
        Method("clear 10%", clear_of(0.10, grid)),
        Method("clear 13%", clear_of(0.13, grid)),
        Method("routing, tile 8 pool 8", RoutingAttention(share=0.13, tile=8, pool=8)),
        Method("routing, tile 8 pool 4", RoutingAttention(share=0.13, tile=8, pool=4)),
        Method("routing, tile 8 pool 4, query_tile 16", RoutingAttention(share=0.13, tile=8, pool=4, query_tile=16)),
        Method("routing, order=content", RoutingAttention(share=0.13, tile=8, pool=4, order="content")),
    ]
    calls = record(painter, count)
    transformer, lines = painter.text_to_image.transformer, []
    painter.zoom = 4
    for method in methods:
        with diffattn.apply(transformer, method.mechanism), torch.no_grad():
            errors = []
            for call, want in tqdm(calls, desc=method.name, leave=False, disable=None):
                got = transformer(**call)[0]
                errors.append(float((got - want).norm() / want.norm()))
        lines.append(Line(method.name, share_of(method.mechanism, grid), tuple(errors)))
        tqdm.write(f"{method.name}: share {lines[-1].share:.3f}, error {np.mean(errors):.4f}")
    name = f"velocity 512 px, image to image, {count} prompts x 3 steps"
    rows = [
        f"| {line.name} | {line.share:.3f} | {np.mean(line.values):.4f} | {max(line.values):.4f} |" for line in lines
    ]
    text = [
        f"{name}; {hardware_line(hardware())}",
        "",
        "| | share | mean error | worst |",
        "|---|---:|---:|---:|",
        *rows,
    ]
    write_text(output / "velocity.md", "\n".join(text) + "\n")
    write_json(
        output / "velocity.json", {"title": name, "machine": hardware(), "lines": [asdict(line) for line in lines]}
    )
    typer.echo("\n".join(text))


def record(painter: Painter, count: int) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """Arguments and outputs of the model at the first, a middle and the last step of full attention's runs."""
    found: list[tuple[dict[str, Any], torch.Tensor]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        found.append((dict(kwargs), out[0]))

    calls = []
    for number in tqdm(range(count), desc="full attention"):
        start = painter.native(number)
        hook = painter.text_to_image.transformer.register_forward_hook(note, with_kwargs=True)
        painter.enlarged(number, start, zoom=4)
        hook.remove()
        calls += [found[0], found[len(found) // 2], found[-1]]
        found.clear()
    return calls


@app.command("latency")
def latency_(
    side: Annotated[int, typer.Option(help="Rows and columns of the grid.")] = 128,
    share: Annotated[float, typer.Option(help="Of all pairs.")] = 0.12,
    rounds: Annotated[int, typer.Option()] = 5,
    output: Output = Path("outputs/fidelity"),
) -> None:
    """One call of 4 heads x 64 in float32 behind 32 text tokens, choice and blocks included."""
    grid = TokenGrid(side, side, before=TEXT)
    q, k, v = torch.randn(3, 1, 4, grid.tokens, 64)
    settings = {
        "tile 8, pool 4": {"tile": 8, "pool": 4},
        "tile 8, pool 8": {"tile": 8, "pool": 8},
        "tile 8, pool 4, query_tile 16": {"tile": 8, "pool": 4, "query_tile": 16},
        "tile 8, pool 8, query_tile 16": {"tile": 8, "pool": 8, "query_tile": 16},
        "tile 16, pool 8": {"tile": 16, "pool": 8},
    }
    mechanisms = {name: RoutingAttention(share=share, **options) for name, options in settings.items()}
    functions: dict[str, Callable[[], Any]] = {
        "full": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)
    }
    for name, mechanism in mechanisms.items():
        functions[name] = lambda mechanism=mechanism: mechanism.attend(q, k, v, grid)
    with torch.no_grad():
        times = latency(functions, rounds, progress=True)
    full = times["full"].median
    text = [
        f"{grid} tokens, 4 heads x 64, float32, backend gather; {hardware_line(hardware())}",
        "",
        "| | share | ms (min-max) | over full | of the ideal |",
        "|---|---:|---:|---:|---:|",
        f"| full SDPA | 1 | {full * 1e3:.0f} ({times['full'].min * 1e3:.0f}-{times['full'].max * 1e3:.0f}) | 1.0x | |",
    ]
    for name, mechanism in mechanisms.items():
        own, time = mechanism.share_on(grid), times[name]
        text.append(
            f"| {name} | {own:.3f} | {time.median * 1e3:.0f} ({time.min * 1e3:.0f}-{time.max * 1e3:.0f}) | "
            f"{full / time.median:.1f}x | {full * own / time.median:.0%} |"
        )
    write_text(output / f"latency-{side}.md", "\n".join(text) + "\n")
    typer.echo("\n".join(text))


if __name__ == "__main__":
    app()
