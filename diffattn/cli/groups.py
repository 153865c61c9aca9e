"""Options of a command that are the fields of a dataclass: declared, explained and checked there alone.

    @app.command(groups=[Group("diffattn.media.clip:Clip", only_given=True)])
    def animate(context: typer.Context, ...):
        clip = Clip(path=driving, **taken(context, "Clip"))

A field with a `Help` in its annotation is an option. The class is imported when its command is used, so that the help
of others does not wait for it.
"""

import dataclasses
import inspect
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Literal

import typer

from ..options import Help, Must, Text, hints_of, read

_TYPER_READS = (bool, int, float, str)


@dataclass(frozen=True)
class Group:
    """The options that are fields of one dataclass.

    Args:
        where: "module:class".
        also: further fields, filled from the command's own parameters of the same names.
        without: fields with a `Help` that this command does not offer.
        only_given: hand over a dict of what was typed, instead of an instance: other values come from elsewhere.
    """

    where: str
    also: Collection[str] = ()
    without: Collection[str] = ()
    only_given: bool = False

    @property
    def name(self) -> str:
        """Of the class."""
        return self.where.partition(":")[2]

    def load(self) -> type:
        """The class."""
        module, _, name = self.where.partition(":")
        cls: type = getattr(import_module(module), name)
        return cls

    def fields(self) -> dict[str, tuple[Any, Help, Any]]:
        """Name -> type, help and default of each option."""
        cls = self.load()
        found = {}
        for field in dataclasses.fields(cls):
            hint = hints_of(cls)[field.name]
            helps = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Help)]
            if helps and field.name not in self.without:
                found[field.name] = hint, helps[0], field.default
        return found

    def options(self) -> list[Any]:
        """The options as click has them."""
        parameters = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=self._shown(default),
                annotation=_typed(name, hint, help_, default),
            )
            for name, (hint, help_, default) in self.fields().items()
        ]

        def command(**values: Any) -> None: ...

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        alone = typer.Typer(add_completion=False)
        alone.command()(command)
        return list(typer.main.get_command(alone).params)

    def _shown(self, default: Any) -> Any:
        """The default that click knows: none where only what was typed counts."""
        if self.only_given:
            return None
        return inspect.Parameter.empty if default is dataclasses.MISSING else default

    def read(self, values: dict[str, Any]) -> dict[str, Any]:
        """The fields from parsed values, which are taken out of `values`."""
        found = {}
        for name, (hint, help_, default) in self.fields().items():
            value = values.pop(name)
            if value is None and (default is None or self.only_given):
                continue
            if _kind(hint, default) is str and not _is_simple(_arms(hint)):
                value = read(help_.flag_of(name), Text(value), hint) if isinstance(value, str) else value
            elif any(isinstance(extra, Must) for extra in hint.__metadata__):
                value = read(help_.flag_of(name), value, hint)
            found[name] = value
        return found | {name: values[name] for name in self.also}


def taken(context: Any, name: str) -> Any:
    """What the options of the group `name` came to, in the command that runs."""
    return context.meta[f"diffattn.{name}"]


def keep(context: Any, groups: Collection[Group]) -> dict[str, Any]:
    """Move the values of groups from the parameters to what `taken` returns; all of them by name."""
    fields: dict[str, Any] = {}
    for group in groups:
        found = group.read(context.params)
        context.meta[f"diffattn.{group.name}"] = found if group.only_given else group.load()(**found)
        fields |= found
    return fields


def _arms(hint: Any) -> tuple[Any, ...]:
    """The types that a hint admits, without None."""
    if typing.get_origin(hint) is Annotated:
        return _arms(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return tuple(arm for arm in typing.get_args(hint) if arm is not type(None))
    return (hint,)


def _is_simple(arms: tuple[Any, ...]) -> bool:
    """Can typer read it by itself?"""
    return len(arms) == 1 and arms[0] in _TYPER_READS


def _kind(hint: Any, default: Any) -> Any:
    """What typer reads: simple types and choices; all others are text for `read`, and so are choices with "none"."""
    arms = _arms(hint)
    choice = len(arms) == 1 and typing.get_origin(arms[0]) is Literal and (default is None or not _admits_none(hint))
    return arms[0] if _is_simple(arms) or choice else str


def _typed(name: str, hint: Any, help_: Help, default: Any) -> Any:
    option = typer.Option(help_.flag_of(name), help=help_.text, rich_help_panel=help_.panel, metavar=help_.metavar)
    return Annotated[_kind(hint, default) | None, option]


def _admits_none(hint: Any) -> bool:
    if typing.get_origin(hint) is Annotated:
        return _admits_none(typing.get_args(hint)[0])
    return typing.get_origin(hint) in (types.UnionType, typing.Union) and type(None) in typing.get_args(hint)
