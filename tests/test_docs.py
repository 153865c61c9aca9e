"""Every Python block of the documents runs, page by page, from top to bottom."""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import stand_ins
import yaml

import diffattn
from diffattn import config

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
LANGUAGES = {"python", "text"}


def fences(page: Path) -> list[tuple[str, int, str]]:
    """(language, line of the first code line, code) of every fenced block."""
    text = page.read_text()
    found = re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [(match[1], text[: match.start(2)].count("\n"), match[2]) for match in found]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of the stand-in Flux under the names of those on the hub, written by `diffattn.save`."""
    pipe, files = stand_ins.flux(), {}
    for name, options in (
        ("clear_local_16", {"radius": 16}),
        ("clear_local_8_down_4", {"radius": 8, "down_factor": 4}),
    ):
        folder = tmp_path_factory.mktemp(name)
        with diffattn.apply(pipe, "clear", **options):
            diffattn.save(pipe, folder)
        [files[f"Huage001/CLEAR/{name}.safetensors"]] = folder.glob("*.safetensors")
    return files


@pytest.fixture
def own_registry() -> Iterator[None]:
    """Forget what a page registers."""
    before = dict(config._registry)
    yield
    config._registry.clear()
    config._registry.update(before)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_blocks_run(page: Path, adapters: dict[str, Path], own_registry: None) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    # diffusers asks for an autocast or a dtype now and then that the CPU does not have
    with stand_ins.hub(adapters), warnings.catch_warnings():
        for language, line, code in fences(page):
            assert language in LANGUAGES, f"{page.name}:{line}: no test runs a block in {language!r}"
            if language == "python":
                exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r"[\w/-]+\.md", yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])))
    assert named == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES}
