"""What the page on troubleshooting quotes is what the library says."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
QUOTES = re.findall(r"^```text\n(.*?)\n```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
ANY = "..."


def spoken(node: ast.AST) -> str | None:
    """A text of the source with `...` for what is put into it; None for what is no text."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else ANY for part in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%(\.\d+)?[sdrf]", ANY, node.value)
    return None


@cache
def sayings() -> str:
    """All texts of the library, one a line."""
    files = [file for folder in ("diffattn", "pipelines", "distill") for file in (ROOT / folder).rglob("*.py")]
    texts = (spoken(node) for file in files for node in ast.walk(ast.parse(file.read_text())))
    return "\n".join(" ".join(text.split()) for text in texts if text)


@pytest.mark.parametrize("quote", QUOTES, ids=lambda quote: quote[:60])
def test_quoted_lines_are_in_the_source(quote: str) -> None:
    assert "\n" not in quote
    assert quote in sayings()


def test_there_are_quotes() -> None:
    assert len(QUOTES) > 20


@pytest.mark.parametrize(
    ("source", "said"),
    [("f'{a} of {b:.0%}: no'", "... of ...: no"), ("'%d of %s, %.2f'", "... of ..., ..."), ("'plain'", "plain")],
)
def test_values_are_left_open(source: str, said: str) -> None:
    assert spoken(ast.parse(source, mode="eval").body) == said
