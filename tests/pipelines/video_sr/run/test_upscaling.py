"""An upscaling as a library call: the pipeline's numbers, what is kept on the way, and what is told."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import clip_files as files
import numpy as np
import pytest
import torch
from diffattn.pipelines.video_sr.i2vgenxl.settings import UpscaleSettings
from diffattn.pipelines.video_sr.i2vgenxl.sizes import plan_upscaling
from diffattn.pipelines.video_sr.run import upscaling as module
from diffattn.pipelines.video_sr.run.memory import MemoryPlan
from diffattn.pipelines.video_sr.run.upscaling import Run, Upscaling, spell
from diffattn.pipelines.video_sr.run.work import WatchedStore, WorkFolder

from diffattn.media.clip import Clip
from diffattn.media.color import to_bytes
from diffattn.media.video import VideoWriter, read_frames

CPU = torch.device("cpu")
COUNT = 5
SEED = 5


class Stop(Exception):
    """Of a run, by a test."""


class Shown:
    """A progress that notes how many of what came by."""

    def __init__(self) -> None:
        self.seen: dict[str, list[int | None]] = {}

    def __call__(self, frames: Iterable[Any], label: str, total: int | None) -> Iterable[Any]:
        self.seen[label] = [0, total]
        for frame in frames:
            self.seen[label][0] += 1
            yield frame


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    files.write_checkpoint(folder / "star")
    files.write_clip(folder / "in.mp4", COUNT)
    return folder


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The video of a run that was never stopped."""
    output = tmp_path_factory.mktemp("whole") / "a.mp4"
    with upscaling(inputs, output).prepared(CPU, torch.float32) as run:
        run.make()
    return output


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> MemoryPlan:
    """What every run is said to need; `test_memory_plan` tests the real thing, which takes seconds."""
    weights = dict.fromkeys(("unet", "controlnet", "vae", "text_encoder"), 1)
    plan = MemoryPlan(weights=weights, encode=1, window=1, decode=1, frames=1, disk=1, dtype=torch.float32)
    monkeypatch.setattr(module, "plan_memory", lambda *args, **options: plan)
    return plan


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The frames that all writers get."""
    got: list[np.ndarray] = []
    write = VideoWriter.write
    monkeypatch.setattr(VideoWriter, "write", lambda self, frame: (got.append(frame.copy()), write(self, frame)))
    return got


def upscaling(inputs: Path, output: Path, *, resume: bool = False, count: int | None = None, **settings: Any) -> Any:
    own = {"num_inference_steps": 3, "guidance_scale": 2.0, "window": 4, "overlap": 2, "decode_chunk": 3, "seed": SEED}
    return Upscaling(
        clip=Clip(path=inputs / "in.mp4", count=count),
        checkpoint=inputs / "star",
        output=output,
        scale=2.0,
        prompt="a car",
        negative_prompt="fog",
        resume=resume,
        settings=UpscaleSettings(**{**own, **settings}),
    )


def drawn() -> tuple[torch.Generator, int]:
    """A generator for the pipeline, and the seed that the pipeline draws from it."""
    seed = int(torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(SEED)))
    return torch.Generator().manual_seed(SEED), seed


@pytest.mark.parametrize("settings", [{}, {"color_fix": "wavelet", "guidance_scale": 1.0, "tile": 80}])
@pytest.mark.slow
def test_a_run_writes_what_the_pipeline_gives(
    inputs: Path, tmp_path: Path, written: list[np.ndarray], settings: dict[str, Any]
) -> None:
    generator, seed = drawn()
    made = upscaling(inputs, tmp_path / "a.mp4", seed=seed, tile_overlap=16, **settings)
    with made.prepared(CPU, torch.float32) as run:
        written.clear()  # of the trial
        run.make()
    options = {name: value for name, value in vars(made.settings).items() if name != "seed"}
    clip = torch.from_numpy(np.stack(list(read_frames(inputs / "in.mp4")))).permute(0, 3, 1, 2).float() / 255
    call = {**options, "upscale": 2.0, "generator": generator, "output_type": "pt"}
    expected = to_bytes(run.pipe(clip, "a car", "fog", **call).frames[0], truncate=False)
    assert len(written) == COUNT and not np.array_equal(written[0], written[1])
    assert np.array_equal(np.stack(written), expected.permute(0, 2, 3, 1).numpy())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4"]


@pytest.mark.slow
def test_latents_are_kept_after_each_step(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = upscaling(inputs, tmp_path / "a.mp4"), []
    note = WorkFolder.note

    def look(self: WorkFolder, steps: int) -> None:
        assert self.steps == (None if steps == 0 else steps - 1)
        seen.append(sorted(path.stem for path in self.latents.glob("*.f32")))
        note(self, steps)

    monkeypatch.setattr(WorkFolder, "note", look)
    with contextlib.suppress(Stop), made.prepared(CPU, torch.float32) as run:
        run.encode()
        run.denoise()
        raise Stop
    assert seen[:2] == [["hint", "x.0"], ["hint", "x.0", "x.1", "x0.1"]]
    assert seen[2:] == [["hint", "x.1", "x.2", "x0.1", "x0.2"], ["hint", "x.2", "x.3", "x0.2", "x0.3"]]
    assert made.work.steps == 3 and made.work.size > 4 * 4 * COUNT * 100


@pytest.mark.parametrize(
    ("name", "after"),
    [("hint", 3), ("x.1", 0), ("x0.2", 2), ("x.3", 2)],
    ids=["encoding", "in a step", "between state and x0", "last step"],
)
@pytest.mark.slow
def test_a_run_that_stopped_goes_on_to_the_same_frames(
    inputs: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, after: int
) -> None:
    """`after` so many frames of an entry were written, the run stops; twice, for it may stop again."""

    def run(resume: bool) -> None:
        made = upscaling(inputs, tmp_path / "a.mp4", resume=resume)
        with contextlib.suppress(Stop), made.prepared(CPU, torch.float32) as run:
            run.make()

    write = WatchedStore.write

    def stop(self: WatchedStore, entry: str, begin: int, frames: torch.Tensor) -> None:
        write(self, entry, begin, frames)
        if entry == name and begin + len(frames) > after:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(WatchedStore, "write", stop)
        run(resume=False)
        run(resume=True)
    with pytest.raises(ValueError, match="a.mp4.work is of a run that did not end: add --resume"):
        run(resume=False)
    assert not (tmp_path / "a.mp4").exists()
    run(resume=True)
    assert (tmp_path / "a.mp4").read_bytes() == whole.read_bytes() and not (tmp_path / "a.mp4.work").exists()


@pytest.mark.slow
def test_done_steps_are_not_done_again(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.suppress(Stop), upscaling(inputs, tmp_path / "a.mp4").prepared(CPU, torch.float32) as run:
        run.encode()
        run.denoise()
        raise Stop
    for name in ("encode_clip", "denoise_step", "embed"):
        monkeypatch.setattr(module.STARPipeline, name, lambda *args, **options: pytest.fail("done already"))
    shown = Shown()
    again = upscaling(inputs, tmp_path / "a.mp4", resume=True)
    with again.prepared(CPU, torch.float32, progress=shown) as run:
        run.make()
    assert set(shown.seen) == {"reading", "decoding"} and (tmp_path / "a.mp4").is_file()


@pytest.mark.slow
def test_progress_goes_by_frames_and_time_is_told(inputs: Path, tmp_path: Path) -> None:
    shown, told = Shown(), []
    made = upscaling(inputs, tmp_path / "a.mp4")
    with made.prepared(CPU, torch.float32, progress=shown, tell=told.append) as run:
        run.make()
    expected = {"reading": [COUNT, None], "encoding": [COUNT, COUNT], "decoding": [COUNT, COUNT]}
    expected |= {"denoising": [3 * COUNT, 3 * COUNT]}
    assert shown.seen == expected
    assert told[0].startswith("needs about 0.0 MB of memory") and told[0].endswith(f"disk in {made.work.path}")
    assert len(told) == 2 and told[1].startswith("a step takes ") and "; 2 more take " in told[1]


@pytest.mark.slow
def test_too_little_room_is_refused_unless_forced(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffattn.pipelines.video_sr.run.memory.free_bytes", lambda device: 0)
    made, told = upscaling(inputs, tmp_path / "a.mp4", num_inference_steps=1), []
    with pytest.raises(ValueError, match="of free memory on cpu"), made.prepared(CPU, torch.float32):
        pass
    assert not list(tmp_path.iterdir())
    with made.prepared(CPU, torch.float32, force=True, tell=told.append) as run:
        run.make()
    assert "expected 0.0 MB of free memory on cpu" in told[1] and told[1].endswith("--force: tried all the same")


def test_settings_that_the_video_depends_on_are_compared(inputs: Path, tmp_path: Path) -> None:
    made = upscaling(inputs, tmp_path / "a.mp4")
    with contextlib.suppress(Stop), made.prepared(CPU, torch.float32):
        raise Stop
    for settings, name in (({"seed": 1}, "seed"), ({"window": 5}, "window"), ({"count": 3}, "frames")):
        with pytest.raises(ValueError, match=f"is of a run with {name}=.*, and this one has"):
            upscaling(inputs, tmp_path / "a.mp4", resume=True, **settings).prepared(CPU, torch.float32).__enter__()
    with pytest.raises(ValueError, match="is of a run with dtype=torch.float32"):
        upscaling(inputs, tmp_path / "a.mp4", resume=True).prepared(CPU, torch.bfloat16).__enter__()
    with pytest.raises(ValueError, match="--resume: there is no run in"):
        upscaling(inputs, tmp_path / "b.mp4", resume=True).prepared(CPU, torch.float32).__enter__()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4.work"]


@pytest.mark.parametrize("name", ["input", "checkpoint"])
def test_contents_that_changed_since_are_refused(inputs: Path, tmp_path: Path, name: str) -> None:
    """Under the same name."""
    own = Path(shutil.copytree(inputs, tmp_path / "own"))
    with contextlib.suppress(Stop), upscaling(own, tmp_path / "a.mp4").prepared(CPU, torch.float32):
        raise Stop
    file = own / "in.mp4" if name == "input" else own / "star" / "scheduler" / "scheduler_config.json"
    before = file.stat()
    if name == "input":
        files.write_clip(file, COUNT, repeat=2)
    else:
        file.write_text(file.read_text().replace("{", "{ ", 1).removesuffix("\n"))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match=f"is of a run with another {name}, whose content has changed since"):
        upscaling(own, tmp_path / "a.mp4", resume=True).prepared(CPU, torch.float32).__enter__()


def test_a_video_that_is_there_needs_overwrite(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"mine")
    with pytest.raises(ValueError, match="a.mp4 is there, and --output would replace it: add --overwrite"):
        upscaling(inputs, tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == b"mine"
    dataclasses.replace(upscaling(inputs, tmp_path / "b.mp4"), output=tmp_path / "a.mp4", overwrite=True)


def test_a_preparation_that_is_interrupted_leaves_nothing(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "open_pipeline", interrupted)
    with pytest.raises(KeyboardInterrupt), upscaling(inputs, tmp_path / "a.mp4").prepared(CPU, torch.float32):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("official", "expected"), [(False, 101), (True, 100)])
def test_values_are_rounded_but_cut_off_as_released(
    inputs: Path, tmp_path: Path, written: list[np.ndarray], official: bool, expected: int
) -> None:
    made = upscaling(inputs, tmp_path / "a.mp4", official=official)
    made.work.open({}, resume=False)
    pipe: Any = SimpleNamespace(decode_clip=lambda *args: iter([torch.full((2, 3, 8, 8), 100.7 / 255)]))
    plan = plan_upscaling(2, 36, 44, 2.0, UpscaleSettings(), steps=1)
    Run(made, plan, pipe).write()
    assert len(written) == 2 and (np.stack(written) == expected).all()


def test_latents_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    store = WatchedStore(tmp_path, iter(range(9)))
    with pytest.raises(RuntimeError, match=r"expected finite latents; got others for 'x.1' from frame 2 on; take"):
        store.write("x.1", 2, torch.tensor([[1.0], [float("inf")]]))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_bfloat16_and_one_frame(inputs: Path, tmp_path: Path) -> None:
    with upscaling(inputs, tmp_path / "a.mp4", count=1).prepared(CPU, torch.bfloat16) as run:
        run.make()
    (frame,) = read_frames(tmp_path / "a.mp4")
    assert frame.shape == (72, 88, 3)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "less than a second"), (59, "about 59 s"), (3599, "about 59 min 59 s"), (7500, "about 2 h 5 min")],
)
def test_durations_are_spelled(seconds: float, text: str) -> None:
    assert spell(seconds) == text
