"""Options from files: `--config FILE`, a table in JSON or TOML, and `--like RECORD`, what made an image.

    model = "tiny"
    prompt = "a red circle"
    swap_steps = "4:"
    mechanism = {type = "clear", radius = 4}

The names are those of the command line and of its arguments, without dashes before them; a mechanism is written as in
a file of distill, or as `mechanism = "clear"` and `option = {radius = 4}`. What is typed overrides the file, `--config`
over `--like`. Options of a mechanism are kept one by one, as long as the mechanism is the file's; its level of quality
goes with it. `--mechanism none` and `--no-compare` undo what a file says.
"""

import functools
import math
import operator
import types
import typing
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer

from ...files.records import Record, find_record, is_record
from ...files.tables import read_table
from ...options import known, read, shown

PLACES = ("output", "overwrite", "resume", "work", "keep", "save_every", "timeout", "preview", "force")
"""Options that say where and how something is written: `--like` leaves them out."""
EXCLUSIVE = (("mechanism", "adapter", "recipe"), ("prompt", "prompts"))
"""Options of which one is given: another one that is typed goes in the place of the file's."""
NONE = "none"
"""Of a mechanism, an adapter or a recipe: none of them."""
OPTIONS = "diffattn.options"
"""In the context's `meta`: all options, as `options_of` has them."""
FOREIGN = ("pipe_configs",)
"""Marks of files of other programs, which have no options of ours."""
INFINITE = ("growth",)
"""Options that take `inf`."""


def file_options(names: Sequence[str]) -> list[Any]:
    """Those of `--config` and `--like` that are named, as click has them."""

    def both(
        config: Annotated[
            Path | None,
            typer.Option(
                "--config",
                metavar="FILE",
                is_eager=True,
                callback=_take_config,
                help="Options from a JSON or TOML file, by their names; those that are typed override it.",
                rich_help_panel="Every command takes",
            ),
        ] = None,
        like: Annotated[
            Path | None,
            typer.Option(
                "--like",
                metavar="FILE",
                is_eager=True,
                callback=_take_record,
                help="The options that made an image or video, from the .json file beside it; --output is not among "
                "them.",
                rich_help_panel="Every command takes",
            ),
        ] = None,
    ) -> None: ...

    alone = typer.Typer(add_completion=False)
    alone.command()(both)
    found = [param for param in typer.main.get_command(alone).params if param.name in names]
    for param in found:
        param.expose_value = False
    return found


def _take_config(context: typer.Context, value: Path | None) -> Path | None:
    if value is not None:
        _join(context, checked(context, _options_in_file(context, value), value), over=True)
    return value


def _take_record(context: typer.Context, value: Path | None) -> Path | None:
    if value is not None:
        found, path = _options_like(context, value)
        _join(context, checked(context, found, path))
    return value


def _options_in_file(context: Any, path: Path) -> dict[str, Any]:
    """A table of options, or those of a record."""
    table = read_table(path)
    return options_in(Record.from_table(table, path), context, path) if is_record(table) else table


def _options_like(context: Any, value: Path) -> tuple[dict[str, Any], Path]:
    """The options of a record but those of places, and its file; other releases than here are told."""
    path = find_record(value)
    record = Record.read(path)
    found = {name: own for name, own in options_in(record, context, path).items() if name not in PLACES}
    if record.differences():
        typer.echo(f"diffattn: {path} was made by {', '.join(record.differences())}: the result may differ", err=True)
    return found, path


def take_own_config(context: typer.Context, value: Path | None) -> Path | None:
    """`--config` of a command that reads settings from the same file by itself: the other options are taken here."""
    if value is not None:
        own = _own(context, _options_in_file(context, value))
        _join(context, checked(context, own, value), over=True)
    return value


def take_own_record(context: typer.Context, value: Path | None) -> Path | None:
    """`--like` of such a command."""
    if value is not None:
        found, path = _options_like(context, value)
        _join(context, checked(context, _own(context, found), path))
    return value


def _own(context: Any, table: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of the command's own options, by text or number; settings of the same names are lists."""
    if any(name in table for name in FOREIGN):
        return {}
    grouped = {name for group in context.command.groups for name in group.fields()}
    names = {key_of(param) for param in context.command.params if param.name not in grouped} - {"config", "like"}
    plain = {name.replace("-", "_"): value for name, value in table.items() if not isinstance(value, (list, dict))}
    return {name: value for name, value in plain.items() if name in names}


def _join(context: Any, values: dict[str, Any], over: bool = False) -> None:
    """Put what a file says over, or under, what another one says."""
    others = dict(context.meta.get("diffattn.files", {}))
    lower, upper = (others, values) if over else (values, others)
    context.meta["diffattn.files"] = context.default_map = laid_over(lower, upper)


def laid_over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """The options of two places: those of `upper` count, and what they leave no sense to is left out."""
    found = dict(lower)
    for names in EXCLUSIVE:
        if upper.keys() & set(names):
            found = {name: value for name, value in found.items() if name not in names}
    found |= upper
    same = found.get("mechanism") == lower.get("mechanism")
    if not same and "quality" not in upper:
        found.pop("quality", None)
    mine = list(upper.get("option") or ())
    given = set(map(_name_in, mine))
    options = [text for text in lower.get("option") or () if same and _name_in(text) not in given] + mine
    found.pop("option", None)
    return found | ({"option": options} if options else {})


def options_in(record: Record, context: Any, path: Path) -> dict[str, Any]:
    """The options of a record, if the command is the one that left it."""
    if record.command != context.command.name:
        raise ValueError(
            f"{path} is the record of `diffattn {record.command}`, and this is `diffattn {context.command.name}`: use "
            "that command, or copy the options that both have into a file of their own"
        )
    return dict(record.options)


def checked(context: Any, table: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The values of a file by the names of the parameters, as click takes them; errors name the file and the option."""
    params = {key_of(param): param for param in context.command.params if param.expose_value}
    hints, table = context.command.hints, {name.replace("-", "_"): own for name, own in table.items()}
    table = distill_form(table, path)
    known(list(params), table, "option", f" in {path} of `diffattn {context.command.name}`")
    found = {}
    for key, value in table.items():
        param = params[key]
        own = as_typed(f"{path}: {key}", value, hints[param.name], param)
        try:
            param.process_value(context, own)
        except Exception as error:
            if not hasattr(error, "format_message"):
                raise
            reason = getattr(error, "message", "") or error.format_message() or "give at least one"
            raise ValueError(f"{path}: {key}: {reason}, got {shown(value)}") from error
        if own is not None:
            found[param.name] = own
    return found


def key_of(param: Any) -> str:
    """The name of a parameter in files: `swap_steps` for `--swap-steps`."""
    long = next((name for name in param.opts if name.startswith("--")), param.name)
    return str(long).lstrip("-").replace("-", "_")


def distill_form(table: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """With a mechanism and its options apart, where they are one table as in a file of distill."""
    mechanism = table.get("mechanism")
    if not isinstance(mechanism, dict):
        return dict(table)
    if "type" not in mechanism:
        raise ValueError(f'{path}: a table for mechanism needs its name as "type", got {shown(mechanism)}')
    options = table.get("option", {})
    own = [f"{name}={text_of(value)}" for name, value in mechanism.items() if name != "type"]
    return {**table, "mechanism": mechanism["type"], "option": [*own, *(named(options))]}


def named(options: Any) -> Any:
    """A table of options as NAME=VALUE texts; anything else as it is."""
    return [f"{name}={text_of(value)}" for name, value in options.items()] if isinstance(options, dict) else options


def as_typed(where: str, value: Any, hint: Any, param: Any) -> Any:
    """A value of a file as it would be typed, after a check against the option's type; None leaves the default."""
    several = getattr(param, "multiple", False) or param.nargs == -1
    value = named(value) if several else value
    if several and isinstance(value, str):
        value = [value]
    if several and not isinstance(value, (list, tuple, type(None))):
        raise ValueError(f"{where} must be a list, got {shown(value)}")
    if value == "inf" and param.name in INFINITE:
        value = math.inf
    if isinstance(value, float) and math.isinf(value) and param.name in INFINITE:
        return value
    if isinstance(value, float) and has_arm(hint, Fraction):
        value = str(value)  # a rate such as 29.97, which is no float to the library
    found = read(where, value, told(hint))
    if found == "" and told(hint) != hint:
        raise ValueError(f"{where}: expected the name of a file or folder, got nothing")
    if several:
        return None if found is None else [text_of(own) if not isinstance(own, (int, float)) else own for own in found]
    if found is None:
        return None if param.default is None else "none"
    return found if isinstance(found, (bool, int, float, str)) else text_of(found)


def text_of(value: Any) -> str:
    """A value as it is typed."""
    return ",".join(map(text_of, value)) if _is_flat(value) else str(value)


def _is_flat(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not any(isinstance(own, (list, tuple, dict, str)) for own in value)


def told(hint: Any) -> Any:
    """A type with text in the place of paths, which files have no words for."""
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if hint is Path:
        return str
    if origin is Annotated:
        return Annotated[(told(arms[0]), *hint.__metadata__)]
    if origin in (types.UnionType, typing.Union):
        return functools.reduce(operator.or_, map(told, arms))
    return list[told(arms[0])] if origin is list else hint  # type: ignore[misc]


def has_arm(hint: Any, kind: type) -> bool:
    """Is a type `kind`, or may it be that?"""
    return hint is kind or any(has_arm(own, kind) for own in typing.get_args(hint))


def settle(context: Any) -> None:
    """After parsing: what is typed over what a file says, and `none` for the model's own attention."""
    values = context.params
    for name in EXCLUSIVE[0]:
        if values.get(name) == NONE:
            values[name] = None
    files = context.meta.get("diffattn.files", {})
    if not files:
        return
    typed = {name for name in values if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"}
    both = laid_over(files, {name: values[name] for name in typed})
    values.update(dict.fromkeys(files.keys() - both.keys() - typed))
    if "option" in both:
        values["option"] = both["option"]


def _name_in(option: str) -> str:
    return option.partition("=")[0].strip().replace("-", "_")


def options_of(command: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that have a value, by their names in files."""
    given = {key_of(param): values.get(param.name) for param in command.params if param.expose_value}
    return {name: value for name, value in given.items() if value not in (None, (), [])}
