"""`diffattn video-upscale`: the video it writes, runs that were killed, and what is refused before anything is long."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections import namedtuple
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import clip_files as files
import numpy as np
import pytest
import torch
from diffattn.pipelines.video_sr.run import memory
from diffattn.pipelines.video_sr.run import upscaling as module
from diffattn.pipelines.video_sr.run.memory import MemoryPlan
from diffattn.pipelines.video_sr.run.work import WorkFolder
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from diffattn.cli import app
from diffattn.media.video import VideoWriter, probe, read_frames

ROOT = Path(__file__).resolve().parents[3]
COUNT = 5
KILLED = """
import os, signal, sys
def die():
    os.kill(os.getpid(), signal.SIGKILL)
{patch}
from diffattn.cli import main
main(sys.argv[1:])
"""
IN_A_STEP = """
import diffattn.pipelines.video_sr.run.work as work
write = work.WatchedStore.write
def then_die(self, name, begin, frames):
    write(self, name, begin, frames)
    if name == "x.2":
        die()
work.WatchedStore.write = then_die
"""
IN_DECODING = """
import diffattn.pipelines.video_sr.run.upscaling as upscaling
write, count = upscaling.VideoWriter.write, []
def then_die(self, frame):
    write(self, frame)
    count.append(frame)
    if len(count) == 4:  # one is the trial's
        die()
upscaling.VideoWriter.write = then_die
"""
Usage = namedtuple("Usage", "total used free")
ROOM = MemoryPlan(
    weights=dict.fromkeys(("unet", "controlnet", "vae", "text_encoder"), 10**6),
    encode=1,
    window=10**6,
    decode=2 * 10**6,
    frames=0,
    disk=10**6,
    dtype=torch.float32,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    files.write_checkpoint(folder / "star")
    files.write_clip(folder / "in.mp4", COUNT, sound=files.write_tone(folder / "tone.m4a", 1.0))
    return folder


@pytest.fixture(scope="module")
def made(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the result, of a run whose needs were planned."""
    folder = tmp_path_factory.mktemp("made") / "new"
    result = invoke(inputs, folder / "out.mp4")
    assert result.exit_code == 0 and result.stdout == f"{folder / 'out.mp4'}\n", result.output
    needs, time = result.stderr.splitlines()
    assert needs.startswith("diffattn: needs about ") and needs.endswith(f"disk in {folder / 'out.mp4.work'}")
    assert all(f"{part} " in needs for part in ("weights", "window", "decode"))
    assert time.startswith("diffattn: a step takes ") and "1 more take " in time
    return folder


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of `ROOM`, which takes no time."""
    monkeypatch.setattr(module, "plan_memory", lambda *args, **options: ROOM)


def line(inputs: Path, output: Path, *options: object, source: object = "in.mp4", checkpoint: object = "star") -> list:
    where = ["--checkpoint", inputs / str(checkpoint), "--output", output, "--device", "cpu", "--dtype", "float32"]
    settings = ["--scale", 2, "--steps", 2, "--window", 4, "--decode-chunk", 3, "--prompt", "a car"]
    return [*map(str, ["video-upscale", inputs / str(source), *where, *settings, *options])]


def invoke(inputs: Path, output: Path, *options: object, **places: object) -> Result:
    return CliRunner().invoke(app, line(inputs, output, *options, **places), env={"COLUMNS": "200"})


def succeed(inputs: Path, output: Path, *options: object, **places: object) -> str:
    result = invoke(inputs, output, *options, **places)
    assert result.exit_code == 0, result.output
    return result.stderr


def refusal(inputs: Path, output: Path, *options: object, code: int = 2, **places: object) -> str:
    """The one line with which the command ends; nothing is left of it but what was there."""
    before = sorted(output.parent.rglob("*"))
    result = invoke(inputs, output, *options, **places)
    assert result.exit_code == code, result.output
    *told, text = result.stderr.strip().splitlines()
    assert text.startswith("diffattn: error: ") and all("needs about" in other for other in told), result.stderr
    if code == 2:
        assert sorted(output.parent.rglob("*")) == before
    return text


def video_of(path: Path) -> np.ndarray:
    return np.stack(list(read_frames(path)))


def likeness(result: np.ndarray, source: np.ndarray) -> float:
    """Correlation of a small image of a result with the source's."""
    small = np.asarray(Image.fromarray(result).resize(source.shape[1::-1], Image.Resampling.BOX))
    return float(np.corrcoef(small.ravel(), source.ravel())[0, 1])


def test_help_shows_examples() -> None:
    text = CliRunner().invoke(app, ["video-upscale", "--help"], env={"COLUMNS": "200"}).stdout
    assert text.count("$ diffattn video-upscale") == 4
    for option in ("--scale", "--tile-overlap", "--decode-chunk", "--color", "--negative-prompt", "--official"):
        assert option in text
    for option in ("--resume", "--force", "--offload", "--start", "--seed", "--device", "--dtype", "--output"):
        assert option in text


@pytest.mark.slow
def test_length_rate_size_and_sound_are_the_inputs(made: Path) -> None:
    found = probe(made / "out.mp4")
    assert (found.frames, found.rate, found.height, found.width) == (COUNT, Fraction(10), 72, 88)
    begin, end = files.sound_of(made / "out.mp4") or (1, 0)
    assert begin == pytest.approx(0, abs=0.15) and end == pytest.approx(COUNT / 10, abs=0.15)
    assert sorted(path.name for path in made.iterdir()) == ["out.json", "out.mp4"]


@pytest.mark.slow
def test_the_same_is_made_by_the_record_beside_it(made: Path, tmp_path: Path, room: None) -> None:
    record = json.loads((made / "out.json").read_text())
    assert record["made"] == {"files": ["out.mp4"], "height": 72, "width": 88, "frames": COUNT}
    arguments = ["video-upscale", "--like", made / "out.mp4", "--output", tmp_path / "again.mp4"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert np.array_equal(video_of(tmp_path / "again.mp4"), video_of(made / "out.mp4"))


@pytest.mark.slow
def test_colours_are_the_inputs(inputs: Path, made: Path) -> None:
    means = [video_of(path).mean((1, 2)) for path in (inputs / "in.mp4", made / "out.mp4")]
    assert np.abs(means[0] - means[1]).max() < 8


@pytest.mark.usefixtures("room")
def test_a_part_of_the_video(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sound is that of these frames."""
    writers, real = [], module.VideoWriter
    monkeypatch.setattr(module, "VideoWriter", lambda *args, **more: writers.append(args) or real(*args, **more))
    succeed(inputs, tmp_path / "out.mov", "--start", 2, "--frames", 2, "--color", "none", "--guidance", 1)
    assert probe(tmp_path / "out.mov").frames == 2
    assert writers[-1][1:] == (10, inputs / "in.mp4", pytest.approx(0.2))
    begin, end = files.sound_of(tmp_path / "out.mov") or (1, 0)
    assert begin == pytest.approx(0, abs=0.15) and end == pytest.approx(0.2, abs=0.15)


@pytest.mark.usefixtures("room")
def test_one_frame_of_a_folder(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    Image.fromarray(files.carphone(1, 20, 28)[0]).save(tmp_path / "frames" / "1.png")
    succeed(inputs, tmp_path / "out.mkv", "--fps", "30000/1001", "--scale", 1.5, source=tmp_path / "frames")
    assert video_of(tmp_path / "out.mkv").shape == (1, 30, 42, 3)
    assert probe(tmp_path / "out.mkv").rate == pytest.approx(Fraction(30000, 1001), rel=1e-3)


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize(("height", "width"), [(44, 36), (15, 21)], ids=["portrait", "odd"])
@pytest.mark.slow
def test_portrait_and_odd_sizes(inputs: Path, tmp_path: Path, height: int, width: int) -> None:
    """H.264 has even sides: an odd one repeats its last pixels, in the input as in the result."""
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(files.carphone(2, height, width)):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{number}.png")
    succeed(inputs, tmp_path / "out.mp4", "--scale", 1, "--steps", 1, source=tmp_path / "frames")
    assert video_of(tmp_path / "out.mp4").shape == (2, height + height % 2, width + width % 2, 3)


@pytest.mark.usefixtures("room")
def test_a_turned_video_comes_out_upright(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored lying, 36 x 44, and to be shown turned by 90 degrees; the decoder is left out, so that it can be seen."""

    def enlarged(self: object, source: object, *args: object) -> object:
        return (torch.nn.functional.interpolate(frame, scale_factor=2.0) for frame in source)

    path = tmp_path / "turned.mp4"
    shutil.copy(inputs / "in.mp4", path)
    data = bytearray(path.read_bytes())
    place = data.find(b"tkhd") + 44
    data[place : place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    monkeypatch.setattr(module.STARPipeline, "decode_clip", enlarged)
    succeed(inputs, tmp_path / "out.mp4", "--steps", 1, source=path)
    result, stored = video_of(tmp_path / "out.mp4"), video_of(inputs / "in.mp4")
    assert result.shape == (COUNT, 88, 72, 3) and probe(tmp_path / "out.mp4").rotation == 0
    assert likeness(result[1], np.rot90(stored[1], -1)) > 0.98


@pytest.mark.usefixtures("room")
def test_uneven_frames_come_at_their_time_and_are_told_once(
    inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "uneven.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 36, 44, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10)
        for pixels, tick in zip(files.carphone(4, 36, 44), (0, 1, 3, 4), strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    succeed(inputs, tmp_path / "out.mp4", "--steps", 1, source=path)
    assert sum("not evenly spaced" in message for message in caplog.messages) == 1
    assert probe(tmp_path / "out.mp4").frames == 5


@pytest.mark.usefixtures("room")
def test_pixels_that_are_not_square_stay_so(inputs: Path, tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "in.mp4", 10, aspect=Fraction(64, 45)) as video:
        video.write(files.carphone(1, 36, 44)[0])
    succeed(inputs, tmp_path / "out.mp4", "--steps", 1, "--guidance", 1, source=tmp_path / "in.mp4")
    assert probe(tmp_path / "out.mp4").aspect == Fraction(64, 45)


@pytest.mark.parametrize(("patch", "steps"), [(IN_A_STEP, 1), (IN_DECODING, 2)], ids=["in a step", "in decoding"])
@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_video(
    inputs: Path, made: Path, tmp_path: Path, room: None, patch: str, steps: int
) -> None:
    output = tmp_path / "out.mp4"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED.format(patch=patch), *line(inputs, output)]
    process = subprocess.run(command, env=environment, check=False, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert WorkFolder(output).steps == steps
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4.work"]
    assert "seed=0, and this one has 1: use that" in refusal(inputs, output, "--resume", "--seed", 1)
    assert "prompt=a car, and this one has fog" in refusal(inputs, output, "--resume", "--prompt", "fog")
    assert "scale=2.0, and this one has 3.0" in refusal(inputs, output, "--resume", "--scale", 3)
    assert "out.mp4.work is of a run that did not end: add --resume" in refusal(inputs, output)
    succeed(inputs, output, "--resume")
    assert output.read_bytes() == (made / "out.mp4").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.mp4"]


@pytest.mark.usefixtures("room")
@pytest.mark.slow
def test_numbers_that_are_not_finite_end_the_run_on_the_way(inputs: Path, tmp_path: Path) -> None:
    checkpoint = files.write_checkpoint(tmp_path / "broken", broken=True)
    text = refusal(inputs, tmp_path / "out.mp4", code=1, checkpoint=checkpoint)
    assert "expected finite latents" in text and text.endswith("what is done is kept: continue with --resume")
    assert not (tmp_path / "out.mp4").exists() and WorkFolder(tmp_path / "out.mp4").steps == 0


@pytest.mark.usefixtures("room")
def test_a_video_that_is_broken_is_told_before_anything(inputs: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.mp4"
    files.write_clip(path, 12, height=96, width=96)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = next(islice(container.demux(video=0), 6, None))
    data[packet.pos + 5 : packet.pos + packet.size] = bytes(packet.size - 5)
    path.write_bytes(data)
    assert "expected a whole video" in refusal(inputs, tmp_path / "out.mp4", source=path)
    data = files.write_clip(tmp_path / "unknown.mp4", 2, height=36, width=44).read_bytes()
    (tmp_path / "unknown.mp4").write_bytes(data.replace(b"avc1", b"zzzz"))
    assert "of a codec that FFmpeg knows" in refusal(inputs, tmp_path / "out.mp4", source=tmp_path / "unknown.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    assert "text.mp4" in refusal(inputs, tmp_path / "out.mp4", source=tmp_path / "text.mp4")
    files.write_tone(tmp_path / "sound.mp4", 0.5)
    assert "without images" in refusal(inputs, tmp_path / "out.mp4", source=tmp_path / "sound.mp4")


@pytest.mark.usefixtures("room")
def test_a_video_without_frames_is_refused(inputs: Path, tmp_path: Path) -> None:
    path = tmp_path / "empty.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 36, 44, "yuv420p"
        container.start_encoding()
    text = refusal(inputs, tmp_path / "out.mp4", source=path)
    assert "empty.mkv" in text and "expected a" in text


@pytest.mark.usefixtures("room")
def test_sound_that_the_output_cannot_hold_is_told_before_anything(inputs: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.height, video.width, video.pix_fmt = 36, 44, "yuv420p"
        sound = container.add_stream("pcm_u8", rate=8000, layout="mono")
        for number, pixels in enumerate(files.carphone(3, 36, 44)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number
            container.mux(video.encode(frame))
        wave = av.AudioFrame.from_ndarray(np.zeros((1, 2400), np.uint8), "u8", "mono")
        wave.sample_rate, wave.pts = 8000, 0
        container.mux(sound.encode(wave))
        for stream in (video, sound):
            container.mux(stream.encode())
    assert "write a .mkv" in refusal(inputs, tmp_path / "out.mp4", source=path)


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize(
    ("free", "message"),
    [
        (5 * 10**6, "expected 6.0 MB of free memory on cpu; got 5.0 MB; try a smaller --decode-chunk or --decode-tile"),
        (10**9, "expected 1.0 MB of free disk for"),
    ],
    ids=["memory", "disk"],
)
@pytest.mark.slow
def test_too_little_room_is_refused_unless_forced(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, message: str
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda folder: Usage(0, 0, 0))
    text = refusal(inputs, tmp_path / "out.mp4")
    assert message in text and text.endswith("or --force")
    assert "--force: tried all the same" in succeed(inputs, tmp_path / "out.mp4", "--steps", 1, "--force")


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 0), "expected num_inference_steps of at least 1; got 0"),
        (("--steps", 5000), "expected few enough steps"),
        (("--guidance", -1), "expected guidance_scale"),
        (("--overlap", 4), "expected overlap from 0 to below window"),
        (("--window", 0), "expected window of at least 1"),
        (("--decode-chunk", 0), "expected decode_chunk of at least 1"),
        (("--tile", 64), "expected tile 8 pixels above tile_overlap"),
        (("--decode-tile", 8), "expected decode_tile 8 pixels above tile_overlap"),
        (("--scale", 0.5), "expected an upscale of at least 1; got 0.5"),
        (("--color", "lab"), "--color must be one of adain, wavelet or none, got 'lab'"),
        (("--start", 9), "expected a frame from --start 9 on"),
        (("--start", -1), "--start must be an int of at least 0, got -1"),
        (("--frames", 0), "--frames must be an int of at least 1, got 0"),
        (("--fps", 12), "--fps is for a folder of frames"),
        (("--fps", "fast"), "--fps must be a number or a fraction"),
        (("--dtype", "int8"), "--dtype must be one of"),
        (("--offload",), "this is --device cpu: leave --offload out"),
        (("--resume",), "--resume: there is no run in"),
    ],
)
def test_wrong_options_are_refused(inputs: Path, tmp_path: Path, options: tuple[object, ...], message: str) -> None:
    assert message in refusal(inputs, tmp_path / "out.mp4", *options)


@pytest.mark.usefixtures("room")
def test_wrong_places_are_refused(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for text, output, places in (
        ("expected a file name that ends in", tmp_path / "out.gif", {}),
        ("expected a folder to write to", tmp_path / "file" / "out.mp4", {}),
        ("in.mp4 is the input; give another name", inputs / "in.mp4", {}),
        ("expected a folder from `convert`", out, {"checkpoint": tmp_path / "none"}),
        ("expected a folder from `convert`", out, {"checkpoint": tmp_path / "empty"}),
        ("none.mp4", out, {"source": tmp_path / "none.mp4"}),
        ("empty", out, {"source": tmp_path / "empty"}),
    ):
        assert text in refusal(inputs, output, **places)
    (tmp_path / "link.mp4").symlink_to(inputs / "in.mp4")
    assert "is the input" in refusal(inputs, tmp_path / "link.mp4")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "CogVideoXSTARPipeline",
            "of the CogVideoX variant in .*; open it from Python, with .*CogVideoXSTARPipeline",
        ),
        ("StableDiffusionPipeline", "expected a checkpoint of STARPipeline in .*; got one of StableDiffusionPipeline"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(inputs: Path, tmp_path: Path, kind: str, message: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    assert re.search(message, refusal(inputs, tmp_path / "out.mp4", checkpoint=other))


@pytest.mark.parametrize(
    ("part", "key"), [("controlnet", "conv_in.bias"), ("vae", "decoder.conv_in.bias"), ("text_encoder", None)]
)
@pytest.mark.usefixtures("room")
def test_a_checkpoint_without_some_weights_is_refused(inputs: Path, tmp_path: Path, part: str, key: str | None) -> None:
    shutil.copytree(inputs / "star", tmp_path / "less")
    (file,) = (tmp_path / "less" / part).glob("*.safetensors")
    weights = load_file(file)
    key = key or max(weights)
    del weights[key]
    save_file(weights, file, {"format": "pt"})
    text = refusal(inputs, tmp_path / "out.mp4", checkpoint=tmp_path / "less")
    assert f"{part} are not those of its configuration: 1 missing: {key}" in text


@pytest.mark.slow
def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "diffattn.pipelines.video_sr", "--help"]
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "Restore and enlarge a video by STAR" in result.stdout
