"""The command line, `diffattn ...` or `python -m diffattn ...`."""

from collections.abc import Sequence

from . import commands as commands
from .frame import app as app


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script `diffattn`."""
    app(list(arguments) if arguments is not None else None, prog_name="diffattn")
