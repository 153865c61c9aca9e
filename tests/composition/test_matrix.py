"""The matrix of compositions says what the tests say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import composition_table
from scripts.composition_table import Cell

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
PAGE = ROOT / "docs" / "composition.md"


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: pytest collects the tests there."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_every_test_here_fills_a_cell(request: pytest.FixtureRequest) -> None:
    items = [item for item in request.session.items if item.path.parent == FOLDER and item.path != Path(__file__)]
    for item in items:
        composition_table.labels(item)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the page's matrix is that of a machine without a GPU")
@pytest.mark.slow
def test_the_page_has_the_matrix() -> None:
    result = run("scripts/composition_table.py", PAGE, "--check")
    assert result.returncode == 0, f"run PYTHONPATH=.:tests python scripts/composition_table.py {PAGE}\n{result.stderr}"


def test_markdown() -> None:
    cells = {
        ("LoRA", "SD1.5"): Cell("works", runs=True),
        ("LoRA", "Flux"): Cell("works", {"fused": None}, {"needs a GPU": None}, runs=True),
        ("Ring", "Flux"): Cell("refused", {"keys come in pieces": None}, runs=True),
        ("Quantized", "SD1.5"): Cell("works", {}, {"needs torchao": None}),
        ("Quantized", "Flux"): Cell("refused", {"keys come in pieces": None}, runs=True),
    }
    assert composition_table.markdown(cells).splitlines() == [
        "| | Flux | SD1.5 |",
        "|---|:-:|:-:|",
        "| LoRA | ✓ (1) | ✓ |",
        "| Ring | ✗ (2) |  |",
        "| Quantized | ✗ (2) | ○ (3) |",
        "",
        composition_table.LEGEND,
        "",
        "1. fused; partly not run here: needs a GPU",
        "2. keys come in pieces",
        "3. needs torchao",
    ]


TESTS = """
import pytest

@pytest.mark.cell("A", outcome="works", note="by blocks")
@pytest.mark.parametrize("family", ["Flux", "Wan"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_a(family, order): ...

@pytest.mark.cell("A", family="Flux", outcome="works")
@pytest.mark.skipif(True, reason="needs a moon")
def test_more_of_a(): ...

@pytest.mark.cell("B", family="Wan", outcome="refused", note="it cannot")
@pytest.mark.skip("too late")
def test_b(): ...

@pytest.mark.cell("C", family="Wan", outcome="works")
@pytest.mark.skipif(False, reason="never")
def test_c(): ...
"""


def test_cells_are_those_of_the_tests(tmp_path: Path) -> None:
    (tmp_path / "test_cells.py").write_text(TESTS)
    program = "import sys; from pathlib import Path; from scripts.composition_table import cells_of, collect; "
    program += "print(cells_of(collect(Path(sys.argv[1]))))"
    result = run("-c", program, tmp_path)
    cells = {
        ("A", "Flux"): Cell("works", {"by blocks": None}, {"needs a moon": None}, runs=True),
        ("A", "Wan"): Cell("works", {"by blocks": None}, runs=True),
        ("B", "Wan"): Cell("refused", {"it cannot": None}, {"too late": None}),
        ("C", "Wan"): Cell("works", runs=True),
    }
    assert result.stdout == f"{cells}\n", result.stderr


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        (pytest.mark.cell(family="Flux", outcome="works"), "expected cell(feature, family="),
        (pytest.mark.cell("A", family="Flux", outcome="works", colour="red"), "expected cell(feature, family="),
        (pytest.mark.cell("A", outcome="works"), "needs family="),
        (pytest.mark.cell("A", family="Flux"), "outcome must be 'works' or 'refused', got None"),
        (pytest.mark.cell("A", family="Flux", outcome="refused"), "needs note="),
    ],
    ids=["feature", "unknown", "family", "outcome", "note"],
)
def test_markers_that_say_too_little(mark: pytest.MarkDecorator, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        composition_table.read_marker("test_it", mark.mark, None)


def test_the_matrix_is_put_between_the_markers() -> None:
    start, end = composition_table.MARKERS
    text = f"before\n{start}\nold\n{end}\nafter\n"
    new = composition_table.with_matrix(text, "| new |")
    assert new == f"before\n{start}\n\n| new |\n\n{end}\nafter\n"
    assert composition_table.with_matrix(new, "| new |") == new
    with pytest.raises(ValueError, match="must hold <!-- composition matrix -->"):
        composition_table.with_matrix("before\nafter\n", "| new |")
