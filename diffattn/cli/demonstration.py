"""The demonstration: the same prompts and seeds by full and by efficient attention, on one sheet and in one table."""

import importlib.util
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.table import Table
from tqdm.auto import tqdm

from diffattn.files.writing import write_json, written
from diffattn.measure import Timing, hardware, hardware_line, psnr, ssim, synchronize
from diffattn.measure.progress import bar_options
from diffattn.mechanisms import AgentAttention, ClearAttention, Mechanism, RoutingAttention, SoftmaxAttention
from diffattn.media.drawing import Entry, error_map, sheet
from diffattn.swap.apply import apply
from diffattn.swap.report import summary
from diffattn.tiny.shapes import caption, held_out_scenes

from .checkpoints import native_call
from .large import Large
from .large import save as save_large

logger = logging.getLogger("diffattn")

FULL = "full"


@dataclass(frozen=True)
class Method:
    """What a column is made with."""

    mechanism: Mechanism
    reuse: int = 1
    untrained: bool = False
    """Is it meant for models without trained weights? Then it has its place on the second sheet."""


@dataclass
class Column:
    """What one method made: an image per prompt."""

    name: str
    method: Method | None
    """None for the model's own attention."""
    pictures: list[Image.Image] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    share: float = 1.0
    """Operations of its attention over those of full attention, in the swapped layers and all steps."""
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)

    @property
    def timing(self) -> Timing:
        return Timing(tuple(self.seconds))

    def to_dict(self) -> dict[str, Any]:
        """What was measured; an infinite PSNR, of equal images, as None."""
        return {
            "method": self.name,
            "mechanism": self.method.mechanism.to_dict() if self.method else None,
            "reuse": self.method.reuse if self.method else 1,
            "time_per_picture": self.timing.to_dict(),
            "attention_share": self.share,
            "psnr_db": [value if math.isfinite(value) else None for value in self.psnr],
            "ssim": self.ssim or None,
        }


@dataclass
class Demo:
    """All columns; the first is full attention."""

    prompts: list[str]
    columns: list[Column]
    restored: bool
    """Was the first image bit-identical when it was made again after `restore`?"""
    machine: dict[str, Any]
    call: dict[str, Any]
    seed: int
    elapsed: float
    large: Large | None = None

    def of_sheet(self, untrained: bool) -> list[Column]:
        """Full attention and the methods of one sheet."""
        full, *others = self.columns
        return [full, *(column for column in others if column.method and column.method.untrained == untrained)]

    @property
    def faster(self) -> bool:
        """Is some method's slowest image faster than full attention's fastest?"""
        full, *others = self.columns
        return any(column.timing.max < full.timing.min for column in others)

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "seed": self.seed,
            "call": {key: value for key, value in self.call.items() if isinstance(value, (int, float, str))},
            "methods": [column.to_dict() for column in self.of_sheet(untrained=False)],
            "without_training": [column.to_dict() for column in self.of_sheet(untrained=True)[1:]],
            "restored_bit_identical": self.restored,
            "hardware": self.machine,
            "elapsed_s": self.elapsed,
            "large": None if self.large is None else self.large.to_dict(),
        }


def default_methods(model: str, radii: Sequence[float]) -> dict[str, Method]:
    """CLEAR at each radius, and agent attention; then what needs no training."""
    trained = {f"CLEAR radius {radius:g}": Method(ClearAttention(radius=radius)) for radius in radii}
    trained["agent"] = Method(AgentAttention())
    small = bool(native_call(model))  # 16 x 16 tokens
    window = ClearAttention(radius=2 if small else 8, pool=2 if small else 4)
    routing = RoutingAttention(share=0.51, tile=2, pool=2) if small else RoutingAttention(top_k=4)
    untrained = {
        "CLEAR, pool": Method(window, untrained=True),
        "reuse 2": Method(SoftmaxAttention(), reuse=2, untrained=True),
        "routing": Method(routing, untrained=True),
        "routing, reuse": Method(routing, reuse=2, untrained=True),
    }
    return {**trained, **untrained}


def default_prompts(model: str) -> list[str]:
    """Captions that the bundled pipeline was not trained on; for other models, `ValueError`."""
    if not native_call(model):
        raise ValueError(f"say what {model} shall draw: --prompt '...', repeatable")
    return [caption(scene) for scene in held_out_scenes(4)]


def run(
    pipe: Any,
    prompts: Sequence[str],
    methods: dict[str, Method],
    *,
    seed: int = 0,
    call: dict[str, Any],
    progress: bool = False,
) -> Demo:
    """Make every image with every method, prompt by prompt, so that all methods meet the same state of the machine.

    Each method is tried once with two steps first, which is not timed. `call` holds further arguments of the pipeline.
    """
    start = time.perf_counter()
    columns = [Column(FULL, None), *(Column(name, method) for name, method in methods.items())]
    pipe.set_progress_bar_config(disable=True)

    def draw(prompt: int, steps: int | None = None) -> Image.Image:
        generator = torch.Generator("cpu").manual_seed(seed + prompt)
        options = call if steps is None else {**call, "num_inference_steps": steps}
        picture: Image.Image = pipe(prompts[prompt], generator=generator, **options).images[0]
        return picture

    with tqdm(total=len(columns) * (len(prompts) + 1) + 1, desc="images", **bar_options(progress)) as bar:
        for column in columns:
            swapped(pipe, column, partial(draw, 0, steps=2))
            bar.update()
        for prompt in range(len(prompts)):
            for column in columns:
                picture, seconds = swapped(pipe, column, partial(draw, prompt))
                column.pictures.append(picture)
                column.seconds.append(seconds)
                bar.update()
        restored = np.array_equal(np.asarray(draw(0)), np.asarray(columns[0].pictures[0]))
        bar.update()
    compare(columns)
    machine = hardware(pipe.device)
    return Demo(list(prompts), columns, restored, machine, call, seed, time.perf_counter() - start)


def swapped(pipe: Any, column: Column, make: Callable[[], Any]) -> tuple[Any, float]:
    """`make()` and its seconds with the column's mechanism in place; restores the pipeline."""
    method = column.method
    handle = apply(pipe, method.mechanism, reuse=method.reuse) if method else None
    try:
        synchronize(pipe.device)
        start = time.perf_counter()
        result = make()
        synchronize(pipe.device)
        seconds = time.perf_counter() - start
        if handle:
            report = summary(pipe)
            column.share = report.computed or report.share or 1.0
    finally:
        if handle:
            handle.restore()
    return result, seconds


def compare(columns: Sequence[Column]) -> None:
    """Fill in PSNR, and SSIM where torchmetrics is installed, of every image to the first column's."""
    has_ssim = importlib.util.find_spec("torchmetrics") is not None
    if not has_ssim:
        logger.info('no SSIM: pip install "diffattn[metrics]"')
    for column in columns:
        pairs = list(zip(column.pictures, columns[0].pictures, strict=True))
        column.psnr = [psnr(a, b) for a, b in pairs]
        column.ssim = [ssim(np.asarray(a), np.asarray(b)) for a, b in pairs] if has_ssim else []


def draw_sheet(demo: Demo, untrained: bool) -> Image.Image:
    """Rows are prompts, columns are methods; below each image its distance to full attention's."""
    columns = demo.of_sheet(untrained)
    full = columns[0]
    rows = []
    for number in range(len(demo.prompts)):
        row = [Entry(full.pictures[number], ("reference",))]
        for column in columns[1:]:
            lines = [f"PSNR {_decibel(column.psnr[number])}"]
            lines += [f"SSIM {column.ssim[number]:.3f}"] if column.ssim else []
            lines.append(f"{column.seconds[number]:.2f} s")
            row.append(
                Entry(column.pictures[number], tuple(lines), error_map(column.pictures[number], full.pictures[number]))
            )
        rows.append(row)
    labels = [f"{column.name}\n{column.share:.0%} of the attention" for column in columns]
    same = "bit-identical" if demo.restored else "NOT IDENTICAL"
    note = f"Small maps: largest difference of a channel to full attention. First image after restore: {same}."
    title = f"One pipeline, {len(columns)} attentions: same weights, same seeds"
    title += ", no training" if untrained else ""
    return sheet(rows, demo.prompts, labels, title=title, note=note)


def table(demo: Demo) -> Table:
    """The methods beside each other: medians over the prompts of seconds per image and distance to full attention."""
    result = Table(caption=hardware_line(demo.machine), caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    result.add_column("method", no_wrap=True)
    for head in ("seconds", "min-max", "speed-up", "attention", "PSNR dB", "SSIM"):
        result.add_column(head, justify="right", no_wrap=True)
    full = demo.columns[0]
    for column in demo.columns:
        timing = column.timing
        result.add_row(
            column.name,
            f"{timing.median:.2f}",
            f"{timing.min:.2f}-{timing.max:.2f}",
            f"{full.timing.median / timing.median:.2f}x",
            f"{column.share:.1%}",
            "-" if column is full else f"{statistics.median(column.psnr):.1f}",
            f"{statistics.median(column.ssim):.3f}" if column.ssim and column is not full else "-",
        )
    return result


def remarks(demo: Demo) -> list[str]:
    """What the numbers mean, a sentence each."""
    same = "bit-identical" if demo.restored else "NOT identical: please report this"
    sentences = [f"After restore the first image is {same}."]
    if not demo.faster:
        sentences.append(
            "No speedup at this size, and none is to be expected: attention is a small part of the work. What is "
            "saved here is the share of attention; the gain comes with the size."
        )
    sentences.append(
        "The weights were trained with full attention. Without training, routing and reuse stay near its images; for "
        "the others there are adapters (diffattn.load)."
    )
    return sentences


def save(demo: Demo, folder: Path) -> list[Path]:
    """Write `sheet.png`, `without-training.png`, `large.png` where there is a large image, and `demo.json`."""
    files = {folder / "sheet.png": False, folder / "without-training.png": True}
    for file, untrained in files.items():
        with written(file) as path:
            draw_sheet(demo, untrained).save(path)
    large = [] if demo.large is None else [save_large(demo.large, folder)]
    return [*files, *large, write_json(folder / "demo.json", demo.to_dict())]


def _decibel(value: float) -> str:
    return "infinite" if math.isinf(value) else f"{value:.1f} dB"
