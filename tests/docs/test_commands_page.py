"""The page of the commands is what the command line says."""

import re

from typer.main import get_command

from diffattn.cli import app
from scripts.documents import commands_page


def test_the_page_is_what_the_script_writes() -> None:
    assert commands_page.PAGE.read_text() == commands_page.page(), "run scripts/documents/commands_page.py"


def test_every_command_and_its_groups_are_there() -> None:
    text = commands_page.PAGE.read_text()
    assert [name for name in get_command(app).commands if f"## `diffattn {name}" not in text] == []  # type: ignore[attr-defined]
    upscale = text.partition("## `diffattn upscale`")[2].partition("\n## ")[0]
    assert {"`--checkpoint`", "`--scale`", "`--steps`"} <= set(re.findall(r"`--[\w-]+`", upscale))
