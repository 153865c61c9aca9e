"""The demonstration's second half: one large image, by full attention and by a level of `routing`.

    small = text_to_image(prompt)                       at the size of training, by full attention
    image = image_to_image(prompt, enlarge(small))      at the large size, once by each, from the same noise

It is the last stage of `diffattn.generate_large`, made twice. Positions of the bundled pipeline are scaled to those of
training, for it has never seen others.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..files.writing import written
from ..highres import image_to_image
from ..measure import psnr, synchronize
from ..media.drawing import Entry, error_map, sheet
from ..swap.apply import apply
from ..swap.report import summary

SIDE, STEPS, STRENGTH, QUALITY = 1024, 6, 0.2, "balanced"
"""At more strength the bundled model, trained at 128 px, loses what it is to draw, by full attention too."""
NAME = "large.png"


@dataclass(frozen=True)
class Large:
    """One large image by full attention and by `routing`, each in one whole call of the pipeline."""

    prompt: str
    side: int
    steps: int
    quality: str
    full: Image.Image
    own: Image.Image
    seconds_full: float
    seconds: float
    first: float
    """Seconds of the level's first call, of one step, in which its kernels are compiled; not in `seconds`."""
    psnr: float
    computed: float

    @property
    def speedup(self) -> float:
        """Of the whole call."""
        return self.seconds_full / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """What was measured."""
        values = {name: value for name, value in vars(self).items() if name not in ("full", "own")}
        return {**values, "speedup": self.speedup}

    @property
    def lines(self) -> list[str]:
        """For the terminal; the last is the one to tell."""
        return [
            f"At {self.side} px, {self.steps} steps from the small image: {self.seconds_full:.1f} s by full attention,",
            f"{self.seconds:.1f} s by routing at quality={self.quality!r}, which computes {self.computed:.1%} of it "
            f"(first call, kernels compiled: {self.first:.1f} s).",
            f"{self.speedup:.1f}x faster, the same image to {self.psnr:.1f} dB, nothing trained: "
            f'diffattn.apply(pipe, "routing", quality="{self.quality}")',
        ]

    def draw(self) -> Image.Image:
        """Both images, and where they differ."""
        text = (f"PSNR {self.psnr:.1f} dB", f"{self.seconds:.1f} s, {self.speedup:.1f}x faster")
        row = [
            Entry(self.full, (f"{self.seconds_full:.1f} s",)),
            Entry(self.own, text, error_map(self.own, self.full)),
        ]
        labels = ["full attention", f"routing, quality={self.quality}\n{self.computed:.0%} of the attention"]
        title = f"{self.side} px, {self.steps} steps, no training"
        return sheet([row], [self.prompt], labels, title=title, note="Small map: largest difference.", side=512)


def run(
    pipe: Any,
    prompt: str,
    small: Image.Image,
    *,
    side: int = SIDE,
    steps: int = STEPS,
    quality: str = QUALITY,
    zoom: float = 1.0,
    seed: int = 0,
    call: dict[str, Any],
) -> Large:
    """Draw `small` over at `side` pixels by both; `steps` are made, `zoom` divides the positions."""
    refiner = image_to_image(pipe)
    refiner.set_progress_bar_config(disable=True)
    start = small.resize((side, side), Image.Resampling.LANCZOS)
    options = {**call, "image": start, "height": side, "width": side, "strength": STRENGTH}

    def draw(made: int) -> Image.Image:
        generator = torch.Generator("cpu").manual_seed(seed)
        asked = -(-made // STRENGTH)
        picture: Image.Image = refiner(
            prompt, generator=generator, **{**options, "num_inference_steps": int(asked)}
        ).images[0]
        return picture

    with scaled_positions(pipe, zoom):
        with apply(refiner, "routing", quality=quality):
            _, first = timed(refiner, lambda: draw(1))
            own, seconds = timed(refiner, lambda: draw(steps))
            computed = summary(refiner).computed or 1.0
        full, seconds_full = timed(refiner, lambda: draw(steps))
    distance = psnr(np.asarray(own), np.asarray(full))
    return Large(prompt, side, steps, quality, full, own, seconds_full, seconds, first, distance, computed)


def timed(pipe: Any, make: Any) -> tuple[Any, float]:
    """`make()` and its seconds."""
    synchronize(pipe.device)
    start = time.perf_counter()
    made = make()
    synchronize(pipe.device)
    return made, time.perf_counter() - start


@contextlib.contextmanager
def scaled_positions(pipe: Any, zoom: float) -> Iterator[None]:
    """Positions of Flux's cells divided by `zoom` inside the block."""
    embed = getattr(pipe.transformer, "pos_embed", None)
    if zoom == 1 or embed is None:
        yield
        return
    hook = embed.register_forward_pre_hook(lambda _, args: (args[0] / zoom,))
    try:
        yield
    finally:
        hook.remove()


def save(large: Large, folder: Path) -> Path:
    """Write the sheet."""
    with written(folder / NAME) as path:
        large.draw().save(path)
    return folder / NAME
