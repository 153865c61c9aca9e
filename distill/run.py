"""One run from a config: open the pipeline, make the student, train, export, evaluate.

<folder>/config.json  log.csv  loss.png  checkpoints/  sheets/  adapter/  evaluation.{json,md}  sheet.png
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffattn.files.writing import write_json, written

from .config import DistillConfig, override
from .data.pictures import check_output
from .evaluation.evaluate import Evaluation, evaluate
from .evaluation.page import save
from .evaluation.picture_metrics import Metric
from .evaluation.sheets import Sheets
from .export import FIGURES, export
from .loading import WORLDS, model_parts
from .setting import Setting, open_setting, world_prompts
from .student import Student
from .training import checkpoints
from .training.log import LOG, read_log
from .training.sharding import check_processes
from .training.trainer import Outcome, make_accelerator

logger = logging.getLogger("diffattn")


def train(
    config: DistillConfig, folder: Path, *, resume: bool = False, progress: bool = False
) -> tuple[Setting | None, Outcome]:
    """Train by a config into `folder`, and export the adapter when it is done; every process of a group calls it.

    The first process gets the student, which a sharded run opens anew from its last checkpoint; others get None. Raises
    `ValueError`, before anything is written, where the folder holds a run and `resume` is False.
    """
    check_output(folder)
    if not resume and checkpoints.find(folder):
        raise ValueError(f"{folder} holds a run already: continue by --resume auto, or choose another folder")
    accelerator = make_accelerator(config, folder)
    check_processes(config, accelerator)
    main = accelerator.is_main_process
    setting: Setting | None = open_setting(config, accelerator.device)
    assert setting is not None
    sheets = Sheets(setting, folder, write=main) if config.sheet_every else None
    trainer = setting.trainer(setting.source(progress and main), folder, accelerator, sheets)
    if resume:
        trainer.resume()
    if main:  # not before all is checked: the folder may hold a run
        write_json(folder / "config.json", config.to_dict())
    outcome = trainer.run(progress=progress)
    trainer.use_average()
    if config.sharded:
        del trainer, sheets
        setting = open_run(folder, accelerator.device) if main and outcome.finished else None
    if main and setting is not None and outcome.finished:
        losses = draw_losses(folder)
        export(setting, folder / "adapter", figures=[losses] if losses is not None else [])
    return setting if main else None, outcome


def divided(config: DistillConfig, folder: Path) -> dict[Path, DistillConfig]:
    """The runs that a config stands for, by their folders: itself, or one for each of a pipeline's several models.

    These have folders of their own below `folder`, named as the models, where the config does not name one of them.
    """
    parts = model_parts(config) if config.part is None else []
    return {folder / part: replace(config, part=part) for part in parts} if len(parts) > 1 else {folder: config}


def export_run(folder: Path, output: Path, **hub: Any) -> Path:
    """`export` of a finished or stopped run: its last checkpoint, with the figures that lie in its folder.

    `hub` are the options `push_to_hub` and `repo_id`. The data of the training need not be there any more.
    """
    check_output(output)
    options = []
    if checkpoints.find(folder):
        data = checkpoints.read_config(folder).data
        options = ["data="] if data not in WORLDS and not Path(data).is_dir() else []
    setting = open_run(folder, options=options)
    file = folder / "evaluation.json"
    evaluation = _read_evaluation(file) if file.is_file() else None
    figures = [folder / name for name in FIGURES if (folder / name).is_file()]
    return export(setting, output, evaluation, figures=figures, **hub)


def _read_evaluation(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file} is not an evaluation ({error}); evaluate the run again, or remove it") from error


CHANGEABLE = ("mechanism", "data", "frames", "guidance", "text_length")
"""Fields of a run's config that may be others when it is evaluated."""


def open_run(folder: Path, device: torch.device | str = "cpu", options: Iterable[str] = ()) -> Setting:
    """The student of a run's last checkpoint; `options` as `mechanism.radius=3` change what its weights are used in.

    Raises `ValueError` where the folder has no checkpoint, and for options that are those of training.
    """
    found = checkpoints.find(folder)
    if not found:
        parts = sorted(place.name for place in folder.iterdir() if checkpoints.find(place)) if folder.is_dir() else []
        hint = f"name one of the runs in it, {', '.join(parts)}" if parts else "is it that of a `diffattn distill run`?"
        raise ValueError(f"{folder} holds no checkpoint: {hint}")
    trained = checkpoints.read_config(folder)
    config = override(trained, options)
    changed = [name for name, value in config.to_dict().items() if value != trained.to_dict()[name]]
    if set(changed) - set(CHANGEABLE):
        wrong = next(name for name in changed if name not in CHANGEABLE)
        raise ValueError(f"an evaluation can change {', '.join(CHANGEABLE)} of its run, got {wrong}: train another run")
    setting = open_setting(config, device)
    state = checkpoints.read(list(found.values())[-1], trained)
    take_weights(
        setting.student,
        dict(zip(state["weights"], state["average"], strict=True)) if state["average"] else state["weights"],
    )
    return setting


@torch.no_grad()
def take_weights(student: Student, weights: Mapping[str, torch.Tensor]) -> None:
    """Put trained weights in place; raises `ValueError` where the student has others."""
    own = {name: list(weight.shape) for name, weight in student.parameters.items()}
    got = {name: list(weight.shape) for name, weight in weights.items()}
    wrong = sorted(name for name in own.keys() | got.keys() if own.get(name) != got.get(name))
    if wrong:
        mechanism = student.handle.layers[0].mechanism
        raise ValueError(
            f"the run's weights don't fit {mechanism}: {wrong[0]} is {got.get(wrong[0], 'absent')} in them and "
            f"{own.get(wrong[0], 'absent')} in the model; evaluate it with options that leave its weights as they are"
        )
    for name, weight in student.parameters.items():
        weight.copy_(weights[name])


def evaluate_run(
    setting: Setting,
    folder: Path,
    prompts: Sequence[str] | None = None,
    samples: int = 32,
    *,
    metrics: Mapping[str, Metric] | None = None,
    rounds: int = 0,
) -> tuple[Evaluation, list[Path]]:
    """Evaluate a student on held-out samples and prompts, and write the figures to `folder`.

    `prompts` None: held-out captions of the bundled worlds. `metrics`, functions of two images (height, width, 3), and
    `rounds` as in `evaluate`.
    """
    check_output(folder)
    if prompts is None:
        prompts = world_prompts(setting.config.data)
    if prompts:
        setting.complete()
    source = setting.held_out()
    evaluation, drawn = evaluate(
        setting.student,
        setting.scheduler,
        source,
        samples=samples,
        guidance=setting.config.guidance,
        draw=partial(setting.draw, size=getattr(source, "picture_size", None)),
        prompts=prompts,
        metrics=metrics,
        rounds=rounds,
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
    for name in ("total", "target", "prediction", "attention", "features", "layers"):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="mean squared error", yscale="log")
    axes.legend()
    with written(folder / "loss.png") as temporary:
        figure.savefig(temporary, dpi=120)
    return folder / "loss.png"
