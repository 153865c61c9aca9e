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
                "high": Level({"top_share": 0.3, "chosen_by": "mean"}),
                "balanced": Level({"top_share": 0.1, "pool": 8, "chosen_by": "mean"}, {"reuse": 2}),
                "fast": Level({"top_share": 0.05, "pool": 8, "chosen_by": "mean"}, {"reuse": 3}),
            }
        )
    }
)
"""Mechanism -> quality -> level. `balanced` is what to begin with."""


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
    own = dict(level.options)
    if options.keys() & {"share", "top_k"}:
        own.pop("top_share", None)
    for given, said in ((options, own), (placement, level.placement)):
        for name, value in said.items():
            if given.get(name) is None:
                given[name] = value
