"""Write docs/families.md: every model class and every pipeline of diffusers, and what `apply` does with it.

PYTHONPATH=.:tests python scripts/class_tables/families_page.py
"""

import re
from collections import Counter
from functools import cache
from importlib.metadata import version
from pathlib import Path

from diffattn.families import FAMILIES, REFUSED
from diffattn.swap.unsupported import UNSUPPORTED, Unsupported
from scripts.class_tables.pipeline_calls import (
    MODEL_FOLDERS,
    Pipeline,
    classes_of,
    model_classes,
    modular_pipelines,
    pipelines,
)

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "families.md"
NO_SOFTMAX = {"Sana": "kept: its attention is linear already"}
"""Rows of which no layer can be swapped."""
HEADER = """\
# Models and pipelines

What `diffattn.apply` does with every model class and every pipeline of diffusers {version}.
`scripts/class_tables/families_page.py` writes this page: it walks the classes that the files below
`diffusers/models/transformers`, `unets` and `controlnets` define, exported or not, and those below
`diffusers/pipelines` and `diffusers/modular_pipelines`, by their source. Which mechanism runs on which family is in the
README's table.

- **swapped:** the class has a row in `diffattn.families.FAMILIES`. A tiny random model of it is compared with the
  model under a mask that is written in the test (`tests/families/test_families.py`).
- **refused:** `apply` raises `ValueError` with the reason before anything is changed.
- **list:** the class stands for several ControlNets, and each of them is swapped.

Of {models} model classes {swapped} are swapped, {lists} are lists and {refused} are refused. Of {pipes} pipelines
{taken} have a model that is swapped, {refused_pipes} are refused, and {others} have no such model.
"""
CALLS = """\
## Pipelines

For each pipeline whose model is swapped, the arguments that it passes to the model are read from its source, and a tiny
model is called with these (`tests/families/test_every_pipeline.py`). Pipelines marked **run** are built from tiny parts
and run as a whole besides.
"""
MODULAR = """\
## Modular pipelines

Their blocks call the same models; named are the models of their folder in diffusers.
`tests/composition/test_modular.py` runs one as a whole.
"""


def entries(name: str) -> list[Unsupported]:
    return [entry for entry in UNSUPPORTED if entry.name == name]


def row_of(model: str) -> str | None:
    return next((family.name for family in FAMILIES if model in family.models), None)


def refusal(name: str) -> str | None:
    """Why a class is refused whatever its config."""
    for entry in entries(name):
        if entry.option is None:
            return f"{entry.reason}{remedy_of(entry)}"
    return REFUSED.get(name)


def remedy_of(entry: Unsupported) -> str:
    remedy = getattr(entry, "remedy", None)
    return f"; {remedy}" if remedy and "run it as it is" not in remedy else ""


def outcome(model: str) -> str:
    """What the page says of a model class."""
    row, reason = row_of(model), refusal(model)
    if reason is not None:
        return f"refused: {reason}"
    if row in NO_SOFTMAX:
        return f"refused: {NO_SOFTMAX[row].removeprefix('kept: ')}"
    if row is not None:
        special = [f"; refused with `{own.option}={own.value!r}`: {own.reason}" for own in entries(model)]
        return f"swapped: {row}{''.join(special)}"
    return "list: each of its ControlNets is swapped" if "Multi" in model else "refused: it is of no known family"


@cache
def models() -> list[str]:
    """The model classes of diffusers' folders, and those that the library names besides."""
    own = {name for folder in MODEL_FOLDERS for name in classes_of(folder) if name in model_classes()}
    rows = {name for family in FAMILIES for name in family.models if name in model_classes()}
    named = {entry.name for entry in UNSUPPORTED if entry.name.endswith("Model")}
    return sorted(own | rows | named | set(REFUSED))


@cache
def run_whole() -> frozenset[str]:
    """Names of the pipelines that the tests build: `diffusers.Name(`, or a key of `tests/whole`."""
    texts = {path: path.read_text() for path in sorted((ROOT / "tests").rglob("*.py"))}
    found = {name for text in texts.values() for name in re.findall(r"diffusers\.(\w+Pipeline)\(", text)}
    for path, text in texts.items():
        if path.parent.name == "whole":
            found |= set(re.findall(r"\"(\w+Pipeline)(?:, [^\"]*)?\"", text))
    return frozenset(found)


DENOISERS = "transformer", "unet", "prior", "decoder"
"""What the part is called that makes the image; a model of a pipeline's own is known by that."""


def denoisers(pipe: Pipeline) -> list[str]:
    """The model classes that a pipeline calls, or that it hands to others."""
    parts = {part for part in pipe.parts if pipe.inner or part in {call.part for call in pipe.calls}}
    found = {model for part in parts for model in pipe.parts[part] if model in models()}
    own = {model for part in parts for model in pipe.parts[part] if part.endswith(DENOISERS)} & model_classes()
    return sorted(found or own)


def told(pipe: Pipeline) -> str:
    """What the page says of a pipeline."""
    reason = refusal(pipe.name)
    outcomes = [outcome(model) for model in denoisers(pipe)]
    if reason is not None:
        return f"refused: {reason}"
    if any(one.startswith("swapped") for one in outcomes):
        return "swapped, **run**" if pipe.name in run_whole() else "swapped"
    return "refused: see its model" if set(denoisers(pipe)) & set(models()) else NONE if not outcomes else UNKNOWN


NONE, UNKNOWN = "no such model", "refused: its model is of no known family"


def names(values: list[str]) -> str:
    return ", ".join(f"`{value}`" for value in values) or "-"


def page() -> str:
    """The whole page."""
    outcomes = {model: outcome(model) for model in models()}
    counts = Counter(one.split(":")[0] for one in outcomes.values())
    pipes = {pipe.name: told(pipe) for pipe in pipelines().values()}
    kinds = Counter(re.split(r"[:,]", one)[0] for one in pipes.values())
    header = HEADER.format(
        version=version("diffusers"),
        models=len(outcomes),
        swapped=counts["swapped"],
        lists=counts["list"],
        refused=counts["refused"],
        pipes=len(pipes),
        taken=kinds["swapped"],
        refused_pipes=kinds["refused"],
        others=kinds[NONE],
    )
    lines = [header, "## Model classes\n", "| class | outcome |", "|---|---|"]
    lines += [f"| `{model}` | {one} |" for model, one in outcomes.items()]
    lines += ["", CALLS, "| pipeline | models | outcome |", "|---|---|---|"]
    lines += [f"| `{name}` | {names(denoisers(pipelines()[name]))} | {one} |" for name, one in pipes.items()]
    lines += ["", MODULAR, "| pipeline | models | outcome |", "|---|---|---|"]
    for pipe in modular_pipelines().values():
        own = [model for model in pipe.parts["models"] if model in outcomes and "Multi" not in model]
        reason = refusal(pipe.name)
        kinds_of = {outcomes[model].split(":")[0] for model in own}
        said = "swapped" if "swapped" in kinds_of else "refused: see its model"
        lines.append(f"| `{pipe.name}` | {names(own)} | {said if reason is None else f'refused: {reason}'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
