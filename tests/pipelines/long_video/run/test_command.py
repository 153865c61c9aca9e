"""The command: what it makes, and what it refuses in one line, on every rank."""

import json
import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_video
from typer.testing import CliRunner

from diffattn.cli import app
from diffattn.cli.commands.long_video import main
from diffattn.media.video import read_frames
from diffattn.tiny.track import figures, follow, majority

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
    assert sorted(file.name for file in output.parent.iterdir()) == ["out.json", "out.mp4"]


def test_the_prompt_file_says_how_many_frames(model: Path, tmp_path: Path) -> None:
    prompts = tiny_video.write_prompts(tmp_path / "prompts.json", 6)
    assert main(options(model, tmp_path / "frames", "--prompts", prompts, "--keep")) == 0
    assert len(list((tmp_path / "frames").glob("*.png"))) == 6
    (checkpoint,) = (tmp_path / "frames.work" / "checkpoints").iterdir()
    assert tiny_video.stored_config(checkpoint)["frames"] == 6


def test_the_record_makes_the_same_video_and_what_is_typed_goes_over_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tiny_video.write_prompts(tmp_path / "prompts.json", 6)
    assert main(options(model, tmp_path / "a", "--prompts", prompts, "--top-k", 2, "--threads", 1)) == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert (record["command"], record["made"]["frames"], record["options"]["top_k"]) == ("long-video", 6, 2)
    assert main(["--like", str(tmp_path / "a"), "--output", str(tmp_path / "b")]) == 0
    assert main(["--config", str(tmp_path / "a.json"), "--seed", "5", "--output", str(tmp_path / "c")]) == 0
    a, b, c = (tree(tmp_path / name) for name in "abc")
    assert len(a) == 6 and a == b and a.keys() == c.keys() and a != c
    assert main(["--like", str(tmp_path / "a"), "--config", str(tmp_path / "a.json")]) == 2
    assert "leave one of them out" in told(capsys)
    (tmp_path / "d.json").write_text("{}")
    assert main(options(model, tmp_path / "d.mp4", "--prompt", "a")) == 2
    assert "d.json is there and is no record" in told(capsys)


@pytest.mark.dist
@pytest.mark.slow
def test_the_first_of_two_ranks_leaves_the_record(model: Path, tmp_path: Path) -> None:
    line = options(model, tmp_path / "a", "--prompt", "a red circle", "--frames", 4, "--lengths", "2,2")
    result = tiny_video.call(*line, ranks=2)
    assert result.returncode == 0 and result.stdout == f"wrote {tmp_path / 'a'}\n", result.stderr
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["made"] == {"files": ["a"], "height": 16, "width": 16, "frames": 4, "processes": 2}
    assert (record["options"]["prompt"], record["options"]["lengths"]) == ("a red circle", [2, 2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.json"]


def test_a_file_of_options_has_those_of_the_command_too(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text('prompt = "a"\nframes = 2\nsave-every = 0\ntop_k = 2\nsteps = 1\n')
    line = ["--model", str(model), *SIZE, "--output", str(tmp_path / "a")]
    assert main(["--config", str(tmp_path / "run.toml"), *line]) == 0
    options = json.loads((tmp_path / "a.json").read_text())["options"]
    assert (options["save_every"], options["top_k"], options["frames"]) == (0, 2, 2)
    for text, words in (
        ("timeout = 'long'", "run.toml: timeout must be a number"),
        ("frame = 2", "unknown entries frame"),
    ):
        (tmp_path / "run.toml").write_text(f'prompt = "a"\n{text}\n')
        assert main(["--config", str(tmp_path / "run.toml"), *line]) == 2
        assert words in told(capsys)


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
        (["--prompt", "a", "--output", "out.avi"], "expected a file name that ends in .mp4"),
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


KILLED = """
import os, signal, sys
from diffattn.pipelines.long_video.pipeline import LongVideoPipeline
decode = LongVideoPipeline.decode
def then_die(self, latents):
    for number, frame in enumerate(decode(self, latents)):
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield frame
LongVideoPipeline.decode = then_die
from diffattn.cli.commands.long_video import main
sys.exit(main(sys.argv[1:]))
"""
"""The command, killed by the system while it decodes its third frame."""


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder; folders have no bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a refusal."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diffattn: error")]
    return line


@pytest.mark.parametrize("output", ["out.mp4", "frames"])
@pytest.mark.slow
def test_a_run_that_was_killed_while_it_decoded_goes_on(model: Path, tmp_path: Path, output: str) -> None:
    import av  # noqa: F401 - of the extra `video`

    line = options(model, tmp_path / output, "--prompt", "a", "--frames", 4, "--save-every", 1)
    _, environment = tiny_video.command()
    process = subprocess.run([sys.executable, "-c", KILLED, *line], env=environment, check=False)
    assert process.returncode == -signal.SIGKILL
    assert main([*line, "--resume"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([output, f"{Path(output).stem}.json"])
    if output == "frames":
        assert sorted(os.listdir(tmp_path / output)) == [f"frame-{number:06d}.png" for number in range(4)]


@pytest.mark.parametrize("more", [("--output", "p/v.mp4", "--work", "p"), ("--output", "v.mp4", "--work", ".")])
@pytest.mark.slow
def test_a_work_folder_with_other_things_is_refused_and_left_alone(
    model: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    (tmp_path / "p" / "parts").mkdir(parents=True)
    (tmp_path / "p" / "letter.txt").write_text("dear")
    (tmp_path / "p" / "parts" / "part-0000.mp4.bak").write_bytes(b"1")
    before = tree(tmp_path)
    line, environment = tiny_video.command(*options(model, tmp_path, "--prompt", "a", "--frames", 2, *more))
    result = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "holds things that are not of a run" in result.stderr, result.stderr
    assert tree(tmp_path) == before


def test_only_what_the_run_made_is_removed(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Things that came into the folder while the run stood still stay, and so does a folder that was there."""
    work, line = tmp_path / "work", options(model, tmp_path / "v.mp4", "--prompt", "a", "--frames", 2)
    work.mkdir()
    assert main([*line, "--work", str(work), "--keep"]) == 0
    (work / "checkpoints" / "mine.txt").write_text("x")
    (work / "mine").mkdir()
    assert main([*line, "--work", str(work), "--resume"]) == 0
    assert sorted(tree(work)) == ["checkpoints", "checkpoints/mine.txt", "mine"]
    assert "it holds things that are not of the run" in caplog.text
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([*line, "--work", str(empty), "--overwrite"]) == 0
    assert empty.is_dir() and not tree(empty)
    inside = tmp_path / "new" / "v.mp4"
    assert main([*line, "--work", str(inside.parent), "--output", str(inside)]) == 0
    assert sorted(tree(inside.parent)) == ["v.json", "v.mp4"]


def test_a_refused_run_leaves_nothing(model: Path, tmp_path: Path) -> None:
    line = options(model, tmp_path / "new" / "v.mp4", "--prompt", "a", "--frames", 2)
    assert main([*line, "--width", "15"]) == 2
    assert main([*line, "--unet", str(tmp_path)]) == 2
    assert not tree(tmp_path)


def test_an_output_that_is_there_needs_overwrite(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "v.mp4"
    output.write_bytes(b"mine")
    line = options(model, output, "--prompt", "a", "--frames", 2)
    assert main(line) == 2
    assert f"{output} is there" in told(capsys) and tree(tmp_path) == {"v.mp4": b"mine"}
    assert main([*line, "--overwrite", "--keep"]) == 0
    assert len(list(read_frames(output))) == 2
    assert main([*line, "--resume"]) == 0  # the video that is there is the run's own


def test_frames_of_a_longer_video_are_not_mixed_in(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(frames: int) -> list[str]:
        return options(model, tmp_path / "pics", "--prompt", "a", "--frames", frames)

    assert main(line(4)) == 0
    (tmp_path / "pics" / "notes.txt").write_text("x")
    before = tree(tmp_path)
    assert main(line(2)) == 2
    assert "pics has 4 frames of another video" in told(capsys) and tree(tmp_path) == before
    assert main([*line(2), "--overwrite"]) == 0
    assert sorted(os.listdir(tmp_path / "pics")) == ["frame-000000.png", "frame-000001.png", "notes.txt"]


def test_weights_that_changed_since_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    other = shutil.copytree(model, tmp_path / "model")
    line = options(other, tmp_path / "v.mp4", "--prompt", "a", "--frames", 2, "--keep")
    assert main(line) == 0
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    max(weights.values(), key=lambda tensor: tensor.numel()).view(-1)[1] += 1
    save_file(weights, file, {"format": "pt"})
    assert main([*line, "--resume"]) == 2
    assert "is of a run with another unet, whose content has changed since" in told(capsys)


def test_it_is_a_command_among_the_others(model: Path, tmp_path: Path) -> None:
    helped = CliRunner().invoke(app, ["long-video", "--help"], env={"COLUMNS": "200"}).stdout
    assert "$ diffattn long-video --prompt" in helped and "--overwrite" in helped
    line = ["long-video", *options(model, tmp_path / "v.mp4", "--prompt", "a", "--frames", 2)]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0 and f"wrote {tmp_path / 'v.mp4'}" in result.stdout
    refused = CliRunner().invoke(app, line)
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1 and "--overwrite" in refused.stderr


@pytest.mark.dist
@pytest.mark.slow
def test_every_rank_says_why_nothing_was_made(model: Path, tmp_path: Path) -> None:
    result = tiny_video.call(*options(model, tmp_path / "out.mp4", "--prompt", "a", "--frames", 1), ranks=2)
    assert result.returncode != 0
    for rank in (0, 1):
        (line,) = [line for line in result.stderr.splitlines() if f"diffattn: error: rank {rank}: " in line]
        assert "1 frames can't be split among 2 ranks" in line
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.dist
@pytest.mark.slow
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
