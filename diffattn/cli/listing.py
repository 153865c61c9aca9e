"""List what there is: mechanisms and their options, model families, kernels and whether they run here."""

from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from .. import config
from ..families import FAMILIES
from ..grid import TokenGrid
from ..kernels import BACKENDS
from ..kernels.call import WindowCall
from ..mechanisms import NeighborhoodAttention


def everything(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Plain lists of all three, for JSON."""
    return {"mechanisms": config.described(), "families": families(), "kernels": kernels(device, dtype)}


def families() -> list[dict[str, Any]]:
    """Name and model classes of every family."""
    return [{"name": family.name, "models": list(family.models)} for family in FAMILIES]


def kernels(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Name of every kernel, what it computes, and None or the reason why it does not run here."""
    tokens, grid = torch.empty(1, 1, 4, 8, device=device, dtype=dtype), TokenGrid(2, 2)
    call = WindowCall(tokens, tokens, tokens, grid, NeighborhoodAttention(kernel_size=2).pattern(grid), 1.0)
    both = {"dense", "flex"}
    found = [
        {"name": name, "serves": "all" if name in both else "windows", "why_not": backend.refuses(call)}
        for name, backend in BACKENDS.items()
    ]
    others = {"gather": "routing and pool=", "groups": "multi_axis, shifted_window"}
    return [*found, *({"name": name, "serves": serves, "why_not": None} for name, serves in others.items())]


def tables(found: dict[str, Any]) -> list[Table]:
    """The lists as tables."""
    first = Table("name", "what it is", "options (default)", title="Mechanisms", title_justify="left", show_lines=True)
    for mechanism in found["mechanisms"]:
        options = ", ".join(f"{option['name']} ({option['default']})" for option in mechanism["options"])
        first.add_row(mechanism["name"], escape(mechanism["summary"]), escape(options) or "none")
    second = Table("family", "models", title="Model families", title_justify="left")
    for family in found["families"]:
        second.add_row(family["name"], ", ".join(family["models"]))
    third = Table("backend", "for", "here", title="Kernels", title_justify="left")
    for kernel in found["kernels"]:
        here = "available" if kernel["why_not"] is None else escape(f"no: {kernel['why_not']}")
        third.add_row(kernel["name"], kernel["serves"], here)
    return [first, second, third]
