"""Weights that lean with an option of the mechanism: one training for several settings.

    W(x) = W + t S,   t = 2 log(x / a) / log(b / a) - 1

x is the option's value, from the least, a, that was trained (t = -1) to the largest, b (t = 1); beyond these t stays at
its end. Every trained weight of the model has a slope S beside it, zero before training, in the file as `NAME.slope`.
`load` writes W(x) into the model, so what a call costs is the same as without.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..mechanisms.base import Mechanism
from ..options import shown
from .files import Adapter

SUFFIX = ".slope"
"""Of a slope's name, after its weight's."""


def check_leaning(drawn: Mapping[str, Sequence[Any]]) -> None:
    """Raise `ValueError` unless what is drawn is one option whose values are positive numbers."""
    values = [value for own in drawn.values() for value in (own if isinstance(own, (list, tuple)) else ())]
    if len(drawn) != 1 or not all(map(_is_positive, values)) or len(set(values)) < 2:
        raise ValueError(
            f"slopes need one option with several positive numbers, such as radius: 3, 4, 6; got {shown(dict(drawn))}"
        )


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def place(mechanism: Mechanism, drawn: Mapping[str, Sequence[Any]]) -> float:
    """Where a mechanism's option lies among the values that were drawn: -1 at the least, 1 at the largest.

    Raises `ValueError` for a mechanism without that option, or where it is no positive number.
    """
    [(name, values)] = drawn.items()
    least, most, given = min(values), max(values), getattr(mechanism, name, None)
    if not _is_positive(given):
        raise ValueError(f"slopes lean with {name}, a positive number; {mechanism} has {shown(given)}: give {name}=...")
    own = min(max(given, least), most)
    return 2 * math.log(own / least) / math.log(most / least) - 1


def is_sloped(adapter: Adapter) -> bool:
    """Has the file slopes?"""
    return any(name.endswith(SUFFIX) for name in adapter.shapes)


def with_slopes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The names of weights that lean, and their slopes', with their shapes."""
    return {**shapes, **{name + SUFFIX: shape for name, shape in shapes.items()}}


class Leaning:
    """Reads a file's weights at one setting; those without a slope as they are."""

    def __init__(self, adapter: Adapter, mechanism: Mechanism) -> None:
        check_leaning(adapter.drawn)
        self._adapter, self._place = adapter, place(mechanism, adapter.drawn)

    def __call__(self, name: str) -> Tensor:
        found = self._adapter.tensor(name)
        if name + SUFFIX not in self._adapter.shapes:
            return found
        return found + self._place * self._adapter.tensor(name + SUFFIX)
