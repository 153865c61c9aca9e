"""The page in a browser: Chromium draws, cancels, clicks and plays, and asks for nothing outside this machine."""

import base64
import contextlib
import csv
import io
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, WanPipeline
from PIL import Image

import diffattn
from diffattn import tiny
from diffattn.comparison import Comparison, Row
from diffattn.comparison.opening import RESULT, RUNS, file_of
from diffattn.files.writing import write_json
from diffattn.measure import hardware
from diffattn.measure.strips import to_image
from diffattn.web import Model, serve

pytestmark = [
    pytest.mark.slow,
    # gradio's server and what it stands on are behind each other's releases
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
PATIENCE = 90_000
"""Milliseconds: this is no test of speed."""
NOWHERE = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
TABS = ("Compare", "What a token sees", "Speed and fidelity", "Video", "Distill")


@dataclass
class Site:
    url: str
    models: list[Model]
    run: Path


def comparison(folder: Path) -> None:
    """As `diffattn compare` writes it: full attention black, the others brighter."""
    names = ("full", "clear radius=2", "routing share=0.8 tile=2 pool=2")
    rows = [
        Row(name, prompt, 3.0 - at, None, 1.0 - 0.2 * at, 60.0 - 20 * at, 60.0 - 20 * at, None, None, None)
        for at, name in enumerate(names)
        for prompt in range(2)
    ]
    setup = {"settings": list(names), "prompts": [{"prompt": "a red circle"}, {"prompt": "a blue ring"}]}
    found = Comparison(names, tuple(rows), setup, hardware(), lambda *_: np.zeros(3))
    write_json(folder / RESULT, found.to_dict())
    (folder / RUNS).mkdir()
    for row in rows:
        at = names.index(row.setting)
        pixels = np.full((16, 16, 3), 0.2 * at + 0.1 * row.prompt, np.float32)
        np.save(file_of(folder / RUNS, row.prompt, at, "npy"), pixels)


SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2}


def write_log(run: Path, steps: int) -> None:
    with (run / "log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ("step", "total", "target", "rate", "seconds"))
        writer.writeheader()
        writer.writerows(
            {"step": n, "total": 1 / n, "target": 0.5 / n, "rate": 1e-4, "seconds": 0.2} for n in range(1, steps + 1)
        )


def results(folder: Path) -> Path:
    """A comparison, a run and two clips in a folder; the run."""
    (folder / "compared").mkdir()
    comparison(folder / "compared")
    run = folder / "run"
    (run / "sheets").mkdir(parents=True)
    write_log(run, 20)
    (run / "config.json").write_text('{"steps": 500, "mechanism": {"type": "clear", "radius": 3}}')
    Image.new("RGB", (60, 40), "green").save(run / "sheets" / "step-000010.png")
    for name, shift in (("left", 0), ("right", 1)):
        (folder / name).mkdir()
        for number in range(6):
            Image.new("RGB", (32, 24), (40 * (number + shift), 0, 0)).save(folder / name / f"frame-{number:04d}.png")
    return run


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    pytest.importorskip("gradio", reason='gradio is missing: pip install "diffattn[web]"')
    folder = tmp_path_factory.mktemp("outputs")
    flux, wan = FluxPipeline.from_pretrained(tiny.path("flux")), WanPipeline.from_pretrained(tiny.path("wan"))
    models = [Model("tiny", flux, tiny.defaults("flux")), Model("tiny:wan", wan, tiny.defaults("wan"))]
    run = results(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with serve(models, [folder], port=0) as server:
            yield Site(server.url, models, run)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: make setup")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("Chromium is missing: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", NOWHERE])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def asked() -> list[str]:
    """Every address that any page asked for."""
    return []


class Visitor:
    """A browser of its own, as another person has it."""

    def __init__(self, browser: Any, site: Site, asked: list[str], width: int = 1280, query: str = "") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900})
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.wrong: list[str] = []
        self.page.on("request", lambda request: asked.append(request.url))
        self.page.on("websocket", lambda socket: asked.append(socket.url))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.goto(site.url + query)
        self.page.wait_for_selector("#compare-draw")

    def open(self, tab: str) -> None:
        self.page.get_by_role("tab", name=tab).click()

    def fill(self, **values: Any) -> None:
        """Fields that are shown, by the beginning of their labels."""
        for name, value in values.items():
            field = self.page.get_by_label(re.compile(rf"^\s*{name.replace('_', ' ')}\b")).locator("visible=true").first
            field.fill(str(value))

    def images(self, where: str) -> list[np.ndarray]:
        sources = self.page.eval_on_selector_all(f"{where} img", "all => all.map(one => one.src)")
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one.partition(",")[2])))) for one in sources]

    def text(self, where: str) -> str:
        found: str = self.page.inner_text(where)
        return found


@pytest.fixture
def visitor(browser: Any, site: Site, asked: list[str]) -> Iterator[Visitor]:
    visitor = Visitor(browser, site, asked)
    yield visitor
    visitor.context.close()
    assert visitor.wrong == []


def own(site: Site, prompt: str, radius: float | None = None) -> np.ndarray:
    """The image by the model's own attention, or by clear, without the page."""
    model = site.models[0]
    call = {**tiny.defaults("flux"), **SMALL, "output_type": "np"}

    def work(job: Any) -> Any:
        swap = diffattn.apply(model.pipe, "clear", radius=radius) if radius else contextlib.nullcontext()
        with swap:
            return model.pipe(prompt, generator=torch.Generator().manual_seed(0), **call).images[0]

    return np.asarray(to_image(model.queue.submit(work).result()))


def ask_for_a_pair(visitor: Visitor, options: str, prompt: str = "a red circle", **values: Any) -> None:
    own = {"Height": 64, "Width": 64, "Steps": 2, "Prompt": prompt, "Options_of_B": options}
    visitor.fill(**{**own, **values})
    visitor.page.click("#compare-draw")


def test_both_images_appear_and_differ(visitor: Visitor, site: Site) -> None:
    ask_for_a_pair(visitor, "radius=1")
    visitor.page.wait_for_selector("#compare-result .da-wipe")
    first, second, _ = visitor.images("#compare-result")
    np.testing.assert_array_equal(first, own(site, "a red circle"))
    assert (first != second).any()
    table = visitor.text("#compare-result table")
    assert "clear radius=1" in table and "dB" in table and "100.0%" in table
    slider = visitor.page.get_by_label("Where A ends and B begins")
    slider.focus()
    visitor.page.keyboard.press("Home")
    assert visitor.page.eval_on_selector(".da-wipe", "box => box.style.getPropertyValue('--at')") == "0%"
    box = visitor.page.locator(".da-wipe")
    width = box.bounding_box()["width"]
    box.click(position={"x": width / 4, "y": width / 2})
    assert slider.input_value() == "25"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"options": "raduis=4"}, "clear has no option 'raduis'"),
        ({"options": "radius=0"}, "radius must be"),
        ({"options": "radius=2", "Height": 4}, "expected a height of at least"),
    ],
)
def test_a_wrong_option_shows_the_line(visitor: Visitor, values: dict[str, Any], words: str) -> None:
    ask_for_a_pair(visitor, **values)
    alert = visitor.page.locator("#compare-error [role=alert]")
    alert.wait_for()
    assert words in alert.inner_text()
    ask_for_a_pair(visitor, "radius=2", Height=64)
    visitor.page.wait_for_selector("#compare-result .da-wipe")
    assert alert.count() == 0


def test_after_cancelling_the_model_is_exactly_as_before(visitor: Visitor, site: Site) -> None:
    before = own(site, "a blue ring")
    ask_for_a_pair(visitor, "radius=1", Steps=3000)
    visitor.page.get_by_text(re.compile("Drawing A.*step [1-9]")).wait_for()
    visitor.page.click("#compare-cancel")
    visitor.page.get_by_text(re.compile("Cancelled after step .* of 3000")).wait_for()
    assert site.models[0].queue.ahead(site.models[0].queue.submit(lambda job: None)) == 0
    np.testing.assert_array_equal(own(site, "a blue ring"), before)


def test_a_visitor_who_leaves_frees_the_queue(browser: Any, site: Site, asked: list[str]) -> None:
    visitor = Visitor(browser, site, asked)
    ask_for_a_pair(visitor, "radius=1", Steps=3000)
    visitor.page.get_by_text(re.compile("Drawing A.*step [1-9]")).wait_for()
    visitor.context.close()
    assert site.models[0].queue.submit(lambda job: "free").future.result(PATIENCE / 1000) == "free"


def test_two_visitors_at_once_get_each_their_own_image(browser: Any, site: Site, asked: list[str]) -> None:
    wanted = {"radius=1": "a red circle", "radius=3": "a green square"}
    visitors = {options: Visitor(browser, site, asked) for options in wanted}
    for options, visitor in visitors.items():
        ask_for_a_pair(visitor, options, wanted[options])
    for options, visitor in visitors.items():
        visitor.page.wait_for_selector("#compare-result .da-wipe")
        first, second, _ = visitor.images("#compare-result")
        assert f"clear {options}" in visitor.text("#compare-result table")
        np.testing.assert_array_equal(first, own(site, wanted[options]))
        np.testing.assert_array_equal(second, own(site, wanted[options], float(options.partition("=")[2])))
        visitor.context.close()


def test_a_click_and_the_keyboard_choose_a_token(visitor: Visitor) -> None:
    visitor.open("What a token sees")
    visitor.fill(Height=64, Width=64, Steps=2, Step=1, Options="share=0.8 tile=2 pool=2", Row=4, Column=4)
    visitor.page.click("#token-draw")
    map_ = visitor.page.locator("#token-result .da-map")
    map_.wait_for()
    assert (map_.get_attribute("data-row"), map_.get_attribute("data-column")) == ("4", "4")
    before = visitor.page.locator("#token-result .da-key").get_attribute("d")
    box = map_.bounding_box()
    map_.click(position={"x": box["width"] * 1.5 / 8, "y": box["height"] * 6.5 / 8})
    visitor.page.wait_for_selector("#token-result .da-map[data-row='6'][data-column='1']")
    assert visitor.page.locator("#token-result .da-key").get_attribute("d") not in ("", before)
    assert visitor.page.get_by_label("Row of the token").input_value() == "6"
    map_.focus()
    visitor.page.keyboard.press("ArrowRight")
    visitor.page.wait_for_selector("#token-result .da-map[data-row='6'][data-column='2']")
    visitor.fill(Row_of_the_token=0)
    visitor.page.wait_for_selector("#token-result .da-map[data-row='0'][data-column='2']")
    shares = [float(one) for one in re.findall(r"([\d.]+)%", visitor.text("#token-result table"))]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    visitor.fill(Head=99)
    visitor.page.get_by_text("expected a head from 0 to").wait_for()


def test_points_of_the_frontier_open_their_images(visitor: Visitor) -> None:
    visitor.open("Speed and fidelity")
    visitor.page.wait_for_selector("#frontier-images .da-wipe")
    first = visitor.images("#frontier-images")
    visitor.page.locator("#frontier-chart .da-point[data-setting^=routing]").press("Enter")
    visitor.page.locator("#frontier-images p", has_text="routing share=0.8 tile=2 pool=2: 1.00 s").wait_for()
    second = visitor.images("#frontier-images")
    assert (first[0] == second[0]).all() and (first[1] != second[1]).any()
    assert "routing share=0.8" in visitor.text("#frontier-table table")


def test_a_video_is_drawn_and_plays(visitor: Visitor) -> None:
    visitor.open("Video")
    visitor.fill(Frames=5, Steps=2)
    visitor.page.click("#video-draw")
    visitor.page.wait_for_selector("#video-result .da-player")
    assert len(visitor.images("#video-result")) == 10
    assert "flicker" in visitor.text("#video-result table")
    plays(visitor, "#video-result", 5)


def test_clips_of_the_folders_are_played_side_by_side(visitor: Visitor) -> None:
    visitor.open("Video")
    visitor.page.get_by_role("button", name="Two clips of your folders").click()
    visitor.page.click("#clips-show")
    visitor.page.get_by_text("choose clip A").wait_for()
    for place, name in (("A", "left"), ("B", "right")):
        visitor.page.get_by_label(f"Clip {place}").click()
        option = visitor.page.get_by_role("option", name=re.compile(f"{name}$"))
        option.click()
        option.wait_for(state="detached")  # the list of the one is open for a while beside that of the other
    visitor.page.click("#clips-show")
    visitor.page.wait_for_selector("#clips-result .da-player")
    assert "PSNR of B to A: 20.9 dB in the mean" in visitor.text("#clips-result")
    plays(visitor, "#clips-result", 6)


def plays(visitor: Visitor, where: str, frames: int) -> None:
    number = visitor.page.locator(f"{where} .da-number")
    assert number.inner_text() == f"frame 1 of {frames}"
    visitor.page.locator(f"{where} .da-at").focus()
    visitor.page.keyboard.press("ArrowRight")
    assert number.inner_text() == f"frame 2 of {frames}"
    shown = visitor.page.locator(f"{where} .da-frame:visible")
    assert [shown.nth(at).get_attribute("alt")[:10] for at in range(shown.count())] == ["A, frame 2", "B, frame 2"]
    visitor.page.locator(f"{where} .da-play").click()
    visitor.page.wait_for_function(
        f"document.querySelector({where!r} + ' .da-number').textContent === 'frame 4 of {frames}'"
    )
    visitor.page.get_by_role("button", name="Pause").click()


def test_a_run_is_watched(visitor: Visitor, site: Site) -> None:
    visitor.open("Distill")
    visitor.page.get_by_text("step 20 of 500; 0.20 s a step").wait_for()
    assert "clear(radius=3)" in visitor.text("#distill-losses")
    assert visitor.page.locator("#distill-losses polyline").count() == 2
    assert visitor.images("#distill-sheet")[0].shape == (40, 60, 3)
    visitor.page.get_by_label("Follow").check()
    write_log(site.run, 30)
    visitor.page.get_by_text("step 30 of 500").wait_for()
    (site.run / "log.csv").write_text("no log\n1,2\n")
    visitor.page.get_by_text("is not the log of a run").wait_for()
    write_log(site.run, 20)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_needs_no_scrolling_sideways_and_all_has_names(
    browser: Any, site: Site, asked: list[str], theme: str
) -> None:
    visitor = Visitor(browser, site, asked, width=390, query=f"/?__theme={theme}")
    ask_for_a_pair(visitor, "radius=1")
    visitor.page.wait_for_selector("#compare-result .da-wipe")
    assert visitor.page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")
    for tab in TABS:
        if tab != "Compare":
            reach(visitor, tab)
        assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390, tab
        unnamed = visitor.page.evaluate(UNNAMED)
        assert unnamed == [], tab
    visitor.context.close()


def reach(visitor: Visitor, tab: str) -> None:
    """A tab, which gradio puts behind a button where there is no room."""
    found = visitor.page.get_by_role("tab", name=tab).locator("visible=true")
    if found.count() == 0:
        visitor.page.locator(".overflow-menu > button").click()
        visitor.page.locator(".overflow-dropdown button", has_text=tab).click()
        return
    found.first.click()


UNNAMED = """() => [...document.querySelectorAll('input, textarea, button, select, img, [role=button]')]
  .filter(one => one.offsetParent !== null)
  .filter(one => !(one.getAttribute('aria-label') || one.alt || one.title || one.textContent.trim()
    || (one.labels && [...one.labels].some(label => label.textContent.trim()))))
  .map(one => one.outerHTML.slice(0, 200))"""


def test_no_request_left_this_machine(visitor: Visitor, site: Site, asked: list[str]) -> None:
    visitor.open("Video")
    outside = {one for one in asked if not one.startswith((site.url, "data:", "blob:"))}
    assert outside == set() and len(asked) > 10


def test_no_file_is_served(site: Site) -> None:
    import httpx

    with httpx.Client(base_url=site.url, trust_env=False) as client:
        for path in (site.run / "log.csv", Path(__file__), Path("/etc/hostname")):
            assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)
        sent = client.post("/gradio_api/upload", files={"files": ("a.txt", b"some words")})
        assert sent.status_code >= 400


def test_a_name_that_was_made_to_lead_here_is_refused(site: Site) -> None:
    import httpx

    with httpx.Client(base_url=site.url, trust_env=False) as client:
        assert client.get("/", headers={"host": "elsewhere.example"}).status_code == 400
        assert client.get("/").status_code == 200
