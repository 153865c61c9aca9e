"""Sheets of images during training: teacher, student and swap alone, of the same prompts and the same noise."""

from pathlib import Path

import numpy as np

from diffattn.files.writing import written

from ..setting import Setting, world_prompts
from .evaluate import MODELS, as_model
from .page import page

COUNT = 4
"""Prompts of the bundled world, where the config names none."""


class Sheets:
    """`sheets(step)` draws the student as it is now and writes `<folder>/sheets/step-000500.png`.

    The teacher and the swap alone do not change, and are drawn once. Training goes on bit for bit as without sheets.
    """

    def __init__(self, setting: Setting, folder: Path, write: bool = True) -> None:
        self._setting, self._folder, self._write = setting, folder / "sheets", write
        self._fixed: dict[str, list[np.ndarray]] = {}
        config = setting.config
        self._prompts = list(config.sheet_prompts) or world_prompts(config.data, COUNT)
        if not self._prompts:
            raise ValueError(
                f"sheet_every={config.sheet_every} needs prompts to draw: give sheet_prompts, or sheet_every=0"
            )

    def __call__(self, step: int) -> Path:
        path = self._folder / f"step-{step:06d}.png"
        for which in MODELS:
            if which != "student" and which not in self._fixed:
                self._fixed[which] = self._draw(which)
        drawn = {**self._fixed, "student": self._draw("student")}
        if self._write:
            with written(path) as temporary:
                page(drawn, self._prompts).save(temporary)
        return path

    def _draw(self, which: str) -> list[np.ndarray]:
        with as_model(self._setting.student, which):
            return [self._setting.draw(prompt, number) for number, prompt in enumerate(self._prompts)]
