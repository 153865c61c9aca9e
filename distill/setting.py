"""What a run works on: its config, its pipeline, the student in it."""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

import diffattn
from diffattn.swap.plan import models_of

from .config import DistillConfig
from .data.cache import CacheSource
from .data.cache_facts import read_facts
from .data.make_pictures import draw
from .data.pictures import list_files
from .data.samples import Source
from .data.shapes import Shapes
from .encoders import model_facts
from .loading import SHAPES, TINY, encoding_parts, is_cached, open_pipeline, vae_facts_of
from .student import Student, make_student
from .training.trainer import Trainer

logger = logging.getLogger("diffattn")


TRAINING_PICTURES, HELD_OUT_PICTURES = 1024, 32
"""Of the bundled pipeline's world."""


@dataclass
class Setting:
    """What a run works on."""

    config: DistillConfig
    pipe: Any
    student: Student

    def trainer(
        self,
        source: Source,
        folder: Path,
        accelerator: Accelerator | None = None,
        draw_sheet: Callable[[int], Path] | None = None,
    ) -> Trainer:
        return Trainer(self.config, self.student, self.pipe.scheduler, source, folder, accelerator, draw_sheet)

    def source(self, progress: bool = False) -> Source:
        """The training samples."""
        if self.config.data == SHAPES:
            length = self.config.text_length or 32
            return Shapes(self.pipe, TRAINING_PICTURES, seed=self.config.seed, text_length=length, progress=progress)
        if not self.config.data:
            raise ValueError("there is no data: name a folder made by `diffattn distill cache`, data=FOLDER")
        expected = model_facts(self.student.model)
        if self.config.text_length is not None:
            expected["text_length"] = self.config.text_length
        expected |= vae_facts_of(self.config)
        shift, scale = (expected.get(name) for name in ("shift_factor", "scaling_factor"))
        return CacheSource(self.config.data, expected=expected, shift=shift, scale=scale)

    def held_out(self) -> Source:
        """Samples for evaluation: of the bundled world those that training never sees, else the training folder's."""
        if self.config.data == SHAPES:
            return Shapes(self.pipe, HELD_OUT_PICTURES, text_length=self.config.text_length or 32, unseen=True)
        return self.source()

    def complete(self) -> None:
        """Load what drawing needs beside the model, where training from a cache has left it out."""
        if self.pipe.vae is None:
            parts = {name: part for name, part in self.pipe.components.items() if part is not None}
            device = next(self.student.model.parameters()).device
            self.pipe = open_pipeline(self.config, **parts).to(device)

    def draw(self, prompt: str, seed: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """One image by the pipeline, uint8 `(height, width, 3)`; of a video model the only frame.

        `size` is in pixels; None: the pipeline's own.
        """
        self.complete()
        call = diffattn.tiny.defaults("flux") if self.config.model == TINY else {}
        if size is not None:
            call["height"], call["width"] = size
        takes = inspect.signature(type(self.pipe).__call__).parameters
        if self.config.text_length is not None and "max_sequence_length" in takes:
            call["max_sequence_length"] = self.config.text_length
        self.pipe.set_progress_bar_config(disable=True)
        [picture] = draw(self.pipe, [prompt], [seed], **call)
        return np.asarray(picture)


def open_setting(config: DistillConfig, device: torch.device | str = "cpu") -> Setting:
    """Load the pipeline, and make its transformer or UNet the student; for a cache, that and the scheduler alone."""
    if is_cached(config):
        list_files(Path(config.data))
        read_facts(Path(config.data))
    torch.manual_seed(config.seed)
    pipe = open_pipeline(config, **dict.fromkeys(encoding_parts(config) if is_cached(config) else ()))
    pipe.to(device)
    model, *others = models_of(pipe)
    if others:
        raise ValueError(
            f"expected a pipeline with one model, got {1 + len(others)} in {config.model!r}: train each alone"
        )
    student = make_student(
        model,
        config.mechanism,
        trainable=config.trainable,
        layers=config.layers,
        lora_rank=config.lora_rank,
        backend=config.backend,
    )
    return Setting(config, pipe, student)
