"""What is compared: a way to compute attention, as a text says it.

full                                            the model's own attention
clear radius=8 pool=4                           a mechanism and its options
routing quality=balanced start=0.2              with arguments of `apply`
softmax reuse=2                                 full attention in one of two steps
recipe=recipe.json                              a recipe
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .. import config
from ..options import Text, hints_of, read
from ..swap.apply import apply
from ..swap.settings.placement import Placement
from ..swap.settings.quality import with_level
from ..swap.settings.recipe import Recipe

FULL = "full"
APPLY = ("quality", *(name for name in Placement.__dataclass_fields__ if name not in ("components", "steps")))
"""Options of a setting that are arguments of `apply`; all others are the mechanism's."""


@dataclass(frozen=True)
class Setting:
    """One way to compute attention."""

    name: str
    mechanism: Any = None
    """What `apply` takes; None: the model's own attention."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `apply`."""

    @classmethod
    def parse(cls, text: str) -> "Setting":
        """Read a text as above; raises `ValueError` for all else."""
        words = text.split()
        if not words:
            raise ValueError("expected a setting, such as 'routing share=0.3 reuse=2', got nothing")
        first, *rest = words
        values = _values(rest, text)
        if first.startswith("recipe="):
            mechanism: Any = Recipe.load(first.partition("=")[2])
        elif first == FULL:
            mechanism = None
        else:
            config.lookup(first)
            mechanism = first
        placed = {name: _read(name, values.pop(name)) for name in [*values] if name in APPLY}
        if (mechanism is None and (values or placed)) or (isinstance(mechanism, Recipe) and values):
            raise ValueError(f"{first} has no options: leave {', '.join([*values, *placed])} out of {text!r}")
        if isinstance(mechanism, str) and "quality" not in placed:
            mechanism, values = config.create(mechanism, **values), {}
        made = cls(text, mechanism, {**values, **placed})
        Placement(**{name: value for name, value in placed.items() if name != "quality"})
        return made

    @property
    def meaning(self) -> str:
        """All that it says, with what a level or a recipe of this name says today."""
        if isinstance(self.mechanism, Recipe):
            return json.dumps([self.mechanism.to_dict(), self.options], default=str)
        options, places = dict(self.options), {}
        if options.get("quality") is not None:
            places = {name: options.pop(name) for name in [*options] if name in APPLY}
            with_level(self.mechanism, places.pop("quality"), options, places)
        return f"{self.mechanism or FULL} {dict(sorted({**options, **places}.items()))}"

    @contextlib.contextmanager
    def on(self, pipe: Any) -> Iterator[None]:
        """The pipeline under this setting."""
        if self.mechanism is None:
            yield
            return
        with apply(pipe, self.mechanism, **self.options):
            yield


def _values(words: list[str], text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name or name in found:
            raise ValueError(f"expected options as NAME=VALUE, each once, got {word!r} in {text!r}")
        found[name.replace("-", "_")] = Text(value)
    return found


def _read(name: str, value: Text) -> Any:
    hint = str if name == "quality" else hints_of(Placement)[name]
    return read(name, value, hint)
