"""The places of the survey: a model, a size and a budget, with full attention's own images and calls, kept on disk."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fidelity.filming import BEST_SEEN, Filmer
from fidelity.painting import Painter
from torch import Tensor

from diffattn import TokenGrid, tiny
from diffattn.files.resuming import claim
from diffattn.files.writing import written
from diffattn.measure import psnr
from diffattn.measure.strips import VideoDistance

SEED = 1
"""Of the choice of prompts and captions, none of which training saw."""
TEXT = 32
"""Text tokens of the bundled Flux."""


@dataclass(frozen=True)
class Cell:
    """One place."""

    name: str
    title: str
    grid: TokenGrid
    budget: float
    """Of all pairs, at most."""
    prompts: int
    """That are measured, at most; which they are depends on their number."""
    steps: int
    pool: int | tuple[int, int, int]
    """Sides of a block that has one mean."""
    zoom: int = 1
    """Side over that of training; above 1 image to image, from the native image enlarged."""

    @property
    def is_video(self) -> bool:
        return self.grid.frames > 1

    @property
    def side(self) -> int:
        return self.grid.height

    @property
    def heads(self) -> int:
        return 4

    @property
    def head_dim(self) -> int:
        return 32 if self.is_video else 40


CELLS = {
    cell.name: cell
    for cell in (
        Cell("128", "Text to image at 128 px", TokenGrid(16, 16, before=TEXT), 0.51, 12, 20, 2),
        Cell("256", "Image to image at 256 px", TokenGrid(32, 32, before=TEXT), 0.25, 12, 10, 4, zoom=2),
        Cell("512", "Image to image at 512 px", TokenGrid(64, 64, before=TEXT), 0.12, 12, 10, 4, zoom=4),
        Cell("video", "Video, 33 frames of 48 px", TokenGrid(12, 12, frames=9), 0.25, 4, 20, (1, 3, 3)),
    )
}


def cell_of(name: str, steps: int | None = None) -> Cell:
    """A cell by its name, with other steps where they are given."""
    if name not in CELLS:
        raise ValueError(f"unknown cell {name!r}; the cells: {', '.join(CELLS)}")
    return CELLS[name] if steps is None else replace(CELLS[name], steps=steps)


class Teacher(NamedTuple):
    """What full attention made of one prompt."""

    image: np.ndarray
    """Float, (height, width, 3); of a video (frames, height, width, 3)."""
    start: np.ndarray | None
    """The image that it began with."""
    calls: list[tuple[dict[str, Any], Tensor]]
    """The model's first, middle and last call: arguments and output."""


class Stage:
    """A cell's pipeline, and what full attention makes with it, computed once and kept in `folder`."""

    def __init__(self, cell: Cell, folder: Path, painter: Painter | None = None) -> None:
        self.cell, self.folder = cell, folder
        setup = {"cell": cell.name, "steps": cell.steps, "zoom": cell.zoom, "seed": SEED, "prompts": cell.prompts}
        claim(folder, "teacher.json", {**setup, "torch": torch.__version__}, "folder of full attention's images")
        self.filmer = Filmer(cell.prompts, SEED) if cell.is_video else None
        self.painter = None if cell.is_video else painter or Painter(cell.prompts, SEED)

    @property
    def pipe(self) -> Any:
        """What a mechanism is applied to."""
        if self.filmer is not None:
            return self.filmer.pipe
        assert self.painter is not None
        return self.painter.image_to_image

    def draw(self, number: int, start: np.ndarray | None) -> np.ndarray:
        """The image of a prompt under what is applied at present."""
        if self.filmer is not None:
            return self.filmer.film(number, num_inference_steps=self.cell.steps)
        assert self.painter is not None
        if start is None:
            return self.painter.native(number, num_inference_steps=self.cell.steps)
        return self.painter.enlarged(number, start, self.cell.zoom, num_inference_steps=2 * self.cell.steps)

    def teacher(self, number: int) -> Teacher:
        """Full attention's image, start and calls: from disk, where they are there."""
        file = self.folder / f"{number:02d}.pt"
        if not file.is_file():
            with written(file) as path:
                torch.save(self._compute(number), path)
        found = torch.load(file, weights_only=True)
        start = found["start"]
        return Teacher(found["image"].numpy(), None if start is None else start.numpy(), found["calls"])

    def _compute(self, number: int) -> dict[str, Any]:
        calls: list[tuple[dict[str, Any], Tensor]] = []

        def note(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            calls.append((dict(kwargs), out[0]))

        enlarging = self.painter is not None and self.cell.zoom > 1
        start = self.painter.native(number, **tiny.defaults("flux")) if enlarging else None  # type: ignore[union-attr]
        hook = self.pipe.transformer.register_forward_hook(note, with_kwargs=True)
        try:
            image = self.draw(number, start)
        finally:
            hook.remove()
        return {
            "image": torch.from_numpy(image),
            "start": None if start is None else torch.from_numpy(start),
            "calls": [calls[0], calls[len(calls) // 2], calls[-1]],
        }

    @contextlib.contextmanager
    def at_size(self) -> Iterator[None]:
        """Positions are those of the cell's size inside the block, for calls of the model alone."""
        if self.painter is None:
            yield
            return
        self.painter.zoom = self.cell.zoom
        try:
            yield
        finally:
            self.painter.zoom = 1

    @torch.no_grad()
    def errors(self, teacher: Teacher) -> list[float]:
        """Relative error of the model's output, on full attention's own path, under what is applied at present."""
        found = []
        with self.at_size():
            for arguments, want in teacher.calls:
                got = self.pipe.transformer(**arguments)[0]
                found.append(float((got - want).norm() / want.norm()))
        return found

    def nearness(self, image: np.ndarray, teacher: Teacher) -> float:
        """PSNR in dB, of a video the mean over the frames; of equal images the best that is shown."""
        if not self.cell.is_video:
            return min(psnr(image, teacher.image), BEST_SEEN)
        return float(np.mean(np.minimum(VideoDistance.between(image, teacher.image).psnr, BEST_SEEN)))


def read_json(path: Path) -> dict[str, Any]:
    """A file's table; empty where it is not there."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
