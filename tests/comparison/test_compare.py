"""Comparisons: figures against hand-made ones, resuming after a kill, reports, the command."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, WanPipeline
from PIL import Image

import diffattn
from diffattn import compare, tiny
from diffattn.cli import main
from diffattn.comparison import Comparison, Row, report
from diffattn.measure import flicker, psnr, psnr_of_frames

PROMPTS = ["a red circle at the top on a blue background", "a green square in the center on a white background"]
CALL: dict[str, Any] = {**tiny.defaults("flux"), "height": 64, "width": 64, "num_inference_steps": 3}
SETTINGS = ["clear radius=2", "clear radius=2 pool=2", "softmax reuse=2", "clear radius=3 start=0.5"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = FluxPipeline.from_pretrained(tiny.path("flux"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def figures(found: Comparison) -> list[tuple[Any, ...]]:
    """What must be the same in every run."""
    return [(r.setting, r.prompt, r.computed, r.psnr, r.worst_frame, r.ssim, r.flicker) for r in found.rows]


@pytest.mark.slow
def test_figures_are_those_of_the_images(pipe: Any) -> None:
    found = compare(pipe, PROMPTS, SETTINGS, progress=False, warmup=0, seed=3, **CALL)
    assert found.settings == ("full", *SETTINGS) and len(found.rows) == 2 * 5
    for number, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(3 + number)
        full = pipe(prompt, generator=generator, output_type="np", **CALL).images[0]
        generator = torch.Generator().manual_seed(3 + number)
        with diffattn.apply(pipe, "clear", radius=2):
            own = pipe(prompt, generator=generator, output_type="np", **CALL).images[0]
            computed = diffattn.summary(pipe).computed
        row = found.of("clear radius=2")[number]
        assert row.psnr == pytest.approx(psnr(own, full), rel=1e-4) and row.computed == computed
        assert row.seconds > 0 and row.flicker is None
        np.testing.assert_allclose(found.pixels(number, "full"), full)
    line = found.lines[1]
    medians = [statistics.median(row.seconds for row in found.of(name)) for name in ("full", "clear radius=2")]
    assert line.speedup == pytest.approx(medians[0] / medians[1])
    assert not any(row.swapped for row in diffattn.summary(pipe).rows)


def test_videos_have_frames_and_flicker() -> None:
    pipe = WanPipeline.from_pretrained(tiny.path("wan"))
    pipe.set_progress_bar_config(disable=True)
    call = {**tiny.defaults("wan"), "num_frames": 5, "num_inference_steps": 2}
    found = compare(pipe, ["a red circle"], ["clear radius=2"], progress=False, warmup=0, **call)
    full, own = found.pixels(0, "full"), found.pixels(0, "clear radius=2")
    assert full.shape == (5, 48, 48, 3)
    row = found.of("clear radius=2")[0]
    each = psnr_of_frames(own, full)
    assert row.psnr == pytest.approx(np.mean(each)) and row.worst_frame == pytest.approx(min(each))
    assert row.flicker == pytest.approx(flicker(own, full))


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from comparison.test_compare import CALL, PROMPTS, SETTINGS
from diffusers import FluxPipeline
import diffattn
pipe = FluxPipeline.from_pretrained(diffattn.tiny.path("flux"))
diffattn.compare(pipe, PROMPTS, SETTINGS, folder={folder!r}, warmup=0, **CALL)
"""


@pytest.mark.slow
def test_a_killed_comparison_goes_on_to_the_same_numbers(pipe: Any, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 300
    third = folder / "prompt-000-setting-02.json"
    while not third.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = sorted(path.name for path in folder.glob("*-setting-*.json"))
    assert third.name in done and len(done) < 10
    held = third.read_bytes()
    resumed = compare(pipe, PROMPTS, SETTINGS, folder=folder, progress=False, warmup=0, **CALL)
    assert third.read_bytes() == held  # not drawn again
    whole = compare(pipe, PROMPTS, SETTINGS, progress=False, warmup=0, **CALL)
    for one, other in zip(figures(resumed), figures(whole), strict=True):
        numbers = [[x or 0.0 for x in values[2:]] for values in (one, other)]
        assert one[:2] == other[:2] and numbers[0] == pytest.approx(numbers[1], rel=1e-3)
    with pytest.raises(ValueError, match="a comparison with other prompts"):
        compare(pipe, PROMPTS[:1], SETTINGS, folder=folder, **CALL)


def test_what_a_pipeline_cannot_carry_is_refused_before_anything_is_drawn(pipe: Any) -> None:
    drawn: list[Any] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: drawn.append(1))
    with pytest.raises(ValueError, match=r"layers='nothing\.\*' matches none"):
        compare(pipe, PROMPTS, ["clear radius=2", "clear radius=2 layers=nothing.*"], **CALL)
    hook.remove()
    assert not drawn


# --- reports


def comparison() -> Comparison:
    places = {"full": (8.0, 120.0), "a": (4.0, 40.0), "b": (5.0, 30.0), "c": (2.0, 20.0)}
    rows = [
        Row(name, prompt, seconds + prompt, 10_000_000, 0.5, near - prompt, near, 0.9, None, None)
        for name, (seconds, near) in places.items()
        for prompt in range(3)
    ]
    machine = {"device": "a CPU", "threads": 2, "cores": 2, "torch": "2", "load_average": None}
    images = np.random.default_rng(0).random((4, 3, 16, 24, 3))
    return Comparison(tuple(places), tuple(rows), {}, machine, lambda n, name: images[[*places].index(name), n])


def test_the_frontier_has_what_nothing_beats() -> None:
    lines = {line.setting: line for line in comparison().lines}
    assert [name for name, line in lines.items() if line.frontier] == ["full", "a", "c"]
    assert lines["a"].speedup == pytest.approx(9 / 5) and lines["c"].psnr == (20.0, 19.0, 18.0)


def test_reports_say_all_of_it(tmp_path: Path) -> None:
    paths = report.save(comparison(), tmp_path, "Three settings")
    assert [path.name for path in paths] == ["compare.md", "compare.json", "frontier.png", "sheet.png"]
    text = paths[0].read_text()
    assert "# Three settings" in text and "a CPU, 2 of 2 threads" in text
    assert "| `a` | 5.00 | 4.00-6.00 | 1.80x | 50.0% | 39.0 | 38.0-40.0 | 0.900 | 10 | frontier |" in text
    assert "flicker" not in text and "LPIPS" not in text  # nothing fills these columns
    values = json.loads(paths[1].read_text())
    assert values["machine"]["device"] == "a CPU" and values["settings"][1]["median_psnr"] == 39.0
    for path in paths[2:]:
        with Image.open(path) as image:
            assert image.width > 300


def test_the_command_writes_resumes_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("# two\n\n" + "\n".join(PROMPTS) + "\n")
    size = ["--height", "64", "--width", "64", "--steps", "2"]
    call = ["compare", "tiny", "--prompts", str(tmp_path / "prompts.txt"), "--setting", "clear radius=2", *size]

    def run(*more: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([*call, "--output", str(tmp_path / "out"), *more])
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out + told.err

    code, text = run()
    assert code == 0 and "| `clear radius=2` |" in text and "sheet.png" in text
    code, text = run()
    assert code == 2 and "add --resume" in text
    code, text = run("--resume")
    assert code == 0 and "| `clear radius=2` |" in text
