"""The command line's frame: errors, the options that every command takes, `--version` and `--debug`.

Nothing heavy is imported before a command is used, so that the list of commands comes at once. Wrong input ends with
code 2 and one line on stderr, Ctrl-C with 130; `diffattn --debug ...` shows where an error came from.
"""

import contextlib
import inspect
import itertools
import math
import os
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from ..errors import DEBUG, INTERRUPTED, WRONG_INPUT, is_expected
from .around.config_files import INFINITE, OPTIONS, file_options, options_of, settle
from .around.quiet import quiet as quiet
from .around.quiet import set_up, show_steps
from .groups import Group, keep
from .ranks import is_first


class Commands(TyperGroup):
    """Reports errors as one line."""

    def main(self, args: Any = None, prog_name: str | None = None, *rest: Any, **options: Any) -> Any:
        """Run a command and leave with its exit code."""
        code: Any = 1
        try:
            code = super().main(args, prog_name, *rest, **{**options, "standalone_mode": False})
        except typer.Abort:
            code = INTERRUPTED
        except Exception as error:
            if not is_expected(error) or os.environ.get(DEBUG):
                raise
            complain(error)
            code = WRONG_INPUT
        if code == INTERRUPTED:
            typer.echo("diffattn: interrupted", err=True)
        sys.exit(code or 0)


class Command(TyperCommand):
    """Refuses values that can mean nothing: no numbers, and empty names of files.

    Takes options from `groups`, and from the file that `--config` names.
    """

    groups: ClassVar[tuple[Group, ...]] = ()
    files: ClassVar[Sequence[str]] = ("config",)
    """Which of `--config` and `--like` it has."""
    _complete = False

    def get_params(self, ctx: Any) -> list[Any]:
        """All parameters, those of the groups included, whose classes are imported now."""
        if not self._complete:
            with quiet() if self.groups else contextlib.nullcontext():
                grouped = [option for group in self.groups for option in group.options()]
            self.params = [*self.params, *grouped, *file_options(self.files)]
            self._complete = True
        return super().get_params(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments of one command."""
        typed = list(args)
        for name in ("--config", "--like"):
            if sum(text == name or text.startswith(f"{name}=") for text in args) > 1:
                raise ValueError(f"{name} is there twice: give one file")
        args, off = self._switched_off(ctx, args)
        rest = super().parse_args(ctx, args)
        settle(ctx)
        ctx.params.update(dict.fromkeys(off, False))
        for param in self.params:
            found = ctx.params.get(param.name)
            name = next((text for text in param.opts if text.startswith("--")), param.metavar or param.name)
            for value in found if isinstance(found, (list, tuple)) else (found,):
                check_number(name, value, param.name in INFINITE)
                if value == Path() and is_empty(name, typed):
                    raise ValueError(f"expected the name of a file or folder for {name}; got nothing; give one")
        values = {**ctx.params, **keep(ctx, self.groups)}
        ctx.meta[OPTIONS] = options_of(self, values)
        return rest

    def _switched_off(self, ctx: Any, args: list[str]) -> tuple[list[str], list[str]]:
        """The arguments without `--no-NAME` of switches, and those switches: a file may have switched them on."""
        switches = {
            f"--no-{name[2:]}": param.name
            for param in self.get_params(ctx)
            if getattr(param, "is_flag", False) and param.expose_value and not param.secondary_opts
            for name in param.opts
            if name.startswith("--")
        }
        end = args.index("--") if "--" in args else len(args)
        off = [switches[text] for text in args[:end] if text in switches]
        return [text for place, text in enumerate(args) if place >= end or text not in switches], off

    @property
    def hints(self) -> dict[str, Any]:
        """Parameter -> type, of the command's own and of the groups'."""
        own = typing.get_type_hints(inspect.unwrap(self.callback), include_extras=True) if self.callback else {}
        return own | {name: hint for group in self.groups for name, (hint, _, _) in group.fields().items()}


def check_number(name: str, value: Any, infinite: bool = False) -> None:
    """Raise `ValueError` for NaN, for infinity unless it has a meaning, and for integers beyond any use."""
    if isinstance(value, float) and not math.isfinite(value) and (math.isnan(value) or not infinite):
        raise ValueError(f"expected a finite number for {name}; got {value}; give another")
    if type(value) is int and value > MOST and name != "--seed":
        raise ValueError(f"expected a number of at most {MOST} for {name}; got {value}; give a smaller one")


def is_empty(name: str, typed: list[str]) -> bool:
    """Whether an option, or some argument, was typed as an empty text, which a path takes for the current folder."""
    if not name.startswith("--"):
        return "" in typed
    return f"{name}=" in typed or (name, "") in itertools.pairwise(typed)


def complain(error: Exception) -> None:
    """Print an error as one line."""
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    typer.echo(f"diffattn: error: {' '.join(text.split()) or type(error).__name__}", err=True)


class App(typer.Typer):
    """A `typer.Typer` whose commands are `Command`s."""

    def command(
        self,
        name: str | None = None,
        *,
        groups: Sequence[Group] = (),
        files: Sequence[str] = ("config",),
        **options: Any,
    ) -> Any:
        """See `typer.Typer.command`; `groups` are options that are declared by dataclasses, `files` as in `Command`."""
        cls = type("Command", (Command,), {"groups": tuple(groups), "files": tuple(files)})
        return super().command(name, **{"cls": cls, **options})


app = App(cls=Commands, rich_markup_mode="rich", add_completion=False, pretty_exceptions_enable=False)


def examples(*lines: str) -> str:
    """An epilog of commands, one a line."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  [cyan]$ {escape(line)}[/cyan]" for line in lines)])


_COMMON = "Every command takes"
MOST = 2**31 - 1
"""Of sizes and counts; torch has no words for some of those that are larger than its integers."""
MOST_THREADS = 1024
"""That a process may ask for."""
MOST_SEED = 2**63 - 1
"""That torch's generators take."""
Seed = Annotated[
    int,
    typer.Option(
        "--seed", min=0, max=MOST_SEED, help="Of all random numbers: same seed, same result.", rich_help_panel=_COMMON
    ),
]
UnusedSeed = Annotated[
    int,
    typer.Option(
        "--seed", min=0, max=MOST_SEED, help="Accepted as everywhere; nothing here is random.", rich_help_panel=_COMMON
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        max=MOST_THREADS,
        help="CPU threads. Default: torch's own; demo takes 1 for the bundled model.",
    ),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps, or auto.", rich_help_panel=_COMMON)]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="float32, bfloat16, float16, float64, or auto: bfloat16 on a GPU, else float32.",
        rich_help_panel=_COMMON,
    ),
]


def output_option(text: str) -> Any:
    """The option `--output` with a help text of the command's own."""
    return typer.Option("--output", help=text, rich_help_panel=_COMMON)


Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output that is there; without it that is refused.")
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-o", metavar="NAME=VALUE", help="Option of the mechanism, such as radius=16; repeatable."
    ),
]
Layers = Annotated[
    list[str] | None,
    typer.Option("--layers", metavar="GLOB", help="Only layers whose dotted name matches; repeatable."),
]
Grid = Annotated[str, typer.Option("--grid", metavar="GRID", help="In tokens: ROWSxCOLUMNS or FRAMESxROWSxCOLUMNS.")]


@app.callback(invoke_without_command=True, epilog=examples("diffattn demo", "diffattn COMMAND --help"))
def diffattn(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar=DEBUG, help="Show log lines and the origin of errors.")
    ] = False,
) -> None:
    """Attention that costs less, for the diffusion pipelines people already use."""
    if version:
        typer.echo(f"diffattn {own_version()}")
        raise typer.Exit()
    set_up(debug)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def opened(model: str, device: str, dtype: str, offload: bool = False) -> Any:
    """The pipeline on its device."""
    from .arguments import parse_device, parse_dtype
    from .checkpoints import open_pipeline

    where = parse_device(device)
    with quiet():
        pipe = open_pipeline(model, device=where, dtype=parse_dtype(dtype, where), offload=offload)
    show_steps(pipe, is_first())
    return pipe


def whole(numbers: Iterable[float]) -> tuple[float, ...]:
    """Numbers without a fraction as integers, which print shorter."""
    return tuple(int(number) if float(number).is_integer() else number for number in numbers)


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Compute with so many CPU threads (None: as many as before)."""
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before if count is None else count)
        yield
    finally:
        torch.set_num_threads(before)


def own_version() -> str:
    """The installed version; a bare checkout has none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("diffattn")
    except PackageNotFoundError:
        return "(not installed)"
