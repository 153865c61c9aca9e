"""`scripts/compare_long_video.py`: its rows tell one object from several, and a smooth path from a torn one."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffattn.tiny.moving import Course, MovingScene, render

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "compare_long_video.py"
COURSE = Course(axis=0, lane=24.0, period=40, start=0.0)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compare_long_video", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def clip(shape: str, start: float, frames: int = 16) -> np.ndarray:
    scene = MovingScene(colour="red", shape=shape, background="blue")
    return render(scene, Course(axis=0, lane=24.0, period=40, start=start), frames)


def numbers(line: str) -> list[float]:
    return [float(cell) for cell in line.strip("| ").split("|")[1:]]


def test_one_object_on_a_smooth_path(script):
    identity, seams, elsewhere, inside, clean = numbers(script.row("x", [clip("circle", 0, 32), clip("cross", 3, 32)]))
    assert identity == inside == clean == 1.0 and abs(seams - elsewhere) < 0.1 and seams < 0.2


def test_clips_apart_lose_the_object_and_tear_the_path(script):
    torn = np.concatenate([clip("circle", 10), clip("square", 10)])
    identity, seams, elsewhere, inside, clean = numbers(script.row("x", [torn]))
    assert identity == 0.5 and inside == clean == 1.0
    assert seams > 4.0 > 0.2 > elsewhere


def test_prompts_name_neither_colour_nor_shape(script):
    texts = list(script.prompts(12))
    assert len(set(texts)) == 10 and texts[10] == texts[0] == "a shape moving sideways on a red background"


def test_a_strip_has_a_row_for_each_video(script, tmp_path):
    script.write_strip([clip("circle", 0), clip("cross", 0)], tmp_path / "strip.png", 4)
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.size == (4 * 48, 2 * (48 + 3))
