"""Records that `diffattn generate` leaves, and `--like`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from diffattn.cli import app


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def generate(*arguments: object) -> None:
    result = invoke("generate", *arguments)
    assert result.exit_code == 0, result.output


def record(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_an_image_is_made_again_by_what_made_it(tmp_path: Path) -> None:
    size = ["--steps", 1, "--height", 64, "--width", 96, "--threads", 1]
    swap = ["--mechanism", "clear", "-o", "radius=3", "-o", "pool=2", "--swap-steps", ":1"]
    generate("tiny", "--prompt", "a red circle", *size, *swap, "--seed", 3, "--output", tmp_path / "a.png")
    found = record(tmp_path / "a.json")
    options = found["options"]
    assert found["command"] == "generate" and found["made"] == {"files": ["a.png"], "height": 64, "width": 96}
    assert (options["device"], options["dtype"], options["threads"]) == ("cpu", "float32", 1)
    assert (options["model"], options["seed"], options["option"]) == ("tiny", 3, ["radius=3", "pool=2"])
    generate("--like", tmp_path / "a.json", "--output", tmp_path / "b.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    assert record(tmp_path / "b.json")["options"] == {**options, "output": str(tmp_path / "b.png")}
    generate("--like", tmp_path / "a.png", "--seed", 4, "--output", tmp_path / "c.png")
    assert not np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "c.png"))


def test_several_images_have_one_record_and_videos_say_their_frames(tmp_path: Path) -> None:
    size = ["--steps", 1, "--height", 64, "--width", 64, "--num-images", 2]
    generate("tiny", "--prompt", "a red circle", *size, "--output", tmp_path / "a.png")
    assert record(tmp_path / "a.json")["made"]["files"] == ["a-0.png", "a-1.png"]
    generate("tiny:wan", "--prompt", "a red circle", "--steps", 1, "--frames", 5, "--output", tmp_path / "clip")
    assert record(tmp_path / "clip.json")["made"] == {"files": ["clip"], "height": 48, "width": 48, "frames": 5}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "a.json is there and is no record of an image or video"),
        (["--config", "a.json"], "unknown option 'caption' in a.json"),
        (["--like", "a.json"], "expected the record of an image or video in a.json"),
        (["--like", "b.json"], "there is no record b.json"),
        (["--like", "."], "expected an image, a video, or the JSON file beside one; got '.'"),
        (["--like", "c.png"], "expected a record beside c.png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_no_record_is_told_before_the_model_is_opened(
    more: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffattn.cli.checkpoints.open_pipeline", lambda *_, **__: pytest.fail("opened"))
    Path("a.json").write_text('{"caption": "mine"}')
    result = invoke("generate", "tiny", "--prompt", "x", "--output", "a.png", *more)
    assert (result.exit_code, result.stdout) == (2, "") and words in result.stderr
    assert result.stderr.count("\n") == 1 and Path("a.json").read_text() == '{"caption": "mine"}'


def test_every_command_takes_a_file() -> None:
    names = ["animate", "bench", "calibrate", "compare", "demo", "env", "estimate", "generate", "inspect-star", "list"]
    names += ["long-video", "mask", "summary", "upscale", "video-upscale"]
    distill = [["distill", name] for name in ("run", "evaluate", "export", "cache", "generate")]
    for command in [*([name] for name in names), *distill]:
        assert "--config" in invoke(*command, "--help").stdout, command
