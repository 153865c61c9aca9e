"""Run every mechanism on a tiny random model of every family and write the outcome as the table in README.md.

It writes docs/families.md as well, see `families_page`.

PYTHONPATH=.:tests python scripts/support_table.py
"""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from models import BUILDERS, Tiny, sana
from torch import nn

import diffattn
from diffattn import config
from diffattn.families import FAMILIES, family_of
from diffattn.mechanisms import Mechanism
from scripts import families_page

README = Path(__file__).parents[1] / "README.md"
MARKERS = "<!-- support table -->", "<!-- /support table -->"
OPTIONS = {
    "clear": {"radius": 2},
    "neighborhood": {"kernel_size": 3},
    "routing": {"top_k": 1, "tile": 2, "pool": 2},
}
"""Options of mechanisms that have no defaults for all of them, or none for grids as small as these."""


def mechanisms() -> list[Mechanism]:
    """One config of every mechanism in the package; those that others register are not its business."""
    known = {name: cls for name, cls in config.registered().items() if cls.__module__.startswith("diffattn.")}
    return [config.create(name, **OPTIONS.get(name, {})) for name in sorted(known)]


def runs(tiny: Tiny, mechanism: Mechanism) -> bool:
    """Does the mechanism take the family's layers by default? Then a forward must work."""
    try:
        handle = diffattn.apply(tiny.model, mechanism)
    except ValueError as refusal:
        if "can carry" not in str(refusal):
            raise
        return False
    with handle, torch.no_grad(), warnings.catch_warnings():
        # Mochi asks for an autocast that the CPU does not have
        warnings.filterwarnings("ignore", "In CPU autocast")
        output = tiny.run()
    unused = [layer.name for layer in handle.layers if not layer.reached]
    if unused or not output.isfinite().all():
        raise RuntimeError(
            f"{mechanism} on {type(tiny.model).__name__}: layers {unused} unused, or the output is not finite"
        )
    return True


def setter(models: list[nn.Module]) -> str:
    """Which of a family's models have diffusers' `set_attn_processor`?"""
    lacking = {type(model).__name__: None for model in models if not hasattr(model, "set_attn_processor")}
    if not lacking:
        return "yes"
    every = len(lacking) == len({type(model) for model in models})
    return "no" if every else f"yes, but {', '.join(f'`{name}`' for name in lacking)}"


def support_table(build: Callable[[str], Tiny] = lambda name: BUILDERS[name]()) -> str:
    """Markdown: a row per family, a column per mechanism."""
    columns = mechanisms()
    tinies = [build(name) for name in BUILDERS] + [sana()]
    lines = [
        f"| family | models | {' | '.join(f'`{column.type}`' for column in columns)} | `set_attn_processor` |",
        f"|---|---|{'---|' * (len(columns) + 1)}",
    ]
    for family in FAMILIES:
        own = [tiny for tiny in tinies if family_of(tiny.model) is family]
        if {type(tiny.model).__name__ for tiny in own} != set(family.models):
            raise RuntimeError(
                f"tests/models.py and tests/further must build every model of {family.name}: {', '.join(family.models)}"
            )
        cells = ["yes" if all([runs(tiny, column) for tiny in own]) else "no" for column in columns]
        cells.append(setter([tiny.model for tiny in own]) if "yes" in cells else "no")
        models = ", ".join(f"`{name}`" for name in family.models)
        lines.append(f"| {family.name} | {models} | {' | '.join(cells)} |")
    return "\n".join(lines)


def between_markers(text: str) -> re.Match[str]:
    """The table's place in the README."""
    match = re.search(rf"(?<={re.escape(MARKERS[0])}\n).*?(?=\n?{re.escape(MARKERS[1])})", text, re.DOTALL)
    if match is None:
        raise ValueError(f"README.md must hold {MARKERS[0]} and {MARKERS[1]}, each on its own line")
    return match


def main() -> None:
    text = README.read_text()
    place = between_markers(text)
    after = text[place.end() :].removeprefix("\n")
    README.write_text(f"{text[: place.start()]}{support_table()}\n{after}")
    families_page.main()


if __name__ == "__main__":
    main()
