"""The README speaks of things that exist: names, commands, files."""

import ast
import inspect
import re
from pathlib import Path

import pytest
from typer.main import get_command

import diffattn
from diffattn.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md"]


def blocks(page: str, language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in fences if name == language]


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_use_public_names_and_real_options(page: str) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "diffattn":
                assert node.attr in diffattn.__all__, f"{page}: diffattn.{node.attr}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "diffattn.apply" and len(node.args) == 2:
                mechanism, known = node.args[1], set(inspect.signature(diffattn.apply).parameters)
                if isinstance(mechanism, ast.Constant):
                    options = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords if k.arg not in known}
                    diffattn.config.create(mechanism.value, **options)


def test_commands_in_the_readme_exist() -> None:
    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    named = re.findall(r"^diffattn ([\w-]+)", "\n".join(blocks("README.md", "")), flags=re.MULTILINE)
    assert set(named) == commands
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("README.md", "")), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", (ROOT / page).read_text()):
        assert (ROOT / link).exists(), f"{page}: {link}"
