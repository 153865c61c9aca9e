"""`per_head` by a recipe: which mechanism each head has is measured on other prompts, and then compared as the others.

Candidates are discs of several radii, as in MoA, without and with the means of the rest. The prompts that the recipe is
made from are none of those that it is measured on.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

import diffattn
from diffattn import ClearAttention, Mechanism, Recipe, SoftmaxAttention, tiny
from diffattn.calibration import calibrate_heads
from diffattn.files.writing import write_json
from diffattn.tiny.shapes import caption, is_held_out, scenes

from .cells import SEED, Cell, Stage
from .measuring import FAILURES, file_of, line, opened, reason
from .settings import CHOSEN, Setting
from .solving import operations

PROMPTS = 4
"""That a recipe is made from."""
SHARES = (1 / 8, 1 / 4, 1 / 2, 1)
"""Radii of the candidates, as shares of the grid's side."""


@dataclass(frozen=True)
class Calibrated:
    """One row."""

    name: str
    pool: bool

    def candidates(self, cell: Cell) -> list[Mechanism]:
        """What a head may have, beside full attention."""
        pool = cell.pool if self.pool else None
        radii = sorted({max(cell.side * share, 1.0) for share in SHARES})
        return [ClearAttention(radius=radius, pool=pool) for radius in radii]


ROWS = (Calibrated("per_head, calibrated radii", False), Calibrated("per_head, calibrated radii, pool", True))


def prompts(cell: Cell, stage: Stage) -> list[dict[str, Any]]:
    """Calls of prompts that nothing is measured on; images to begin with are the pipeline's own."""
    painter = stage.painter
    assert painter is not None
    known = [scene for scene in scenes() if not is_held_out(scene)]
    chosen = np.random.default_rng(SEED).choice(len(known), size=PROMPTS, replace=False)
    calls: list[dict[str, Any]] = [{"prompt": caption(known[index])} for index in chosen]
    if cell.zoom == 1:
        return calls
    side = 128 * cell.zoom
    for call in calls:
        image = painter.text_to_image(**{**tiny.defaults("flux"), **call}).images[0]
        call |= {"image": image.resize((side, side), Image.Resampling.LANCZOS), "strength": 0.5}
    return calls


def recipe_of(row: Calibrated, cell: Cell, stage: Stage) -> Recipe:
    """The choice of the heads within the cell's budget."""
    painter = stage.painter
    assert painter is not None
    steps = cell.steps if cell.zoom == 1 else 2 * cell.steps
    call = {**tiny.defaults("flux"), "num_inference_steps": steps, "height": 128 * cell.zoom, "width": 128 * cell.zoom}
    pipe = painter.text_to_image if cell.zoom == 1 else painter.image_to_image
    several = prompts(cell, stage)
    with stage.at_size():
        return calibrate_heads(pipe, several, row.candidates(cell), share=cell.budget, seed=1000, **call)


def measure(row: Calibrated, cell: Cell, count: int, runs: Path) -> None:
    """Make the recipe, or read it, and measure every prompt that is missing."""
    stage = Stage(cell, runs / cell.name / "teacher")
    path = file_of(runs, cell, Setting(row.name, CHOSEN, None))
    kept = path.with_suffix(".recipe.json")
    if not kept.is_file():
        try:
            recipe_of(row, cell, stage).save(kept)
        except FAILURES as error:
            tqdm.write(f"{cell.name}: {row.name}: {reason(error)}")
            return
    recipe = Recipe.load(kept)
    share = round(recipe.made["share"], 4)
    facts = {
        "cell": cell.name,
        "steps": cell.steps,
        "setting": row.name,
        "kind": CHOSEN,
        "mechanism": "a recipe of " + ", ".join(str(own) for own in row.candidates(cell)),
        "reuse": 1,
        "share": share,
        "gflops": round(share * operations(SoftmaxAttention(), cell) / 1e9, 4),
        "note": "",
    }
    record = opened(path, facts)
    for number in tqdm(range(count), desc=row.name, leave=False, disable=None):
        key, teacher = str(number), stage.teacher(number)
        if key in record.setdefault("psnr", {}):
            continue
        with diffattn.apply(stage.pipe, recipe):
            record.setdefault("error", {})[key] = [round(value, 6) for value in stage.errors(teacher)]
            record["psnr"][key] = round(stage.nearness(stage.draw(number, teacher.start), teacher), 3)
        write_json(path, record)
    tqdm.write(f"{cell.name}: {row.name}: {line(record)}")
