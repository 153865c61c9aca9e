"""The README speaks of things that exist: names, commands, files."""

import ast
import importlib.util
import inspect
import json
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


def test_figures_of_the_levels_are_the_measured_ones() -> None:
    file = ROOT / "scripts" / "numbers" / "measured_numbers.py"
    spec = importlib.util.spec_from_file_location("measured_numbers", file)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    begin, end = script.MARKERS
    shown = (ROOT / "README.md").read_text().partition(begin)[2].partition(end)[0].strip()
    assert shown == script.levels_table(json.loads((ROOT / "docs" / "numbers.json").read_text()))
    assert shown.count("\n") >= 4


@pytest.mark.parametrize("case", ["flux-256", "flux-512", "levels-512", "levels-1024", "wan-48"])
def test_levels_are_faster_and_further_in_their_order(case: str) -> None:
    values = json.loads((ROOT / "docs" / "numbers.json").read_text())["cases"][case]["settings"]
    found = {line["setting"]: line for line in values}
    levels = [found[f"routing quality={name}"] for name in ("high", "balanced", "fast")]
    speed, fidelity = [line["speedup"] for line in levels], [line["median_psnr"] for line in levels]
    assert speed == sorted(speed) and fidelity == sorted(fidelity, reverse=True)
