"""An animation as a library call: what goes in, what is kept on the way, and the same numbers as the pipeline's."""

import contextlib
import sys
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

pytest.importorskip("av", reason="needs PyAV, the extra `video`")

import portrait_files as files
from diffattn.pipelines.portrait_animation.face.detection import LandmarkFile
from diffattn.pipelines.portrait_animation.face.paste import face_box
from diffattn.pipelines.portrait_animation.run.animation import Animation, Settings
from diffattn.pipelines.portrait_animation.run.work import StoredFrames, WorkFolder

from diffattn.media.clip import Clip

CPU = torch.device("cpu")
COUNT = 3


class Stop(Exception):
    """Of a run, by a test."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, a source, a driving video and points."""
    folder = tmp_path_factory.mktemp("inputs")
    files.write_checkpoint(folder / "ddim")
    files.write_checkpoint(folder / "lcm", lcm=True)
    files.write_source(folder / "source.png")
    files.write_clip(folder / "driving.mp4", COUNT)
    files.write_points(folder / "points.npy", COUNT)
    return folder


def animation(inputs: Path, output: Path, *, checkpoint: str = "ddim", resume: bool = False, **settings: Any) -> Any:
    return Animation(
        source=inputs / "source.png",
        driving=Clip(path=inputs / "driving.mp4"),
        checkpoint=inputs / checkpoint,
        output=output,
        resume=resume,
        settings=Settings(**{"steps": 2, "guidance": 2.0, "window": 2, "overlap": 1, **settings}),
    )


def prepared(made: Any, inputs: Path) -> Any:
    return made.prepared(LandmarkFile(inputs / "points.npy"), CPU, torch.float32)


@pytest.mark.parametrize("settings", [{"official": True, "paste": False}, {"best_frame": 1, "guidance": 1.0}])
def test_a_run_computes_what_the_pipeline_does(inputs: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(Stop), prepared(animation(inputs, tmp_path / "a.mp4", **settings), inputs) as run:
        latents, pipe = run.denoise(), run.pipe
        driving, local = (stored[range(COUNT)] for stored in (run.controls.driving, run.controls.local))
        assert len(latents) == COUNT and not torch.equal(latents[0], latents[1])
        expected = pipe(
            (run._reference() + 1) / 2,
            (driving + 1) / 2,
            (local + 1) / 2,
            num_inference_steps=2,
            guidance_scale=settings.get("guidance", 2.0),
            window_size=2,
            window_overlap=1,
            official=settings.get("official", False),
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames[0]
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
        raise Stop


@pytest.mark.parametrize("paste", [True, False])
def test_the_driving_face_lies_where_the_animated_one_does(inputs: Path, tmp_path: Path, paste: bool) -> None:
    """A white rectangle in the place of the driving face comes to lie over the source's, in the square or in all."""
    points, frame = files.face(10, 6, 18), np.zeros((*files.DRIVING, 3), dtype=np.uint8)
    (left, top), (right, bottom) = np.round(points.min(0)).astype(int), np.round(points.max(0)).astype(int)
    frame[top:bottom, left:right] = 255
    (tmp_path / "frames").mkdir()
    Image.fromarray(frame).save(tmp_path / "frames" / "0.png")
    target = files.face(20, 12, 16)
    np.save(tmp_path / "points.npy", np.stack([target, points]))
    made = Animation(
        source=inputs / "source.png",
        driving=Clip(path=tmp_path / "frames"),
        checkpoint=inputs / "ddim",
        output=tmp_path / "a.mp4",
        settings=Settings(paste=paste),
    )
    with pytest.raises(Stop), prepared(made, tmp_path) as run:
        white = run.controls.driving.pixels[0].min(-1) > 127
        rows, columns = np.flatnonzero(white.any(1)), np.flatnonzero(white.any(0))
        box = face_box(target, *files.SOURCE)
        origin, size = ((box.left, box.top), (box.side, box.side)) if paste else ((0, 0), files.SOURCE[::-1])
        for pixels, axis in ((columns, 0), (rows, 1)):
            low, high = (np.array([target[:, axis].min(), target[:, axis].max()]) - origin[axis]) * 128 / size[axis]
            assert abs(pixels[0] - low) < 4 and abs(pixels[-1] - high) < 4
        raise Stop


@pytest.mark.parametrize("checkpoint", ["ddim", "lcm"])
@pytest.mark.slow
def test_a_run_that_stopped_goes_on(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: str
) -> None:
    write = WorkFolder.write_state

    def stop(self: WorkFolder, step: int, *state: Any) -> None:
        write(self, step, *state)
        if step == 1:
            raise Stop

    def latents_of(resume: bool = False, name: str = "a.mp4") -> torch.Tensor | None:
        made, latents = animation(inputs, tmp_path / name, checkpoint=checkpoint, resume=resume, steps=3), None
        with contextlib.suppress(Stop), prepared(made, inputs) as run:
            latents = run.denoise()
            raise Stop
        return latents

    whole = latents_of(name="b.mp4")
    monkeypatch.setattr(WorkFolder, "write_state", stop)
    assert latents_of() is None
    with pytest.raises(ValueError, match="a.mp4.work is of a run that did not end: add --resume"):
        latents_of()
    monkeypatch.setattr(WorkFolder, "write_state", write)
    for _ in ("from the first step", "from the last"):
        latents = latents_of(resume=True)
        assert latents is not None and whole is not None and torch.equal(latents, whole)


def test_patches_may_grow_with_the_face(inputs: Path, tmp_path: Path) -> None:
    shares = []
    for scaled in (False, True):
        made = animation(inputs, tmp_path / f"{scaled}.mp4", scale_patches=scaled)
        with prepared(made, inputs) as run:
            shares.append((run.controls.local.pixels.max(-1) > 0).mean())
    assert abs(shares[0] - shares[1]) > 0.02 and min(shares) > 0.01


def test_what_takes_long_is_told(inputs: Path, tmp_path: Path) -> None:
    told: dict[str, tuple[int, int | None]] = {}

    def counted(frames: Iterable[Any], label: str, total: int | None) -> Iterator[Any]:
        for number, frame in enumerate(frames):
            told[label] = number + 1, total
            yield frame

    made = animation(inputs, tmp_path / "out.mp4", steps=1)
    with made.prepared(LandmarkFile(inputs / "points.npy"), CPU, torch.float32, counted) as run:
        run.write(run.denoise())
    assert told == {"faces": (COUNT, None), "alignment": (COUNT, COUNT), "frames": (COUNT, COUNT)}


def test_control_pictures_come_back_from_the_disk(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "a.mp4")
    work.open({}, resume=False)
    pictures = np.random.default_rng(1).random((3, 2, 5, 7, 3), dtype=np.float32)
    points = [files.face(1, 2, 3), None, files.face(4, 5, 6)]
    kept = work.write_controls(iter(pictures), points, None)
    assert kept.source is None and kept.points[1] is None and np.array_equal(kept.points[2], points[2])
    assert isinstance(kept.driving.pixels, np.memmap) and len(kept.local) == 3
    expected = torch.from_numpy(pictures[[2, 0], 1]).permute(0, 3, 1, 2) * 2 - 1
    torch.testing.assert_close(kept.local[[2, 0]], expected, rtol=0, atol=1 / 255 + 1e-6)
    np.save(tmp_path / "own.npy", np.array([[[[0, 255, 51]]]], np.uint8))
    assert torch.equal(StoredFrames(tmp_path / "own.npy")[[0]].flatten(), torch.tensor([-1, 1, -0.6]))


def test_control_pictures_are_whole_or_not_there(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "a.mp4")
    work.open({}, resume=False)
    pair = (np.zeros((2, 2, 3), np.float32),) * 2

    def broken() -> Any:
        yield pair
        raise Stop

    with pytest.raises(Stop):
        work.write_controls(broken(), [None, None], None)
    assert not work.controls.exists()
    work.write_controls([pair, pair], [None, None], files.FACE)
    assert len(work.read_controls().driving) == 2


def test_control_pictures_need_no_memory_for_more_frames(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "a.mp4")
    work.open({}, resume=False)
    count, side = 200, 48
    pictures = ((np.full((side, side, 3), 0.5, np.float32),) * 2 for _ in range(count))
    tracemalloc.start()
    kept = work.write_controls(pictures, [None] * count, None)
    assert kept.driving[[0, count - 1]].shape == (2, 3, side, side)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < count * side * side * 3 / 2  # bytes of half of one of the two


def test_the_state_brings_the_generator_back(tmp_path: Path) -> None:
    work, generator = WorkFolder(tmp_path / "a.mp4"), torch.Generator().manual_seed(3)
    work.open({}, resume=False)
    assert work.read_state(generator) is None
    latents = torch.randn(2, 4, 3, 5, generator=generator).half()
    work.write_state(7, latents, generator)
    expected = torch.rand(3, generator=generator)
    fresh = torch.Generator()
    step, kept = work.read_state(fresh) or (0, latents)
    assert step == 7 and kept.dtype == torch.float16 and torch.equal(kept, latents)
    assert torch.equal(torch.rand(3, generator=fresh), expected)


def test_a_work_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="--resume: there is no run in .*a.mp4.work"):
        work.open({}, resume=True)
    work.open({"seed": 1, "face": None}, resume=False)
    work.open({"seed": 1, "face": None}, resume=True)
    with pytest.raises(ValueError, match="is of a run with seed=1, and this one has 2: use that"):
        work.open({"seed": 2, "face": None}, resume=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "expected from 1 to 1000 steps; got 0"),
        ({"steps": 1001}, "expected from 1 to 1000 steps"),
        ({"guidance": 0.5}, "expected --guidance from 1, which is none; got 0.5"),
        ({"guidance": float("nan")}, "expected --guidance"),
        ({"guidance": float("inf")}, "expected --guidance"),
        ({"window": 4, "overlap": 4}, "expected --overlap from 0 to below --window; got 4 and 4"),
        ({"overlap": -1}, "expected --overlap"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**settings)
