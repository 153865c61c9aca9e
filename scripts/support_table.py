"""Run every mechanism on a tiny random model of every family and write the outcome as the table in README.md.

It writes docs/families.md as well, see `class_tables/families_page.py`.

PYTHONPATH=.:tests python scripts/support_table.py
"""

import re
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from models import BUILDERS, Tiny, sana

import diffattn
from diffattn import config
from diffattn.families import FAMILIES, family_of
from diffattn.mechanisms import Mechanism
from scripts.class_tables import families_page

README = Path(__file__).parents[1] / "README.md"
MARKERS = "<!-- support table -->", "<!-- /support table -->"
OPTIONS = {
    "clear": {"radius": 2},
    "hybrid": {"base": "clear(radius=2)"},
    "multi_axis": {"window": 2, "pool": 2},
    "global_context": {"window": 2},
    "neighborhood": {"kernel_size": 3},
    "per_head": {"mechanisms": "clear(radius=2),linear"},
    "routing": {"top_k": 1, "tile": 2, "pool": 2},
    "shifted_window": {"window": 2},
    "sla": {"top_share": 0.5, "tile": 4, "query_tile": 4},
    "vsa": {"top_share": 0.5, "tile": 2},
    "window_state": {"radius": 2},
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


def support_table(build: Callable[[str], Tiny] = lambda name: BUILDERS[name]()) -> str:
    """Markdown: the families on which every mechanism runs, and what does not run on the others."""
    columns = mechanisms()
    tinies = [build(name) for name in BUILDERS] + [sana()]
    whole, partly, lacking = [], [], set()
    for family in FAMILIES:
        own = [tiny for tiny in tinies if family_of(tiny.model) is family]
        if {type(tiny.model).__name__ for tiny in own} != set(family.models):
            raise RuntimeError(
                f"tests/models.py and tests/further must build every model of {family.name}: {', '.join(family.models)}"
            )
        classes: dict[type, list[set[str]]] = {type(tiny.model): [] for tiny in own}
        for tiny in own:
            classes[type(tiny.model)].append({column.type for column in columns if runs(tiny, column)})
        every = set.intersection(*(set.union(*ran) for ran in classes.values()))
        without = [column.type for column in columns if column.type not in every]
        lacking |= {type(tiny.model).__name__ for tiny in own if not hasattr(tiny.model, "set_attn_processor")}
        if without:
            partly.append(f"| {family.name} | {', '.join(f'`{name}`' for name in without)} |")
        else:
            whole.append(family.name)
    return "\n".join(
        [
            *textwrap.wrap(f"Every mechanism runs on {', '.join(whole)}.", 118, break_on_hyphens=False),
            "",
            "| family | not on its layers by default |",
            "|---|---|",
            *partly,
            "",
            *textwrap.wrap(
                "diffusers' own `set_attn_processor`, which `diffattn.apply` does not need, is missing in "
                f"{', '.join(f'`{name}`' for name in sorted(lacking))}.",
                118,
                break_on_hyphens=False,
            ),
        ]
    )


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
