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

from diffattn.swap.plan import models_of

from .config import DistillConfig
from .data import moving_clips, shapes
from .data.cache import CacheSource
from .data.cache_facts import read_facts
from .data.make_pictures import draw
from .data.moving_clips import Moving
from .data.pictures import list_files
from .data.samples import Source
from .data.shapes import Shapes
from .encoders import check_frames, model_facts
from .loading import (
    SHAPES,
    WORLDS,
    encoding_parts,
    is_cached,
    native_call,
    open_pipeline,
    other_models,
    trained_part,
    vae_facts_of,
)
from .objective import Span
from .student import Student, make_student
from .training.trainer import Trainer

logger = logging.getLogger("diffattn")


TRAINING_PICTURES, HELD_OUT_PICTURES = 1024, 32
"""Of the bundled Flux pipeline's world."""
TRAINING_CLIPS, HELD_OUT_CLIPS = 192, 16
"""Of the bundled Wan pipeline's world."""


def world_prompts(data: str, count: int | None = None) -> list[str]:
    """Captions of a bundled world that training never sees, `count` or as many as suit; none for other data."""
    if data not in WORLDS:
        return []
    return shapes.held_out(count or 24) if data == SHAPES else moving_clips.held_out(count or 8)


@dataclass
class Setting:
    """What a run works on."""

    config: DistillConfig
    pipe: Any
    student: Student
    part: str | None = None
    """Name of the trained model, of a pipeline that has several."""

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler, at the noise levels at which it calls the trained model."""
        scheduler, ratio = self.pipe.scheduler, self.pipe.config.get("boundary_ratio")
        if self.part is None or ratio is None:
            return scheduler
        boundary = ratio * scheduler.config.num_train_timesteps
        return Span(scheduler, below=boundary) if self.part == "transformer_2" else Span(scheduler, least=boundary)

    def trainer(
        self,
        source: Source,
        folder: Path,
        accelerator: Accelerator | None = None,
        draw_sheet: Callable[[int], Path] | None = None,
    ) -> Trainer:
        """The training loop, which keeps its checkpoints in `folder`; `draw_sheet(step)` draws images now and then."""
        return Trainer(self.config, self.student, self.scheduler, source, folder, accelerator, draw_sheet)

    def source(self, progress: bool = False) -> Source:
        """The training samples; `ValueError` where the config names no data, or a cache of another model."""
        if self.config.data in WORLDS:
            return self._world(progress=progress)
        if not self.config.data:
            raise ValueError("there is no data: name a folder made by `diffattn distill cache`, data=FOLDER")
        expected = model_facts(self.student.model)
        if self.config.text_length is not None:
            expected["text_length"] = self.config.text_length
        if self.config.frames is not None:
            expected["frames"] = self.config.frames
        expected |= vae_facts_of(self.config)
        shift, scale = (expected.get(name) for name in ("shift_factor", "scaling_factor"))
        return CacheSource(self.config.data, expected=expected, shift=shift, scale=scale)

    def held_out(self) -> Source:
        """Samples for evaluation: of a bundled world those that training never sees, else the training folder's."""
        return self._world(unseen=True) if self.config.data in WORLDS else self.source()

    def _world(self, unseen: bool = False, progress: bool = False) -> Source:
        """The samples of a bundled pipeline's own world."""
        config, model = self.config, type(self.student.model).__name__
        if model != WORLDS[config.data]:
            raise ValueError(
                f"data={config.data} is for a {WORLDS[config.data]}, and {config.model!r} has a {model}: name a folder "
                f"made by `diffattn distill cache`, data=FOLDER"
            )
        options: dict[str, Any] = {"seed": 0 if unseen else config.seed, "unseen": unseen, "progress": progress}
        if config.data == SHAPES:
            count = HELD_OUT_PICTURES if unseen else TRAINING_PICTURES
            return Shapes(self.pipe, count, text_length=config.text_length or 32, **options)
        count, native = HELD_OUT_CLIPS if unseen else TRAINING_CLIPS, native_call("tiny:wan")
        frames, length = config.frames or native["num_frames"], config.text_length or native["max_sequence_length"]
        check_frames(self.pipe, frames)
        return Moving(self.pipe, count, frames=frames, text_length=length, **options)

    def complete(self) -> None:
        """Load what drawing needs beside the model, where training from a cache has left it out."""
        if self.pipe.vae is None:
            parts = {name: part for name, part in self.pipe.components.items() if part is not None}
            device = next(self.student.model.parameters()).device
            self.pipe = open_pipeline(self.config, **parts).to(device)

    def draw(self, prompt: str, seed: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """One image by the pipeline, uint8 `(height, width, 3)`; of a video model as many frames as the data has.

        Several frames are `(frames, height, width, 3)`. `size` is in pixels; None: the pipeline's own.
        """
        self.complete()
        call = native_call(self.config.model)
        if size is not None:
            call["height"], call["width"] = size
        takes = inspect.signature(type(self.pipe).__call__).parameters
        if "num_frames" in takes:
            call["num_frames"] = self._frames() or call.get("num_frames", 1)
        if self.config.text_length is not None and "max_sequence_length" in takes:
            call["max_sequence_length"] = self.config.text_length
        self.pipe.set_progress_bar_config(disable=True)
        [frames] = draw(self.pipe, [prompt], [seed], **call)
        return np.asarray(frames[0]) if len(frames) == 1 else np.stack([np.asarray(frame) for frame in frames])

    def _frames(self) -> int | None:
        """Frames of a clip that the config asks for, or that the cache has."""
        facts = read_facts(Path(self.config.data)) if is_cached(self.config) else None
        return self.config.frames or (facts or {}).get("frames")


def open_setting(config: DistillConfig, device: torch.device | str = "cpu") -> Setting:
    """Load the pipeline, and make its transformer or UNet the student; for a cache, that and the scheduler alone.

    Raises `ValueError` for pipelines with several models where the config names none.
    """
    if is_cached(config):
        list_files(Path(config.data))
        read_facts(Path(config.data))
    torch.manual_seed(config.seed)
    part = trained_part(config)
    absent = [*other_models(config, part), *(encoding_parts(config) if is_cached(config) else [])]
    pipe = open_pipeline(config, **dict.fromkeys(absent))
    pipe.to(device)
    model, *others = models_of(pipe)
    if others:
        raise ValueError(f"expected a pipeline with one model, got {1 + len(others)} in {config.model!r}: name another")
    student = make_student(
        model,
        config.mechanism,
        trainable=config.trainable,
        layers=config.layers,
        lora_rank=config.lora_rank,
        backend=config.backend,
        settings=config.settings if config.drawn else (),
        leaning=config.drawn if config.slopes else None,
    )
    return Setting(config, pipe, student, part)
