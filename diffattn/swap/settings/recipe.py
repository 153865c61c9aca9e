"""A recipe: which attention every layer has in which part of a run, as data that a file holds.

    diffattn.apply(pipe, diffattn.Recipe.load("recipe.json"))

`diffattn.calibrate` makes one. It says what it was made for; at other sizes it serves where all its mechanisms take the
same share of the pairs there, and is refused where not.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import config
from ...files.writing import write_json
from ...grid import TokenGrid
from ...mechanisms.base import Mechanism
from ...options import shown
from .schedule import Part, Schedule

KIND, VERSION = "diffattn recipe", 1


@dataclass(frozen=True)
class ModelRecipe:
    """What the layers of one model have."""

    name: str
    """Class of the model."""
    grid: tuple[int, int, int]
    """Frames, rows and columns of the tokens that it was made for."""
    layers: Mapping[str, Schedule]
    """Dotted name of a layer -> its schedule; layers that are not named keep the model's own attention."""

    def check(self, grid: TokenGrid) -> None:
        """Raise `ValueError` where the recipe does not carry over to another size."""
        if grid.shape == self.grid:
            return
        fixed = [own for schedule in self.layers.values() for own in schedule.mechanisms if not own.scales]
        if fixed:
            here, there = ("x".join(map(str, shape)) for shape in (grid.shape, self.grid))
            raise ValueError(
                f"this recipe was made for {there} tokens and has {fixed[0]}, which takes another share of the pairs "
                f"on {here}: calibrate at this size, or with settings that scale, such as routing with a share"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "model": self.name,
            "tokens": list(self.grid),
            "layers": {name: [_part_to_dict(part) for part in own.parts] for name, own in self.layers.items()},
        }


@dataclass(frozen=True)
class Recipe:
    """Which attention each layer has in each part of a run."""

    models: Mapping[str, ModelRecipe]
    """Part of the pipeline, such as "transformer" -> what its layers have."""
    made: Mapping[str, Any] = field(default_factory=dict)
    """What made it: prompts, seeds, settings, errors, fidelity, versions, machine."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` undoes it."""
        models = {name: own.to_dict() for name, own in self.models.items()}
        return {"type": KIND, "version": VERSION, "models": models, "made": dict(self.made)}

    @classmethod
    def from_dict(cls, values: Any) -> "Recipe":
        """Undo `to_dict`; raises `ValueError` for what is no recipe, or of a later version."""
        if not isinstance(values, dict) or values.get("type") != KIND:
            raise ValueError(f'expected a recipe, which has "type": "{KIND}"; got {shown(values)}')
        if values.get("version") != VERSION:
            raise ValueError(f"expected a recipe of version {VERSION}, got {shown(values.get('version'))}")
        try:
            models = {name: _model(own) for name, own in values["models"].items()}
            return cls(models, values.get("made", {}))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this recipe is broken: {type(error).__name__} {error}") from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as JSON."""
        return write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Recipe":
        """Read what `save` wrote; raises `ValueError` with the file's name for all else."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
            raise ValueError(f"cannot read the recipe {path}: {error}") from error

    def __str__(self) -> str:
        lines = []
        for name, model in self.models.items():
            frames, rows, columns = model.grid
            size = f"{rows}x{columns}" if frames == 1 else f"{frames}x{rows}x{columns}"
            lines.append(f"{name} ({model.name}), made for {size} tokens")
            lines += [f"  {layer:<40} {schedule}" for layer, schedule in model.layers.items()]
        return "\n".join(lines)


def _part_to_dict(part: Part) -> dict[str, Any]:
    return {"until": part.until, "mechanism": config.to_dict(part.mechanism), "reuse": part.reuse}


def _model(values: dict[str, Any]) -> ModelRecipe:
    frames, rows, columns = values["tokens"]
    return ModelRecipe(
        values["model"], (frames, rows, columns), {name: _schedule(own) for name, own in values["layers"].items()}
    )


def _schedule(parts: list[dict[str, Any]]) -> Schedule:
    made = tuple(Part(_mechanism(own["mechanism"]), own["reuse"], own["until"]) for own in parts)
    ends = [part.until for part in made]
    if not made or ends != sorted(ends) or ends[-1] != 1.0 or ends[0] <= 0:
        raise ValueError(f"expected parts that end in order, the last at 1.0; got {ends}")
    if any(not isinstance(part.reuse, int) or part.reuse < 1 for part in made):
        raise ValueError(f"expected a reuse of at least 1; got {[part.reuse for part in made]}")
    return Schedule(made)


def _mechanism(values: dict[str, Any]) -> Mechanism:
    made: Mechanism = config.from_dict(values)
    return made
