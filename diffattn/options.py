"""Options read by the types they are declared with, whether given in Python, in a file or as text.

A dataclass declares what an option may be by its annotation: `bool`, `int`, `float`, `str`, `Literal[..]`, `X | None`,
tuples, named tuples and what `collections.abc` has for several of a kind; `Annotated[int, at_least(2)]` narrows it.
An annotation of another sort is not judged, and its values pass as they are.

    read("min_tokens", numpy.int64(64), int)     64
    read("proportional", Text("no"), bool)       False
    read("radius", "5", float)                   ValueError: radius must be a number, got '5'
"""

import ast
import collections.abc
import dataclasses
import difflib
import functools
import math
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

_NOTHING = ("none", "null")
_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_SEVERAL = (
    collections.abc.Iterable,
    collections.abc.Collection,
    collections.abc.Sequence,
    collections.abc.Set,
    list,
    set,
    frozenset,
)
_LONGEST = 120
"""Letters of a value that an error shows."""


class Text(str):
    """A value as it was typed (`-o proportional=no`): it is read by the type of the option that it is for."""

    __slots__ = ()


@dataclass(frozen=True)
class Must:
    """In `Annotated[type, Must(..)]`: what an option must be, in words for errors, and a test beside the type's."""

    words: str
    holds: Callable[[Any], bool] = lambda value: True
    """On values of the type, but None."""


@dataclass(frozen=True)
class Help:
    """In `Annotated[type, Help(..)]` of a field: what the option is, for readers and for the command line."""

    text: str
    flag: str | None = None
    """On the command line; None: the field's name."""
    panel: str | None = None
    """Heading that it stands under in `--help`."""
    metavar: str | None = None

    def flag_of(self, name: str) -> str:
        """`--decode-tile` for decode_tile."""
        return self.flag or "--" + name.replace("_", "-")


POSITIVE = Must("a positive number", lambda value: value > 0)
FINITE = Must("a finite number")


def at_least(least: int) -> Must:
    """An int that is not smaller."""
    return Must(f"an int of at least {least}", lambda value: value >= least)


class _Unfit(Exception):
    """A value is not of a type."""


def read(name: str, value: Any, hint: Any, words: str | None = None) -> Any:
    """`value` as plain Python of the type `hint`: NumPy's numbers, lists for tuples and `Text` are converted.

    Args:
        name: of the option, for the error.
        words: what it must be, for the error; None: by `hint`.

    Raises:
        ValueError: another type, NaN or infinity for a number, or a value that a `Must` refuses.
    """
    try:
        return _convert(value, hint)
    except _Unfit:
        raise ValueError(f"{name} must be {words or _expected(hint)}, got {shown(value)}") from None


def fits(value: Any, hint: Any) -> bool:
    """Is it of the type `hint`, whatever the hint's own `Must` says?"""
    try:
        _convert(value, typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint)
    except _Unfit:
        return False
    return True


def read_fields(cls: type, values: Mapping[str, Any], title: str = "") -> dict[str, Any]:
    """Values of fields of a dataclass, each read by its annotation; a field's own default is not judged.

    Args:
        title: what goes before the names in errors.
    """
    hints, fields = hints_of(cls), {field.name: field for field in dataclasses.fields(cls)}
    start = f"{title}: " if title else ""
    return {
        name: value if value is fields[name].default else read(f"{start}{name}", value, hints[name])
        for name, value in values.items()
    }


def check_fields(config: Any, title: str = "") -> None:
    """`read_fields` of a frozen dataclass that is being made: call it first in `__post_init__`."""
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
    for name, value in read_fields(type(config), own, title).items():
        if value is not own[name]:
            object.__setattr__(config, name, value)


C = TypeVar("C")


def changed(config: C, values: Mapping[str, Any]) -> C:
    """A frozen dataclass with other values of some fields, read by their types; unknown names raise `TypeError`."""
    names = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    for name in values:
        if name not in names:
            raise TypeError(f"unexpected argument {name!r}; known: {', '.join(names)}.{suggest(name, names)}")
    return dataclasses.replace(config, **read_fields(type(config), values))  # type: ignore[type-var]


def known(names: Collection[str], given: Collection[Any], what: str, where: str = "") -> None:
    """Raise `ValueError` for the first of `given` that is none of `names`."""
    for name in given:
        if name not in names:
            raise ValueError(f"unknown {what} {name!r}{where}; known: {', '.join(names)}.{suggest(name, names)}")


def suggest(name: Any, names: Collection[str]) -> str:
    """The nearest of `names`, as a question for the end of an error, or nothing."""
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields; `Any` for one whose text leads nowhere."""
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
        return {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    except Exception:  # an annotation kept as text, of a name that is out of reach, fails them all
        return {field.name: _evaluated(field.type, cls) for field in dataclasses.fields(cls)}


def _evaluated(hint: Any, cls: type) -> Any:
    holder = types.SimpleNamespace(__annotations__={"it": hint})
    for base in cls.__mro__:
        space = vars(sys.modules[base.__module__]) if base.__module__ in sys.modules else {}
        try:
            return typing.get_type_hints(holder, space, dict(vars(base)), include_extras=True)["it"]
        except Exception:
            continue
    return Any


def describe(hint: Any) -> str:
    """A type in words, for help and errors."""
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        Fraction: "a number or a fraction, such as 30000/1001",
        type(None): "none",
    }
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return describe(arms[0])
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(map(describe, arms)))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arms))
    if origin is tuple and arms[-1:] != (...,):
        return f"{len(arms)} values with commas between"
    return names.get(hint, "values with commas between, such as 4,8")


def _expected(hint: Any) -> str:
    """The words of the hint's own `Must`, or the type's."""
    own = [extra.words for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Must)]
    return own[0] if own else describe(hint)


def shown(value: Any) -> str:
    """A value in one line, for errors."""
    try:
        text = " ".join(repr(_literal(value) if isinstance(value, Text) else value).split())
    except Exception:  # an object that is half made, an int beyond sys.get_int_max_str_digits
        text = f"a value of the type {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, or `_Unfit`."""
    value = _without_numpy(value)
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _narrowed(_convert(value, arms[0]), hint.__metadata__)
    if origin in (types.UnionType, typing.Union):
        return _one_of_types(value, arms)
    if origin is typing.Literal:
        return _choice(value, arms)
    if hint in _SIMPLE:
        return _SIMPLE[hint](value)
    if origin is tuple or hint is tuple or origin in _SEVERAL:
        return _several(value, origin, arms)
    if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        return _named_tuple(value, hint)
    if hint is collections.abc.Callable or origin is collections.abc.Callable:
        return value if callable(value) else _refuse()
    return _literal(value) if isinstance(value, Text) else value


def _refuse() -> typing.NoReturn:
    raise _Unfit


def _without_numpy(value: Any) -> Any:
    """NumPy's scalars and arrays as Python's numbers and lists."""
    return value.tolist() if type(value).__module__ == "numpy" and hasattr(value, "tolist") else value


def _narrowed(value: Any, extras: tuple[Any, ...]) -> Any:
    if value is not None and not all(extra.holds(value) for extra in extras if isinstance(extra, Must)):
        raise _Unfit
    return value


def _one_of_types(value: Any, arms: tuple[Any, ...]) -> Any:
    """By the first type that fits; a text that says none is None before it is text."""
    for arm in sorted(arms, key=lambda arm: arm is not type(None)):
        try:
            return _convert(value, arm)
        except _Unfit:
            continue
    raise _Unfit


def _choice(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        same_kind = isinstance(value, bool) == isinstance(choice, bool)
        if str(choice) == value if isinstance(value, Text) else same_kind and choice == value:
            return choice
    raise _Unfit


def _none(value: Any) -> None:
    if value is not None and not (isinstance(value, Text) and value.lower() in _NOTHING):
        raise _Unfit


def _bool(value: Any) -> bool:
    if isinstance(value, Text) and value.lower() in _TRUTH:
        return _TRUTH[value.lower()]
    return value if isinstance(value, bool) else _refuse()


def _int(value: Any) -> int:
    if isinstance(value, Text):
        try:
            return int(value)
        except ValueError:
            raise _Unfit from None
    return value if isinstance(value, int) and not isinstance(value, bool) else _refuse()


def _float(value: Any) -> float:
    """Finite; whole numbers stay ints, for `radius=3` reads better than 3.0."""
    try:
        if isinstance(value, Text):
            number = float(value)
            if math.isfinite(number):
                return int(number) if number.is_integer() and "." not in value else number
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return value
    except (ValueError, OverflowError):
        pass
    raise _Unfit


def _fraction(value: Any) -> Fraction:
    """`25`, `29.97`, `30000/1001`."""
    try:
        return Fraction(value) if isinstance(value, (str, int, Fraction)) else _refuse()
    except (ValueError, ZeroDivisionError):
        raise _Unfit from None


def _str(value: Any) -> str:
    return str(value) if isinstance(value, str) else _refuse()


def _slice(value: Any) -> slice:
    """Of whole numbers, and of no steps of 0."""
    if not isinstance(value, slice):
        raise _Unfit
    parts = [None if part is None else _int(_without_numpy(part)) for part in (value.start, value.stop, value.step)]
    return slice(*parts) if parts[2] != 0 else _refuse()


_SIMPLE: dict[Any, Callable[[Any], Any]] = {
    bool: _bool,
    int: _int,
    float: _float,
    str: _str,
    Fraction: _fraction,
    slice: _slice,
    type(None): _none,
    None: _none,
}


def _several(value: Any, origin: Any, arms: tuple[Any, ...]) -> tuple[Any, ...]:
    """A tuple of any number of values, or of as many as there are types."""
    items = _items(value, arms) if isinstance(value, Text) else _iterated(value, origin in (tuple, None))
    if origin is tuple and arms[-1:] != (...,):
        if len(items) != len(arms):
            raise _Unfit
        return tuple(_convert(item, arm) for item, arm in zip(items, arms, strict=True))
    return tuple(_convert(item, arms[0] if arms else Any) for item in items)


def _iterated(value: Any, from_tuple: bool) -> tuple[Any, ...]:
    """The values in `value`: a tuple or list, else anything but text that can be gone through."""
    kinds = (tuple, list) if from_tuple else collections.abc.Iterable
    if isinstance(value, (str, bytes)) or not isinstance(value, kinds):
        raise _Unfit
    try:
        return tuple(value)
    except TypeError:  # a tensor without axes
        raise _Unfit from None


def _items(text: Text, arms: tuple[Any, ...]) -> tuple[Any, ...]:
    """`4,8`, `(4, 8)`, or Python literals in one another; texts may have commas, so that of texts is a single one."""
    bare = text.strip()
    inner = bare[1:-1] if bare[:1] in ("(", "[") and bare[-1:] in (")", "]") else bare
    if str not in arms and not set("()[]{}'\"") & set(inner):
        parts = [part.strip() for part in inner.split(",")]
        if parts[-1] == "" and (len(parts) == 1 or inner != bare):  # nothing at all, or the tuple (4,)
            parts.pop()
        return tuple(map(Text, parts))
    value = _literal(bare)
    if isinstance(value, (tuple, list)):
        return tuple(value)
    if str not in arms:
        raise _Unfit
    return (str(bare),) if bare else ()


def _literal(text: str) -> Any:
    """A Python literal, else the text."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return str(text)


def _named_tuple(value: Any, cls: Any) -> Any:
    items = _items(value, ()) if isinstance(value, Text) else value
    least = len(cls._fields) - len(cls._field_defaults)
    if not isinstance(items, (tuple, list)) or not least <= len(items) <= len(cls._fields):
        raise _Unfit
    hints = typing.get_type_hints(cls, include_extras=True)
    return cls(*(_convert(item, hints[name]) for item, name in zip(items, cls._fields, strict=False)))
