"""Write docs/reference/commands.md: every command and its options, from the command line itself.

PYTHONPATH=. python scripts/documents/commands_page.py
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from diffattn.cli import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "commands.md"
HEADER = """\
# Commands

Every command of `diffattn` and its options, as `--help` shows them; `scripts/documents/commands_page.py` writes this
page. A wrong option is refused in one line, before anything is loaded; the exit status is then 2.
"""


def commands(group: Any, name: str = "diffattn") -> Iterator[tuple[str, Any]]:
    """Name and command of every leaf of the tree."""
    for part, command in sorted(group.commands.items()):
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} {part}")
        else:
            yield f"{name} {part}", command


def section(name: str, command: Any) -> str:
    """The text of a command: what it does, how it is called, a table of its options, examples."""
    text = inspect.cleandoc(command.help or "")
    params = command.get_params(command.context_class(command, info_name=name))  # those of its groups included
    arguments = [one for one in params if one.param_type_name == "argument"]
    given = " ".join(one.metavar or one.name.upper() for one in arguments)
    rows = ["| option | default | what |", "|---|---|---|"]
    rows += [row(one) for one in params if one.param_type_name == "option" and not one.hidden and one.name != "help"]
    usage = f"```text\n{name} {given} [options]\n```".replace("  ", " ")
    words = [f"`{one.metavar or one.name.upper()}`: {_plain(one.help)}" for one in arguments if one.help]
    return "\n\n".join([f"## `{name}`", text, usage, *words, "\n".join(rows)])


def row(option: Any) -> str:
    """One line of the table."""
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    default = option.default
    if default is None or default == () or callable(default) or default is False:
        cell = "required" if option.required else ""
    else:
        cell = f"`{getattr(default, 'value', default)}`"
    return f"| {names} | {cell} | {_plain(option.help)} |"


def _plain(text: str | None) -> str:
    """In one line, without the marks of the terminal's colours."""
    return re.sub(r"\[/?(dim|bold|italic|[a-z]+)\]", "", " ".join((text or "").split())).replace("|", "\\|")


def page() -> str:
    """The whole page."""
    parts = [section(name, command) for name, command in commands(get_command(app))]
    return HEADER + "\n" + "\n\n".join(parts) + "\n"


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
