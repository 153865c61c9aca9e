"""Frozen config dataclasses <-> plain dicts and JSON, told apart by `"type"`.

A class joins with `@register("name")`; third parties do the same, or declare an entry point in the group
`diffattn.mechanisms` whose name is the short name and whose value is the class:

    [project.entry-points."diffattn.mechanisms"]
    stripes = "my_package:StripesAttention"
"""

import dataclasses
import inspect
import json
import logging
import re
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from . import options as typed

logger = logging.getLogger("diffattn")

ENTRY_POINT_GROUP = "diffattn.mechanisms"
OWN = "diffattn.mechanisms"
"""The module that registers the library's own, imported before names are looked up or taken."""

C = TypeVar("C", bound=type)
_registry: dict[str, type] = {}


def register(name: str) -> Callable[[C], C]:
    """Make a mechanism known by its short name: `@diffattn.register("stripes")` above a frozen dataclass.

    The class gets the name as its `type`. Registering another class under a taken name raises `ValueError`, a class
    that is no dataclass `TypeError`.
    """

    def add(cls: C) -> C:
        if "__dataclass_fields__" not in vars(cls):
            raise TypeError(
                f"{cls.__name__} is no dataclass: put @dataclass(frozen=True, kw_only=True) below @register"
            )
        import_module(OWN)
        known = _registry.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the name {name!r} is taken by {known.__module__}.{known.__qualname__}")
        cls.type = name  # type: ignore[attr-defined]
        _registry[name] = cls
        return cls

    return add


def registered() -> dict[str, type]:
    """Short name -> class of every known mechanism, entry points included, sorted by name.

    An entry point that cannot be loaded, or whose name is taken, is left out with a warning.
    """
    import_module(OWN)
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            _load(entry)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            logger.warning("left out the mechanism %r of %s: %s", entry.name, _origin(entry), error)
    return dict(sorted(_registry.items()))


def described() -> list[dict[str, Any]]:
    """Name, first line of the docstring, and options with type and default of every mechanism, as plain values."""
    found = []
    for name, cls in registered().items():
        hints = typed.hints_of(cls)
        options = [
            {"name": field.name, "expects": typed.describe(hints[field.name]), "default": _default(field)}
            for field in dataclasses.fields(cls)
            if field.init
        ]
        found.append({"name": name, "summary": (inspect.getdoc(cls) or "").split("\n")[0], "options": options})
    return found


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default is dataclasses.MISSING:
        return "required"
    return None if field.default is None else str(field.default)


def lookup(name: str) -> type:
    """The class registered under `name`; an unknown name raises `ValueError` with the known ones."""
    typed.read("the short name of a mechanism", name, str)
    import_module(OWN)
    entries = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in _registry and name in entries:
        try:
            _load(entries[name])
        except (ImportError, AttributeError) as error:
            raise ImportError(
                f"the mechanism {name!r} of {_origin(entries[name])} cannot be loaded: {error}"
            ) from error
    if name not in _registry:
        known = sorted({*_registry, *entries})
        raise ValueError(f"unknown mechanism {name!r}; known: {', '.join(known)}.{typed.suggest(name, known)}")
    return _registry[name]


def _load(entry: EntryPoint) -> None:
    if entry.name in _registry:
        cls = _registry[entry.name]
        if entry.value.replace(":", ".") != f"{cls.__module__}.{cls.__qualname__}":
            raise ValueError(f"the name is taken by {cls.__module__}.{cls.__qualname__}")
        return
    register(entry.name)(entry.load())


def _origin(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value


def create(name: str, **options: Any) -> Any:
    """Build the mechanism `name` with `options`, each read by the type of its field (`diffattn.options`).

    Raises `ValueError` for an unknown option, with the known ones, and for a value of another type.
    """
    cls = lookup(name)
    fields = {field.name: _required(field) for field in dataclasses.fields(cls) if field.init}
    for option in options:
        if option not in fields:
            known = ", ".join(fields) or "none"
            raise ValueError(f"{name} has no option {option!r}; its options: {known}.{typed.suggest(option, fields)}")
    missing = [field for field, required in fields.items() if required and field not in options]
    if missing:
        raise ValueError(
            f"{name} needs {', '.join(missing)}: for example diffattn.apply(pipe, {name!r}, {missing[0]}=...)"
        )
    return cls(**typed.read_fields(cls, options, name))


def to_dict(config: Any) -> dict[str, Any]:
    """`{"type": short name, field: value, ...}`; nested configs likewise, tuples as lists."""
    return {
        "type": config.type,
        **{f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init},
    }


def from_dict(values: dict[str, Any]) -> Any:
    """Undo `to_dict`; unknown names and options, and values of another type, raise `ValueError`."""
    if not isinstance(values, dict):
        raise ValueError(f'a mechanism config must be a dict with a "type", got {typed.shown(values)}')
    options = {key: _tupled(value) for key, value in values.items() if key != "type"}
    if "type" not in values:
        raise ValueError(f'a mechanism config needs a "type", got the keys {sorted(map(str, values))}')
    return create(values["type"], **options)


def from_text(text: str, wanted: str = "a mechanism must be written as name(option=value, ..)") -> Any:
    """A mechanism as it is written in a line, `clear(radius=8, pool=2)` or `linear`; undoes `str`.

    Another text raises `ValueError`, which says what is `wanted`.
    """
    found = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text)
    if found is None:
        raise ValueError(f"{wanted}, got {typed.shown(text)}")
    given = [option.partition("=") for option in _options(found[2] or "")]
    return create(found[1], **{name.strip(): typed.Text(value.strip()) for name, _, value in given})


def _options(text: str) -> list[str]:
    """NAME=VALUE texts; a value goes on to the next name, as in `mechanisms=linear,clear(radius=2), heads=..`."""
    options: list[str] = []
    for part in parted(text):
        if options and not re.match(r"\s*\w+\s*=", part):
            options[-1] += f",{part}"
        else:
            options.append(part)
    return options


def parted(text: str) -> list[str]:
    """At the commas outside brackets."""
    depth, parts = 0, [""]
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]


def to_json(config: Any) -> str:
    return json.dumps(to_dict(config))


def from_json(text: str) -> Any:
    """Undo `to_json`; `ValueError` for a text that is no JSON as well."""
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"a mechanism config must be JSON, got {typed.shown(text)}: {error}") from error
    return from_dict(values)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def plain(value: Any) -> Any:
    """An option's value as JSON has it: tuples as lists, nested configs as dicts."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return to_dict(value) if dataclasses.is_dataclass(value) else value


def _tupled(value: Any) -> Any:
    if isinstance(value, dict) and "type" in value:
        return from_dict(value)
    return tuple(_tupled(item) for item in value) if isinstance(value, list) else value
