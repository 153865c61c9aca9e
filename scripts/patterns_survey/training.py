"""Every setting trained for some minutes of one core, by the machinery of `distill`, and measured again.

The bundled Flux at 256 px, 32 x 32 tokens and 32 of text: at 128 px text alone is 21% of all pairs, and a quarter
would be hardly a window. Images of the bundled world are drawn at 128 px and enlarged; positions are those of training,
on the finer grid. Only the teacher is learnt from: the model was not trained with enlarged images, and a student that
learns those leaves the teacher. How many steps fit into the minutes is measured first, and kept: a stopped run goes on.
"""

import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffattn.distill.config import DistillConfig, override, tiny
from diffattn.distill.data.samples import Sample
from diffattn.distill.data.shapes import encode
from diffattn.distill.setting import open_setting
from diffattn.distill.training.trainer import Trainer
from diffusers import FluxImg2ImgPipeline
from fidelity.painting import Painter
from tqdm import tqdm

from diffattn.files.writing import write_json, written
from diffattn.tiny.shapes import caption, is_held_out, pixels, scenes

from .cells import CELLS, SEED, TEXT, Cell, Stage, read_json
from .measuring import FAILURES, file_of, line, opened, reason
from .settings import Setting, Solved

CELL = "256"
IMAGES = 512
"""That are trained on."""
BATCH, TRIAL = 4, 2
"""Images of a step, and steps that are timed before a run."""
SAVE_EVERY = 20


class Enlarged:
    """The bundled world's images, enlarged before they are encoded; once, and kept in `file`."""

    def __init__(self, pipe: Any, zoom: int, file: Path) -> None:
        if not file.is_file():
            kept = _encode(pipe, zoom)
            with written(file) as path:
                torch.save(kept, path)
        self.kept = torch.load(file, weights_only=True)

    def __len__(self) -> int:
        return len(self.kept["captions"])

    def sample(self, index: int, generator: torch.Generator) -> Sample:
        """One image; nothing in it is random."""
        names = ("encoder_hidden_states", "pooled_projections")
        conditioning = {name: self.kept[name][index] for name in names}
        return Sample(self.kept["captions"][index], self.kept["latents"][index], conditioning)


@torch.no_grad()
def _encode(pipe: Any, zoom: int) -> dict[str, Any]:
    """Latents, texts and captions of images that training may see."""
    rng = np.random.default_rng(SEED)
    world = [scene for scene in scenes() if not is_held_out(scene)]
    chosen = [world[index] for index in rng.choice(len(world), size=IMAGES, replace=False)]
    captions = [caption(scene) for scene in chosen]
    latents = []
    for scene in tqdm(chosen, desc="encoding images", disable=None):
        image = pixels([scene], rng)
        larger = torch.nn.functional.interpolate(image, scale_factor=zoom, mode="bicubic")
        latents.append(encode(pipe.vae, larger.clamp(-1, 1)))
    text, pooled, _ = pipe.encode_prompt(captions, None, max_sequence_length=TEXT)
    return {
        "captions": captions,
        "latents": torch.cat(latents),
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
    }


def kind_of(cell: Cell, changes: Sequence[str]) -> str:
    """The kind of record, and of its file: of another budget, or of other fields of the config, one of its own."""
    other = zlib.crc32("\n".join((f"{cell.budget}", *changes)).encode())
    return "distilled" if not changes and cell == CELLS[CELL] else f"otherwise-{other:08x}"


def distill(cell: Cell, setting: Setting, minutes: float, count: int, runs: Path, changes: Sequence[str] = ()) -> None:
    """Train a setting, or go on, and then measure it; what cannot be trained is recorded with the reason.

    `changes` are fields of the config over the preset's, NAME=VALUE.
    """
    if setting.reuse != 1:
        return
    solved = setting.solve(cell)
    path = file_of(runs, cell, setting, kind_of(cell, changes))
    record = opened(path, {**solved.facts, "minutes": minutes, **({"changes": list(changes)} if changes else {})})
    if solved.found.mechanism is not None and len(record.get("psnr", {})) < count:
        try:
            _train_and_measure(solved, record, count, runs, path)
        except FAILURES as error:
            record["failed"] = reason(error)
    write_json(path, record)
    tqdm.write(f"distilled, {cell.name}: {setting.name}: {line(record)}")


def _train_and_measure(solved: Solved, record: dict[str, Any], count: int, runs: Path, path: Path) -> None:
    record.pop("failed", None)
    minutes = record["minutes"]
    cell, mechanism = solved.cell, solved.found.mechanism
    assert mechanism is not None
    folder = path.with_suffix("") / f"{minutes:g}-{zlib.crc32(str(mechanism).encode()):08x}"
    originals = Stage(cell, runs / cell.name / "teacher")
    for number in range(count):
        originals.teacher(number)  # before a student is in the pipeline
    loss = replace(tiny().loss, target=0.0)
    config = replace(tiny(), mechanism=mechanism, loss=loss, batch_size=BATCH, save_every=SAVE_EVERY, steps=10**6)
    config = override(config, record.get("changes", ()))
    setting = open_setting(config)
    setting.student.model.pos_embed.register_forward_pre_hook(lambda _, args: (args[0] / cell.zoom,))
    source = Enlarged(setting.pipe, cell.zoom, runs / cell.name / "training.pt")
    plan = read_json(folder / "plan.json")
    if not plan:
        plan = _trial(config, setting, source, folder, minutes)
        write_json(folder / "plan.json", plan)
    config = replace(config, steps=plan["steps"], warmup=min(20, plan["steps"] // 4))
    setting.config = config
    trainer = setting.trainer(source, folder)
    trainer.resume()
    start, first = time.process_time(), trainer.step
    outcome = trainer.run(progress=True)
    if not outcome.finished:
        raise SystemExit(f"stopped at step {outcome.step} of {config.steps}: the same command goes on")
    if outcome.step > first:
        record["cpu_seconds_of_a_step"] = round((time.process_time() - start) / (outcome.step - first), 3)
    record.update(steps_trained=config.steps, batch=BATCH)
    setting.student.model.eval()
    _measure(setting.pipe, solved, record, count, runs, path)


def _trial(config: DistillConfig, setting: Any, source: Any, folder: Path, minutes: float) -> dict[str, Any]:
    """How many steps take so many minutes of one core, by some that are undone."""
    former = {name: weight.detach().clone() for name, weight in setting.student.parameters.items()}
    trainer = Trainer(config, setting.student, setting.pipe.scheduler, source, folder)
    trainer.train_step()  # compiles
    start = time.process_time()
    for _ in range(TRIAL):
        trainer.train_step()
    seconds = (time.process_time() - start) / TRIAL
    with torch.no_grad():
        for name, weight in setting.student.parameters.items():
            weight.copy_(former[name])
    return {"seconds_of_a_step": round(seconds, 4), "steps": max(round(60 * minutes / seconds), 4)}


@torch.no_grad()
def _measure(pipe: Any, solved: Solved, record: dict[str, Any], count: int, runs: Path, path: Path) -> None:
    """PSNR and errors of the student, which is swapped already."""
    stage = Stage(solved.cell, runs / solved.cell.name / "teacher", painter=_painter(pipe, solved.cell))
    for number in range(count):
        teacher, key = stage.teacher(number), str(number)
        if key in record.setdefault("psnr", {}):
            continue
        record.setdefault("error", {})[key] = [round(value, 6) for value in stage.errors(teacher)]
        record["psnr"][key] = round(stage.nearness(stage.draw(number, teacher.start), teacher), 3)
        write_json(path, record)


def _painter(pipe: Any, cell: Cell) -> Painter:
    """A painter with a pipeline of one's own, whose positions are scaled already."""
    painter = Painter(cell.prompts, SEED)
    painter.text_to_image = pipe
    painter.image_to_image = FluxImg2ImgPipeline(**pipe.components)
    painter.image_to_image.set_progress_bar_config(disable=True)
    return painter
