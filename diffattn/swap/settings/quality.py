"""One knob: how near and how fast, by name.

    diffattn.apply(pipe, "routing", quality="balanced")

A level is a setting as options of the mechanism and of `apply`. What is given beside it counts: `quality="fast",
reuse=1` is the fast setting without reuse.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ...options import shown

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Level:
    """Options of a mechanism, and of `apply`."""

    options: Options
    placement: Options = field(default_factory=dict)


LEVELS: Mapping[str, Mapping[str, Level]] = MappingProxyType(
    {
        "routing": MappingProxyType(
            {
                "high": Level({"top_share": 0.2, "blocks": 256, "chosen_by": "mean"}, {"start": 0.2}),
                "balanced": Level({"top_share": 0.05, "blocks": 256, "chosen_by": "mean"}, {"start": 0.2, "reuse": 2}),
                "fast": Level({"top_share": 0.03, "blocks": 64, "chosen_by": "mean"}, {"start": 0.2, "reuse": 3}),
            }
        )
    }
)
"""Mechanism -> quality -> level. `balanced` is what to begin with."""
INSTEAD: Options = MappingProxyType({"share": "top_share", "top_k": "top_share", "pool": "blocks", "steps": "start"})
"""An option given -> the level's own that it stands for."""


def with_level(mechanism: Any, quality: Any, options: dict[str, Any], placement: dict[str, Any]) -> None:
    """Fill in what a level says into `options` and `placement`, where they say nothing themselves.

    Raises `ValueError` for names that are not known, and for a config, which says all itself.
    """
    if not isinstance(mechanism, str) or mechanism not in LEVELS:
        raise ValueError(
            f"expected quality= with a mechanism by its short name, one of {', '.join(LEVELS)}; got {shown(mechanism)}"
        )
    levels = LEVELS[mechanism]
    if not isinstance(quality, str) or quality not in levels:
        raise ValueError(f"expected quality= of {', '.join(levels)}; got {shown(quality)}")
    level = levels[quality]
    own, place = dict(level.options), dict(level.placement)
    for given, said in INSTEAD.items():
        if {**options, **placement}.get(given) is not None:
            own.pop(said, None)
            place.pop(said, None)
    for given_there, level_says in ((options, own), (placement, place)):
        for name, value in level_says.items():
            if given_there.get(name) is None:
                given_there[name] = value
