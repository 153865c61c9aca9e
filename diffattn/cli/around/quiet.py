"""What reaches the terminal: a command's own lines, warnings of this library, and how far a long job is.

What other libraries say of extras that they miss does not, and diffusers' and transformers' own lines below errors do
not where they are known to mean nothing. `diffattn --debug` shows all of it.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import typer

from ...errors import CHATTY, DEBUG

PROGRESS = "diffattn.progress"
"""Logger of `diffattn.measure.progress`."""


class Said(logging.Handler):
    """Writes records as lines of the command."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        typer.echo(f"diffattn: {record.getMessage()}", err=True)


def set_up(debug: bool) -> None:
    """At the beginning of a command, before anything heavy is imported."""
    if debug:
        os.environ[DEBUG] = "1"
        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
        logging.getLogger("diffattn").setLevel(logging.INFO)
    else:
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
    progress = logging.getLogger(PROGRESS)
    progress.handlers, progress.propagate = [Said()], False
    progress.setLevel(logging.INFO)


def show_steps(pipe: Any, wanted: bool = True) -> None:
    """Let a pipeline of diffusers show its steps: by a bar on a terminal, else by lines."""
    from ...measure.progress import bar_options

    pipe.set_progress_bar_config(desc="steps", **bar_options(wanted))


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
