"""`scripts/compare_long_video.py`: its rows tell one object from several, and a smooth path from a torn one."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

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


def numbers(script, videos: list[np.ndarray]) -> dict[str, float]:
    cells = script.row("x", [script.measure(video) for video in videos]).strip("| ").split("|")
    assert int(cells[1]) == len(videos)
    return dict(zip(script.COLUMNS, map(float, cells[2:]), strict=True))


def test_one_object_on_a_smooth_path(script):
    got = numbers(script, [clip("circle", 0, 32), clip("cross", 3, 32)])
    assert got["identity"] == got["within"] == got["clean"] == 1.0
    assert abs(got["seam_acceleration"] - got["acceleration"]) < 0.1 and got["seam_acceleration"] < 0.2


def test_clips_apart_lose_the_object_and_tear_the_path(script):
    torn = np.concatenate([clip("circle", 10), clip("square", 10)])
    got = numbers(script, [torn])
    assert got["identity"] == 0.5 and got["within"] == got["clean"] == 1.0
    assert got["seam_acceleration"] > 4.0 > 0.2 > got["acceleration"]
    assert got["flicker"] > numbers(script, [clip("circle", 10, 32)])["flicker"]


def test_a_run_goes_on_where_it_was_ended(script, tmp_path, monkeypatch):
    made = []

    def make(parts, name, text, frames, seed, steps):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append((name, seed))
        return clip("circle", 0, 32)

    monkeypatch.setattr(script, "make", make)
    monkeypatch.setattr(script, "open_parts", lambda *args: object())
    command = ["--output", str(tmp_path), "--frames", "32", "--count", "2", "--only", "full", "--only", "memory"]
    assert CliRunner().invoke(script.app, command).exit_code != 0
    made.pop()  # the third is there, and one more may be made
    result = CliRunner().invoke(script.app, [*command, "--strip", str(tmp_path / "strip.png")])
    assert result.exit_code == 0, result.output
    assert made == [("full", 0), ("memory", 0), ("memory", 1)]
    assert "| memory 8 | 2 | 1.00 |" in result.output and (tmp_path / "strip.png").exists()
    monkeypatch.undo()
    shown = CliRunner().invoke(script.app, ["--output", str(tmp_path), "--frames", "32", "--count", "4", "--table"])
    assert shown.exit_code == 0 and shown.output.count("| 2 | 1.00 |") == 2
    other = CliRunner().invoke(script.app, [*command, "--seed", "5"])
    assert other.exit_code == 2 and "another seed" in other.output


def test_every_row_is_a_setting_of_the_command(script):
    assert len(script.ROWS) >= 8
    for _, options in script.ROWS.values():
        settings = script.native_settings("tiny") | options
        script.LongVideoConfig(prompts=(script.PromptRange(0, 32, "a shape"),), frames=32, **settings)


def test_prompts_name_neither_colour_nor_shape(script):
    texts = list(script.prompts(12))
    assert len(set(texts)) == 10 and texts[10] == texts[0] == "a shape moving sideways on a red background"


def test_a_strip_has_a_row_for_each_video(script, tmp_path):
    script.write_strip([clip("circle", 0), clip("cross", 0)], tmp_path / "strip.png", 4)
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.size == (4 * 48, 2 * (48 + 3))
