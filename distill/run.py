"""One run from a config: open the pipeline, make the student, train, export, evaluate.

<folder>/config.json  log.csv  loss.png  checkpoints/  adapter/  evaluation.{json,md}  sheet.png
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

import diffattn
from diffattn.files import write_json, written
from diffattn.plan import models_of

from . import checkpoints
from .cache import CacheSource, model_facts
from .config import DistillConfig, from_dict
from .data import Source
from .evaluate import Evaluation, evaluate, save
from .inputs import inputs_of
from .shapes_data import Shapes, held_out
from .student import Student, make_student
from .trainer import LOG, Outcome, Trainer, read_log

logger = logging.getLogger("diffattn")

TINY, SHAPES = "tiny", "shapes"
TRAINING_PICTURES, HELD_OUT_PICTURES = 1024, 32
"""Of the bundled pipeline's world."""


@dataclass
class Setting:
    """What a run works on."""

    config: DistillConfig
    pipe: Any
    student: Student

    def trainer(self, source: Source, folder: Path, accelerator: Accelerator | None = None) -> Trainer:
        return Trainer(self.config, self.student, self.pipe.scheduler, source, folder, accelerator)

    def source(self, progress: bool = False) -> Source:
        """The training samples."""
        if self.config.data == SHAPES:
            length = self.config.text_length or 32
            return Shapes(self.pipe, TRAINING_PICTURES, seed=self.config.seed, text_length=length, progress=progress)
        if not self.config.data:
            raise ValueError("there is no data: name a folder made by `diffattn distill cache`, data=FOLDER")
        if inputs_of(self.student.model).models != ("FluxTransformer2DModel",):
            raise ValueError(
                f"caches are those of Flux models, and this is a {type(self.student.model).__name__}: give the Trainer "
                f"a Source of your own, see diffattn.distill.data"
            )
        vae = self.pipe.vae.config
        facts = {**model_facts(self.student.model), "text_length": self.config.text_length}
        expected = {name: value for name, value in facts.items() if value is not None}
        return CacheSource(self.config.data, expected=expected, shift=vae.shift_factor, scale=vae.scaling_factor)

    def held_out(self) -> Source:
        """Samples for evaluation: of the bundled world those that training never sees, else the training folder's."""
        if self.config.data == SHAPES:
            return Shapes(self.pipe, HELD_OUT_PICTURES, text_length=self.config.text_length or 32, unseen=True)
        return self.source()

    def draw(self, prompt: str, seed: int) -> np.ndarray:
        """One picture by the pipeline, uint8 `(height, width, 3)`."""
        call = diffattn.tiny.defaults("flux") if self.config.model == TINY else {}
        self.pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed)
        return np.asarray(self.pipe(prompt, generator=generator, **call).images[0])


def open_setting(config: DistillConfig, device: torch.device | str = "cpu") -> Setting:
    """Load the pipeline in float32 (trained parts must be), and make its transformer or UNet the student."""
    from diffusers import DiffusionPipeline

    torch.manual_seed(config.seed)
    folder = diffattn.tiny.path("flux") if config.model == TINY else config.model
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load {config.model!r}: {str(error).splitlines()[0]}") from error
    pipe.to(device)
    [model] = models_of(pipe)
    student = make_student(
        model, config.mechanism, trainable=config.trainable, layers=config.layers, lora_rank=config.lora_rank
    )
    return Setting(config, pipe, student)


def train(
    config: DistillConfig, folder: Path, *, resume: bool = False, progress: bool = False
) -> tuple[Setting, Outcome]:
    """Train by a config into `folder`; on the main process, export the adapter when it is done."""
    accelerator = Accelerator(mixed_precision=config.precision)
    if not resume and checkpoints.find(folder):
        raise ValueError(f"{folder} holds a run already: go on by --resume auto, or choose another folder")
    setting = open_setting(config, accelerator.device)
    trainer = setting.trainer(setting.source(progress and accelerator.is_main_process), folder, accelerator)
    if accelerator.is_main_process:
        write_json(folder / "config.json", config.to_dict())
    outcome = trainer.run(resume=resume, progress=progress)
    trainer.use_average()
    if accelerator.is_main_process and outcome.finished:
        export(setting, folder / "adapter")
        draw_losses(folder)
    return setting, outcome


def export(setting: Setting, folder: Path) -> Path:
    """Write the student as an adapter that `diffattn.load` takes."""
    student = setting.student
    if student.trainable == "lora":
        raise NotImplementedError("a LoRA student is not exported yet: save it by pipe.save_lora_weights")
    return diffattn.save(student.model, folder, include=student.projections)


def open_run(folder: Path, device: torch.device | str = "cpu") -> Setting:
    """The student of a run's last checkpoint."""
    found = checkpoints.find(folder)
    if not found:
        raise ValueError(f"{folder} holds no checkpoint: is it the folder of a `diffattn distill run`?")
    config = from_dict(json.loads((folder / "config.json").read_text()))
    setting = open_setting(config, device)
    state = checkpoints.read(list(found.values())[-1], config)
    chosen = dict(zip(state["weights"], state["average"], strict=True)) if state["average"] else state["weights"]
    with torch.no_grad():
        for name, weight in setting.student.parameters.items():
            weight.copy_(chosen[name])
    return setting


def evaluate_run(
    setting: Setting, folder: Path, prompts: Sequence[str] | None = None, samples: int = 32
) -> tuple[Evaluation, list[Path]]:
    """Evaluate a student on held-out samples and prompts, and write the figures to `folder`."""
    if prompts is None:
        prompts = held_out(24) if setting.config.data == SHAPES else []
    evaluation, drawn = evaluate(
        setting.student,
        setting.pipe.scheduler,
        setting.held_out(),
        samples=samples,
        guidance=setting.config.guidance,
        draw=setting.draw,
        prompts=prompts,
    )
    return evaluation, save(evaluation, drawn, prompts, folder)


def draw_losses(folder: Path) -> Path | None:
    """`loss.png` from `log.csv`: every loss over the steps, on a logarithmic axis; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning('no loss.png: it needs matplotlib, pip install "diffattn[demo]"')
        return None
    rows = read_log(folder / LOG)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name in ("total", "target", "prediction", "attention"):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="mean squared error", yscale="log")
    axes.legend()
    with written(folder / "loss.png") as temporary:
        figure.savefig(temporary, dpi=120)
    return folder / "loss.png"
