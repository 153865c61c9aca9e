"""The page of `diffattn web` in both themes, at a desk's and a phone's width: every tab, filled and drawn, in Chromium.

    PYTHONPATH=. python scripts/documents/web_images.py --output outputs/web
    PYTHONPATH=. python scripts/documents/web_images.py --docs      docs/web.png too

Twenty images, to be looked at after the style changed. A comparison, a short run of training and two clips are made
first, where they are not in the folder yet.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from diffusers import FluxPipeline, WanPipeline
from playwright.sync_api import Page, sync_playwright

from diffattn import tiny
from diffattn.web import Model, serve

ROOT = Path(__file__).resolve().parents[2]
WIDTHS, THEMES = (1280, 390), ("light", "dark")
PROMPT = "a blue ring in the center on a yellow background"
PROMPTS = [PROMPT, "a red circle on a green background"]
SETTINGS = ("clear radius=3", "clear radius=3 pool=2", "routing share=0.5")
RUN = ["distill", "run", "--preset", "tiny", "--no-evaluate", "-s", "steps=40", "-s", "sheet_every=20"]
CLIP = ["generate", "tiny:wan", "--prompt", "a red square that moves to the right", "--steps", "8", "--frames", "17"]
"""Commands whose results the page shows."""
PATIENCE = 120_000
"""Milliseconds."""
SMALL = {"Height": 128, "Width": 128, "Steps": 4}


def make(folder: Path) -> None:
    """What is not in the folder yet."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    compared = ["compare", "tiny", "--prompts", str(prompts), "--steps", "6"]
    commands = {
        "compared": compared + [word for own in SETTINGS for word in ("--setting", own)],
        "run": RUN,
        "full": CLIP,
        "near": [*CLIP, "--mechanism", "clear", "-o", "radius=4", "-o", "pool=(1,3,3)"],
    }
    for name, words in commands.items():
        if not (folder / name).exists():
            print(f"diffattn {' '.join(words)}")
            command = [sys.executable, "-m", "diffattn", *words, "--output", str(folder / name)]
            subprocess.run(command, check=True, cwd=ROOT)


def fill(page: Page, **values: Any) -> None:
    """Fields that are shown, by the beginning of their labels."""
    for name, value in values.items():
        page.get_by_label(re.compile(rf"^\s*{name.replace('_', ' ')}\b")).locator("visible=true").first.fill(str(value))


def draw(page: Page, name: str, shown: str) -> None:
    """Press a tab's button, and wait for what it makes."""
    page.click(f"#{name}-draw")
    page.wait_for_selector(f"#{name}-result {shown}")


def compare(page: Page) -> None:
    fill(page, Prompt=PROMPT, **SMALL, Options_of_B="radius=3 pool=2")
    draw(page, "compare", ".da-wipe")


def token(page: Page) -> None:
    fill(page, Prompt=PROMPT, **SMALL, Options="share=0.5 tile=2 pool=2", Step=2, Row=8, Column=8)
    draw(page, "token", ".da-map")


def frontier(page: Page) -> None:
    page.wait_for_selector("#frontier-images .da-wipe")


def video(page: Page) -> None:
    fill(page, Frames=9, Steps=4)
    draw(page, "video", ".da-player")


def distill(page: Page) -> None:
    page.wait_for_selector("#distill-losses polyline")


TABS: dict[str, tuple[str, Callable[[Page], None]]] = {
    "compare": ("Compare", compare),
    "token": ("What a token sees", token),
    "frontier": ("Speed and fidelity", frontier),
    "video": ("Video", video),
    "distill": ("Distill", distill),
}


def reach(page: Page, tab: str) -> None:
    """Open a tab, which is behind a button where there is no room."""
    found = page.get_by_role("tab", name=tab).locator("visible=true")
    if found.count():
        found.first.click()
        return
    page.locator(".overflow-menu > button").click()
    page.locator(".overflow-dropdown button", has_text=tab).click()


@contextmanager
def browser() -> Iterator[Any]:
    """Debian's Chromium, without a window."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        raise SystemExit("Chromium is missing: apt-get install chromium")
    with sync_playwright() as driver:
        own = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield own
        own.close()


def photograph(page: Page, output: Path, tabs: Sequence[str], look: str) -> None:
    """Every tab once, whole."""
    for name in tabs:
        label, prepare = TABS[name]
        reach(page, label)
        prepare(page)
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)
        page.screenshot(path=output / f"{name}-{look}.png", full_page=True)
        print(output / f"{name}-{look}.png")


def main(
    output: Annotated[Path, typer.Option(help="Folder of the images.")] = Path("outputs/web"),
    only: Annotated[list[str] | None, typer.Option(help=f"{', '.join(TABS)}; repeatable. Default: all.")] = None,
    docs: Annotated[bool, typer.Option("--docs", help="Put the token's tab into docs/web.png.")] = False,
) -> None:
    tabs = only or list(TABS)
    output.mkdir(parents=True, exist_ok=True)
    make(output / "shown")
    flux, wan = FluxPipeline.from_pretrained(tiny.path("flux")), WanPipeline.from_pretrained(tiny.path("wan"))
    models = [Model("tiny", flux, tiny.defaults("flux")), Model("tiny:wan", wan, tiny.defaults("wan"))]
    with serve(models, [output / "shown"], port=0) as server, browser() as chromium:
        for width in WIDTHS:
            for theme in THEMES:
                page = chromium.new_page(viewport={"width": width, "height": 900})
                page.set_default_timeout(PATIENCE)
                page.goto(f"{server.url}/?__theme={theme}")
                page.wait_for_selector("#compare-draw")
                photograph(page, output, tabs, f"{theme}-{width}")
                page.close()
        if docs:
            page = chromium.new_page(viewport={"width": 1080, "height": 900})
            page.goto(server.url)
            page.wait_for_selector("#compare-draw")
            photograph(page, output, ["token"], "docs")
            shutil.copyfile(output / "token-docs.png", ROOT / "docs" / "web.png")


if __name__ == "__main__":
    typer.run(main)
