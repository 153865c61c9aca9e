"""The command line's frame: errors, the options that every command takes, `--version` and `--debug`.

Nothing heavy is imported before a command runs, so that `--help` answers at once. Wrong input ends with code 2 and one
line on stderr, Ctrl-C with 130; `diffattn --debug ...` shows where an error came from.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

DEBUG = "DIFFATTN_DEBUG"
CHATTY = ("torchao", "torch.utils._pytree")
"""Loggers that warn of missing GPU kernels whenever diffusers finds torchao installed."""
WRONG_INPUT, INTERRUPTED = 2, 130
EXPECTED_ERRORS = (ValueError, TypeError, ImportError, OSError, NotImplementedError, MemoryError)
"""What the library raises for wrong input, files that cannot be read or written, and extras that are missing."""


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
            if not (hasattr(error, "format_message") or isinstance(error, EXPECTED_ERRORS)) or os.environ.get(DEBUG):
                raise
            complain(error)
            code = WRONG_INPUT
        if code == INTERRUPTED:
            typer.echo("diffattn: interrupted", err=True)
        sys.exit(code or 0)


def complain(error: Exception) -> None:
    """Print an error as one line."""
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    typer.echo(f"diffattn: error: {' '.join(text.split()) or type(error).__name__}", err=True)


app = typer.Typer(cls=Commands, rich_markup_mode="rich", add_completion=False, pretty_exceptions_enable=False)


def examples(*lines: str) -> str:
    """An epilog of commands, one a line."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  [cyan]$ {escape(line)}[/cyan]" for line in lines)])


_COMMON = "Every command takes"
Seed = Annotated[
    int, typer.Option("--seed", min=0, help="Of all random numbers: same seed, same result.", rich_help_panel=_COMMON)
]
UnusedSeed = Annotated[
    int, typer.Option("--seed", min=0, help="Accepted as everywhere; nothing here is random.", rich_help_panel=_COMMON)
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
    if debug:
        os.environ[DEBUG] = "1"
        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
        logging.getLogger("diffattn").setLevel(logging.INFO)
    else:
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def opened(model: str, device: str, dtype: str, offload: bool = False) -> Any:
    """The pipeline on its device."""
    from .arguments import parse_device, parse_dtype
    from .checkpoints import open_pipeline

    where = parse_device(device)
    with quiet():
        return open_pipeline(model, device=where, dtype=parse_dtype(dtype, where), offload=offload)


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


@contextlib.contextmanager
def quiet(ours: bool = False) -> Iterator[None]:
    """Silence what diffusers and transformers say below errors, and with `ours` this library's warnings too."""
    if os.environ.get(DEBUG):
        yield
        return
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    libraries = (transformers_logging, diffusers_logging)
    levels = [library.get_verbosity() for library in libraries]
    own = logging.getLogger("diffattn")
    own_level = own.level
    try:
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
        own.setLevel(logging.ERROR if ours else own_level)
        yield
    finally:
        own.setLevel(own_level)
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()


def own_version() -> str:
    """The installed version; a bare checkout has none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("diffattn")
    except PackageNotFoundError:
        return "(not installed)"
