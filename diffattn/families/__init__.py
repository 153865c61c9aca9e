"""One row per diffusers model family: which layers may be swapped, and where their tokens lie.

A row names the model classes, the attention layers (regular expressions on dotted module names, with the kind of each)
and the reader that turns the arguments of a module's forward into a `Layout`. Nothing else of a family is needed:
projections, norms, rotary embeddings and masks stay with its own processor (`diffattn.swap.intercept`).

A layer's tokens are its grid cells and the rest, on one side or both. The grid comes from the reader, the number of
tokens from the call itself, so text lengths are never read. Where no other tokens come along, the row says so, and any
that come are an error: they would be taken for text.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from . import audio_transformers, controlnets, image_transformers, unets, video_transformers
from .layout import Arguments, Family, Layers, Layout, Read, TokenPath, arguments, find_layers, owner_of
from .readers import feature_map, flux2_ids, flux_ids, frames_of, picture, video
from .refused import REFUSED

__all__ = [
    "FAMILIES",
    "REFUSED",
    "Arguments",
    "Family",
    "Layers",
    "Layout",
    "Read",
    "TokenPath",
    "arguments",
    "describe",
    "family_of",
    "feature_map",
    "find_layers",
    "flux2_ids",
    "flux_ids",
    "frames_of",
    "owner_of",
    "picture",
    "row_of",
    "video",
]

FAMILIES: list[Family] = [
    *image_transformers.ROWS,
    *video_transformers.ROWS,
    *audio_transformers.ROWS,
    *controlnets.ROWS,
    *unets.ROWS,
]
"""All known families; `FAMILIES.append(Family(...))` adds one at run time."""

describe: Callable[..., Any]
"""`diffattn.describe`: what a row for a model without one needs."""


def __getattr__(name: str) -> Any:
    """`describe` tries rows out, so it is built on the swap, which this part may not import: the package has it."""
    if name != "describe":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return sys.modules[__name__.partition(".")[0]].describe


def row_of(model: object) -> Family | None:
    """The row of a model, by the names of its class and base classes; None where there is none."""
    names = {cls.__name__ for cls in type(model).__mro__}
    return next((family for family in FAMILIES if not names.isdisjoint(family.models)), None)


def family_of(model: nn.Module) -> Family:
    """The same; unknown ones raise `ValueError`."""
    family, names = row_of(model), [cls.__name__ for cls in type(model).__mro__]
    if family is not None:
        return family
    for name in names:
        if name in REFUSED:
            raise ValueError(
                f"{type(model).__name__} has no row in diffattn.families.FAMILIES: {REFUSED[name]}; run it as it is"
            )
    known = ", ".join(sorted(name for family in FAMILIES for name in family.models))
    raise ValueError(
        f"{type(model).__name__} belongs to no known model family; known: {known}. "
        f"A family is one row: see CONTRIBUTING.md, and diffattn.families.FAMILIES"
    )
