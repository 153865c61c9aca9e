"""A page for each mechanism, as the script writes it, with its image."""

import dataclasses
import re
from pathlib import Path

import pytest

from diffattn import config
from scripts.documents import mechanism_pages
from scripts.documents.mechanism_words import WORDS

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 40_000


def test_every_mechanism_of_the_package_has_a_page() -> None:
    known = {name for name, cls in config.registered().items() if cls.__module__.startswith("diffattn.")}
    assert set(WORDS) == known
    assert {page.stem for page in mechanism_pages.FOLDER.glob("*.md")} == known


@pytest.mark.parametrize("name", WORDS)
def test_a_page_is_what_the_script_writes(name: str) -> None:
    text = (mechanism_pages.FOLDER / f"{name}.md").read_text()
    assert text == mechanism_pages.page(name), "run scripts/documents/mechanism_pages.py"
    assert re.search(r"<https://arxiv\.org/abs/\d{4}\.\d{5}>", text), f"{name} names no source"
    image = mechanism_pages.FOLDER / f"{name}.png"
    assert image.stat().st_size <= LARGEST


def test_every_option_has_a_meaning() -> None:
    for name in WORDS:
        rows = re.findall(r"^\| `\w+` \|.*\|$", (mechanism_pages.FOLDER / f"{name}.md").read_text(), flags=re.MULTILINE)
        assert len(rows) == len(dataclasses.fields(config.lookup(name)))
        assert not [row for row in rows if re.search(r"\|\s*\|$", row)]


def test_the_overview_leads_to_every_page() -> None:
    text = mechanism_pages.OVERVIEW.read_text()
    assert [name for name in WORDS if f"(mechanisms/{name}.md)" not in text] == []
