"""Caches of clips: what the VAE makes of their frames, identified by content, resumed, and compared with the run."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import text_pipelines
import torch
from diffattn.distill.data.cache import CacheSource, write_cache
from diffattn.distill.data.cache_facts import FACTS, SAMPLE
from diffattn.distill.data.clips import Cut, load_clip
from diffattn.distill.data.pictures import Counts
from diffattn.distill.data.samples import collate
from diffattn.distill.encoders import model_facts, model_of
from diffattn.distill.inputs import predict
from diffattn.distill.objective import Noised
from PIL import Image
from safetensors.torch import load_file, save_file
from video_files import encode, picture

from diffattn import tiny

SIZE = text_pipelines.SIZE
ROOT = Path(__file__).resolve().parents[3]
LATENT_FRAMES = {"Wan": 3, "CogVideoX": 3, "CogVideoX-1.5": 4}
"""Of clips of nine frames; the patches of 1.5 span two."""
NINE = Cut(frames=9)


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {name: text_pipelines.PIPELINES[name]() for name in (*LATENT_FRAMES, "SD1.5")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A video, and a folder of frames, with captions."""
    encode(tmp_path / "a.mp4", [picture(number) for number in range(12)])
    (tmp_path / "deep/b").mkdir(parents=True)
    for number in range(9):
        Image.fromarray(picture(14 - number)).save(tmp_path / f"deep/b/{number}.png")
    (tmp_path / "a.txt").write_text("a red circle")
    (tmp_path / "deep/b.txt").write_text("a green ring")
    return tmp_path


def write(pipe: Any, folder: Path, name: str = "Wan", **options: Any) -> Counts:
    length = text_pipelines.CALL.get(name, {}).get("max_sequence_length")
    return write_cache(pipe, folder, **{"size": SIZE, "cut": NINE, "max_sequence_length": length, **options})


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("name", LATENT_FRAMES)
def test_a_clip_is_encoded_once_as_a_whole(name: str, pipes: dict[str, Any], folder: Path) -> None:
    pipe = pipes[name]
    assert write(pipe, folder, name, dtype=torch.float32) == Counts(done=2)
    assert set(files(folder)) == {f"a{SAMPLE}", f"deep/b{SAMPLE}"}
    stored = load_file(folder / f"a{SAMPLE}")
    with torch.no_grad():
        wanted = pipe.vae.encode(load_clip(folder / "a.mp4", SIZE, NINE)[None]).latent_dist.mean[0]
    frames, own = LATENT_FRAMES[name], wanted.shape[1]
    assert stored["mean"].shape == stored["std"].shape == (4, frames, 4, 6) and own == 3
    assert torch.equal(stored["mean"][:, frames - own :], wanted)
    assert torch.equal(stored["mean"][:, : frames - own], wanted[:, :1].expand(-1, frames - own, -1, -1))
    source = CacheSource(folder, expected={**model_facts(model_of(pipe)), "frames": 9})
    assert (source.names, source.frames, source.picture_size) == (["a", "deep/b"], 9, SIZE)
    batch = collate(source, range(2), seed=0)
    noised = Noised(batch.latents, torch.full((2,), 300), torch.full((2,), 0.3), batch.noise)
    with torch.no_grad():
        answer = predict(model_of(pipe), noised, batch.conditioning, None)
    assert answer.shape == batch.latents.shape == (2, 4, frames, 4, 6) and answer.isfinite().all()


def test_the_facts_say_which_frames(pipes: dict[str, Any], folder: Path) -> None:
    write(pipes["Wan"], folder, cut=Cut(frames=5, fps=Fraction(12)))
    said = json.loads((folder / FACTS).read_text())
    assert {name: said[name] for name in ("frames", "stride", "fps", "latent_size", "picture_size")} == {
        "frames": 5,
        "stride": 1,
        "fps": "12",
        "latent_size": [2, 4, 6],
        "picture_size": [32, 48],
    }


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        (Cut(frames=5), r"frames 5, got 9; latent_size \[2, 4, 6\], got \[3, 4, 6\]"),
        (Cut(frames=9, stride=2), "stride 2, got 1"),
        (Cut(frames=9, fps=Fraction(12)), "fps 12, got None"),
    ],
    ids=str,
)
def test_other_frames_are_refused(cut: Cut, said: str, pipes: dict[str, Any], folder: Path) -> None:
    write(pipes["Wan"], folder)
    before = files(folder)
    with pytest.raises(ValueError, match=f"another model or size: expected {said}; use another folder"):
        write(pipes["Wan"], folder, cut=cut)
    assert files(folder) == before
    with pytest.raises(ValueError, match="expected frames 13, got 9; use another folder"):
        CacheSource(folder, expected={"frames": 13})


def test_files_of_other_frames_are_written_anew_though_the_facts_are_gone(pipes: dict[str, Any], folder: Path) -> None:
    write(pipes["Wan"], folder, cut=Cut(frames=5))
    (folder / FACTS).unlink()
    assert write(pipes["Wan"], folder, cut=Cut(frames=5, stride=2)) == Counts(done=2)


def test_images_and_clips_do_not_share_a_cache(pipes: dict[str, Any], folder: Path) -> None:
    Image.fromarray(picture(3)).save(folder / "c.png")
    (folder / "c.txt").write_text("one")
    (folder / "deep/b.txt").unlink()
    for number in range(9):
        (folder / f"deep/b/{number}.txt").write_text("one")
    assert write(pipes["Wan"], folder, cut=None) == Counts(done=10)
    assert json.loads((folder / FACTS).read_text())["frames"] == 1
    with pytest.raises(ValueError, match="expected frames 9, got 1"):
        write(pipes["Wan"], folder)
    assert CacheSource(folder, expected={"frames": 1}).names[0] == "c"


def test_a_cache_of_images_that_says_no_frames_has_one(pipes: dict[str, Any], folder: Path) -> None:
    """That of an earlier release."""
    Image.fromarray(picture(3)).save(folder / "a.png")
    for path in (folder / "deep/b").iterdir():
        path.unlink()
    write(pipes["Wan"], folder, cut=None)
    said = json.loads((folder / FACTS).read_text())
    del said["frames"]
    (folder / FACTS).write_text(json.dumps(said))
    assert write(pipes["Wan"], folder, cut=None) == Counts(skipped=1)
    assert CacheSource(folder).frames == 1


@pytest.mark.parametrize(
    ("frames", "near"), [(2, "ask for 5"), (4, "ask for 5"), (8, "ask for 5 or 9"), (10, "ask for 9 or 13")]
)
def test_frames_that_are_no_whole_latents_are_refused(
    frames: int, near: str, pipes: dict[str, Any], folder: Path
) -> None:
    with pytest.raises(ValueError, match=f"clips of 4 n \\+ 1 frames.* got {frames}; {near}$"):
        write(pipes["Wan"], folder, cut=Cut(frames=frames))
    assert not (folder / FACTS).exists()


def test_image_models_take_no_clips(pipes: dict[str, Any], folder: Path) -> None:
    with pytest.raises(ValueError, match="UNet2DConditionModel makes images, got frames=9 of clips"):
        write(pipes["SD1.5"], folder, "SD1.5")
    assert not (folder / FACTS).exists()


def test_corrupt_and_short_clips_are_named_counted_and_no_samples(
    pipes: dict[str, Any], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(pipes["Wan"], folder)
    (folder / "a.mp4").write_bytes(b"none")
    encode(folder / "c.mp4", [picture(number) for number in range(8)])
    (folder / "c.txt").write_text("one")
    assert write(pipes["Wan"], folder) == Counts(skipped=1, corrupt=2)
    assert "corrupt clip: " in caplog.text and "a.mp4 is not a whole clip" in caplog.text
    assert "c.mp4 is too short: it has 8 of 9 frames" in caplog.text
    assert CacheSource(folder).names == ["deep/b"]


def test_nothing_but_short_clips_raises(pipes: dict[str, Any], folder: Path) -> None:
    with pytest.raises(ValueError, match="expected clips in .*, got 2 corrupt files only"):
        write(pipes["Wan"], folder, cut=Cut(frames=13))
    assert not (folder / FACTS).exists()


def test_what_has_changed_since_is_encoded_anew(
    pipes: dict[str, Any], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A frame of a folder, though its size and time are the former ones."""
    write(pipes["Wan"], folder)
    former = load_file(folder / f"deep/b{SAMPLE}")["mean"]
    assert write(pipes["Wan"], folder) == Counts(skipped=2)
    frame = folder / "deep/b/4.png"
    times = os.stat(frame)
    Image.fromarray(picture(1)).save(frame)
    os.utime(frame, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert write(pipes["Wan"], folder) == Counts(done=1, skipped=1)
    assert "encoded anew: 1 (deep/b)" in caplog.text
    assert not torch.equal(load_file(folder / f"deep/b{SAMPLE}")["mean"], former)
    (folder / "a.mp4").write_bytes((folder / "a.mp4").read_bytes() + bytes(1))
    assert write(pipes["Wan"], folder) == Counts(done=1, skipped=1)


def test_processes_share_the_clips(pipes: dict[str, Any], folder: Path) -> None:
    assert write(pipes["Wan"], folder, rank=0, world=2) == Counts(done=1)
    assert write(pipes["Wan"], folder, rank=1, world=2) == Counts(done=1)
    assert write(pipes["Wan"], folder) == Counts(skipped=2)


def test_clips_that_are_gone_or_not_cached_are_told(
    pipes: dict[str, Any], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(pipes["Wan"], folder)
    (folder / "a.mp4").unlink()
    assert CacheSource(folder).names == ["deep/b"]
    assert "videos are gone, left out: 1 (a)" in caplog.text
    (folder / f"deep/b{SAMPLE}").unlink()
    for path in (folder / "deep/b").iterdir():
        path.unlink()
    assert CacheSource(folder).names == ["a"], "files without any video are samples"


def test_latents_of_one_batch_are_those_of_the_facts(pipes: dict[str, Any], folder: Path) -> None:
    write(pipes["Wan"], folder)
    shorter = {key: value[:, :2].contiguous() if value.ndim == 4 else value
               for key, value in load_file(folder / f"a{SAMPLE}").items()}  # fmt: skip
    save_file(shorter, folder / f"a{SAMPLE}")
    with pytest.raises(ValueError, match="sample a can't be read: expected tensors"):
        collate(CacheSource(folder), range(2), seed=0)


def test_one_clip_is_in_memory_at_a_time(pipes: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[Any] = []

    def load(*arguments: Any) -> Any:
        assert all(former() is None for former in alive), "the clip before is still held"
        clip = load_clip(*arguments)
        alive.append(weakref.ref(clip))
        return clip

    monkeypatch.setattr("diffattn.distill.data.cache.load_clip", load)
    assert write(pipes["Wan"], folder) == Counts(done=2)
    assert len(alive) == 2


@pytest.mark.slow
def test_a_killed_process_is_resumed(folder: Path) -> None:
    """By the command, on the bundled pipeline; what it had written is kept as it is."""
    for number in range(14):
        (folder / f"c{number:02d}.mp4").write_bytes((folder / "a.mp4").read_bytes())
        (folder / f"c{number:02d}.txt").write_text("a red circle")
    command = ["cache", "tiny:wan", str(folder), "--size", "48x48", "--frames", "9", "--device", "cpu"]
    running = subprocess.Popen(
        [sys.executable, "-m", "diffattn.distill", *command], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 300
    while len(files(folder)) < 3 and running.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    before = files(folder)
    assert 3 <= len(before) < 16
    pipe = text_pipelines.diffusers.WanPipeline.from_pretrained(tiny.path("wan"))
    counts = write(pipe, folder, size=(48, 48), max_sequence_length=16)
    assert counts.done + counts.skipped == 16 and counts.skipped >= len(before) - 1
    after = files(folder)
    assert len(after) == 16 and sum(after[name] == before[name] for name in before) == counts.skipped
    assert len(CacheSource(folder)) == 16
