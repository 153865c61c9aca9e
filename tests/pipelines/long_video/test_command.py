"""The command: what it makes, and what it refuses in one line, on every rank."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_video
from diffattn.pipelines.long_video.command import main

from diffattn.tiny.track import figures, follow, majority
from diffattn.video import read_frames

SIZE = ("--height", "16", "--width", "16")


def options(model: Path, output: Path, *more: Any) -> list[str]:
    return list(map(str, ["--model", model, "--output", output, "--device", "cpu", *SIZE, "--steps", 2, *more]))


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "torchrun --nproc-per-node 8 -m diffattn.pipelines.long_video" in text
    for option in ("--seed", "--device", "--dtype", "--output", "--timeout", "--save-every", "--resume", "--model"):
        assert option in text


def test_one_rank_makes_a_playable_video(model: Path, tmp_path: Path) -> None:
    import av

    output = tmp_path / "videos" / "out.mp4"
    assert main(options(model, output, "--prompt", "a red circle", "--frames", 5, "--fps", 12)) == 0
    with av.open(str(output)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (16, 16, Fraction(12))
        assert len(list(container.decode(stream))) == 5
    assert [file.name for file in output.parent.iterdir()] == ["out.mp4"]


def test_the_prompt_file_says_how_many_frames(model: Path, tmp_path: Path) -> None:
    prompts = tiny_video.write_prompts(tmp_path / "prompts.json", 6)
    assert main(options(model, tmp_path / "frames", "--prompts", prompts, "--keep")) == 0
    assert len(list((tmp_path / "frames").glob("*.png"))) == 6
    (checkpoint,) = (tmp_path / "frames.work" / "checkpoints").iterdir()
    assert tiny_video.stored_config(checkpoint)["frames"] == 6


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "a prompt is needed"),
        (["--prompt", "a", "--prompts", "x.json"], "exclude each other"),
        (["--prompts", "gap.json"], "leave a gap: frame 2 has none"),
        (["--prompts", "missing.json"], "missing.json"),
        (["--prompt", "a", "--frames", "0"], "frames must be a whole number of at least 1"),
        (["--prompt", "a", "--lengths", "3;4"], "--lengths must be numbers"),
        (["--prompt", "a", "--frames", "4", "--lengths", "3,1"], "lengths must name a clip"),
        (["--prompt", "a", "--output", "out.avi"], "must end in .mp4"),
        (["--prompt", "a", "--resume"], "there is no checkpoint in"),
        (["--prompt", "a", "--height", "15", "--output", "frames"], "must be multiples of 2"),
        (["--prompt", "a", "--device", "tpu"], "--device must be cpu, cuda or auto"),
        (["--prompt", "a", "--dtype", "int8"], "--dtype must be one of"),
        (["--prompt", "a", "--model", "./nothing"], "no folder './nothing'"),
        (["--prompt", "a", "--steps", "many"], "--steps"),
    ],
)
def test_wrong_input_is_one_line(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    gap = [{"frames": [0, 2], "prompt": "a"}, {"frames": [3, 5], "prompt": "b"}]
    Path("gap.json").write_text(json.dumps(gap))
    assert main(options(model, tmp_path / "out.mp4", *more)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diffattn: error")]
    assert message in line
    assert not (tmp_path / "out.mp4").exists()


def test_a_former_run_is_not_mixed_up(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = options(model, tmp_path / "frames", "--prompt", "a", "--frames", 3, "--keep")
    assert main(line) == 0
    assert main(line) == 2
    assert "has checkpoints of a run up to step 2: add --resume" in capsys.readouterr().err
    assert main([*line, "--resume", "--seed", "3"]) == 2
    assert "is of a run with seed=0, and this one has 3" in capsys.readouterr().err
    assert main([*line, "--resume"]) == 0


@pytest.mark.dist
def test_every_rank_says_why_nothing_was_made(model: Path, tmp_path: Path) -> None:
    result = tiny_video.call(*options(model, tmp_path / "out.mp4", "--prompt", "a", "--frames", 1), ranks=2)
    assert result.returncode != 0
    for rank in (0, 1):
        (line,) = [line for line in result.stderr.splitlines() if f"diffattn: error: rank {rank}: " in line]
        assert "1 frames can't be shared out among 2 ranks" in line
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.dist
def test_the_bundled_model_shows_what_was_said_on_two_ranks(tmp_path: Path) -> None:
    """Longer than in its training, without any option but prompt, length and output."""
    prompt = "a white triangle moving sideways on a blue background"
    result = tiny_video.call("--prompt", prompt, "--frames", 28, "--output", tmp_path / "out.mp4", ranks=2)
    assert result.returncode == 0, result.stderr
    frames = list(read_frames(tmp_path / "out.mp4"))
    assert len(frames) == 28
    seen = follow(np.stack(frames))
    assert majority([sighting.colour for sighting in seen]) == "white"
    assert majority([sighting.background for sighting in seen]) == "blue"
    assert figures(seen).colour_identity > 0.9
