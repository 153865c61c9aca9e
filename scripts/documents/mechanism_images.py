"""The images of the mechanisms' pages: where the output of one query comes from, in a layer of a bundled pipeline.

For softmax attention that is the softmax. In general it is how much the output changes with the value of each cell:

    w_j = sum_c |d out_q,0 / d v_j,c|        for one head's query q

by the same queries, keys and values for all, those of full attention in one layer and step of a run.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline, WanPipeline
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from diffattn import config, tiny
from diffattn.measure.cost import as_in_a_model
from diffattn.measure.watching import Caught, watch
from diffattn.mechanisms import Mechanism, SoftmaxAttention
from scripts.documents.mechanism_words import WORDS

FLOOR = -4.0
"""The least weight that is drawn, in decades."""
QUERY = "white"
HEAD = 1
CELL = {"flux": (0, 6, 8), "wan": (4, 6, 6)}
"""The query: frame, row, column."""
LARGEST = 40_000
"""Bytes of an image."""


def caught(model: str) -> tuple[np.ndarray, Caught]:
    """The frames that a bundled pipeline draws, (frames, height, width, 3), and a call of its middle layer and step."""
    pipeline, prompt = {
        "flux": (FluxPipeline, "a red circle at the top left on a blue background"),
        "wan": (WanPipeline, "a red circle moving sideways on a blue background"),
    }[model]
    pipe = pipeline.from_pretrained(tiny.path(model))
    pipe.set_progress_bar_config(disable=True)
    call = tiny.defaults(model) | {"generator": torch.Generator().manual_seed(0)}

    def run() -> Any:
        drawn = pipe(prompt, **call)
        return np.stack([np.asarray(drawn.images[0])]) if model == "flux" else np.asarray(drawn.frames[0])

    return watch(pipe, SoftmaxAttention(), run, head=HEAD)


def weights(mechanism: Mechanism, found: Caught, token: int) -> np.ndarray:
    """w of every cell, `(frames, rows, columns)`, of the first sample."""
    q, k, v = (x[:1].detach().double() for x in (found.q, found.k, found.v))
    v.requires_grad_()
    torch.manual_seed(0)
    context = as_in_a_model(mechanism, q)
    if context.weights is not None:
        context.weights.double()
    out = mechanism.reference(q, k, v, found.grid, scale=found.scale, context=context)
    (slope,) = torch.autograd.grad(out[0, HEAD, token, 0], v)
    return slope[0, HEAD].abs().sum(-1)[found.grid.cell_slice].reshape(found.grid.shape).numpy()


def figure(frames: np.ndarray, full: np.ndarray, own: np.ndarray, name: str, cell: tuple[int, int, int]) -> Figure:
    """Columns: the image, full attention, the mechanism. Of a clip these are rows, and its frames the columns."""
    count = len(full)
    drawn = Figure(figsize=(9.6, 3.5) if count == 1 else (9.6, 3.6), layout="constrained", dpi=90)
    axes = drawn.subplots(1, 3, squeeze=False).T if count == 1 else drawn.subplots(3, count)
    shown = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    for row, (values, title) in enumerate(((shown, "the image"), (full, "full attention"), (own, name))):
        for number in range(count):
            panel = axes[row, number]
            side = (-0.5, full.shape[2] - 0.5, full.shape[1] - 0.5, -0.5)
            logs = values[number] if row == 0 else np.log10(np.maximum(values[number], 10**FLOOR))
            panel.imshow(logs, extent=side, cmap="magma", vmin=FLOOR, vmax=0, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            if number == cell[0]:
                box = Rectangle((cell[2] - 0.5, cell[1] - 0.5), 1, 1, fill=False, edgecolor=QUERY, linewidth=2)
                panel.add_patch(box)
            if count == 1:
                panel.set_title(title, fontsize=12)
            elif number == 0:
                panel.set_ylabel("the clip" if row == 0 else title, fontsize=11)
    return drawn


def save(drawn: Figure, file: Path) -> None:
    """A PNG of few colours."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png")
    Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)
    if file.stat().st_size > LARGEST:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, expected at most {LARGEST}")


def draw_all(folder: Path) -> None:
    """An image for every mechanism."""
    for model in ("flux", "wan"):
        frames, found = caught(model)
        cell, grid = CELL[model], found.grid
        token = grid.before + (cell[0] * grid.height + cell[1]) * grid.width + cell[2]
        full = weights(SoftmaxAttention(), found, token)
        for name, words in WORDS.items():
            if words.video == (model == "wan"):
                own = weights(config.create(name, **words.shown), found, token)
                save(
                    figure(frames / 255 if frames.max() > 1 else frames, full, own, name, cell), folder / f"{name}.png"
                )
