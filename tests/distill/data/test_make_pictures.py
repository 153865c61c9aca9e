"""The teacher's own set: each image or clip by its number alone, made once."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import text_pipelines
import torch
from diffattn.distill.data.clips import find_clips
from diffattn.distill.data.make_pictures import make_pictures, read_prompts
from diffattn.distill.data.pictures import Counts, find_pictures
from diffusers import FluxPipeline
from PIL import Image

from diffattn import tiny
from diffattn.video import probe, read_frames

PROMPTS = [f"a large {colour} circle at the top left on a blue background" for colour in ("red", "green", "yellow")]
CALL = {**tiny.defaults("flux"), "height": 64, "width": 96, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(tiny.path("flux"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make(pipe: Any, folder: Path, **options: Any) -> Counts:
    return make_pictures(pipe, PROMPTS, folder, **{"seed": 7, "call": CALL, **options})


def said(folder: Path) -> dict[str, Any]:
    """What the third picture's file says, without model and call."""
    return {name: value for name, value in whole(folder).items() if name not in ("model", "call")}


def whole(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "000002.json").read_text())  # type: ignore[no-any-return]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_pictures_come_with_prompt_and_seed(pipe, tmp_path):
    assert make(pipe, tmp_path / "new") == Counts(done=3)
    assert sorted(times(tmp_path / "new")) == [f"00000{i}.{ending}" for i in range(3) for ending in ("json", "png")]
    assert said(tmp_path / "new") == {"prompt": PROMPTS[2], "seed": 9}
    assert [found.caption for found in find_pictures(tmp_path / "new")] == PROMPTS
    alone = pipe(PROMPTS[2], generator=torch.Generator().manual_seed(9), **CALL).images[0]
    assert np.array_equal(pixels(tmp_path / "new/000002.png"), np.asarray(alone))
    assert alone.size == (96, 64)


def test_a_picture_does_not_depend_on_its_batch(pipe, tmp_path):
    make(pipe, tmp_path / "single")
    assert make(pipe, tmp_path / "batched", batch_size=2) == Counts(done=3)
    for index in range(3):
        one, other = (pixels(tmp_path / name / f"00000{index}.png") for name in ("single", "batched"))
        assert abs(one - other).max() <= 2  # sums in another order
    assert abs(one - pixels(tmp_path / "single/000000.png")).max() > 50


@pytest.mark.parametrize("lost", ["000001.png", "000001.json"])
def test_only_what_is_missing_is_drawn(lost, pipe, tmp_path):
    make(pipe, tmp_path)
    before = times(tmp_path)
    (tmp_path / lost).unlink()
    assert make(pipe, tmp_path, batch_size=2) == Counts(done=1, skipped=2)
    after = times(tmp_path)
    assert before.keys() == after.keys()
    assert {name for name in after if after[name] != before[name]} == {"000001.png", "000001.json"}


def test_a_stopped_run_leaves_whole_pictures_only(tmp_path):
    class Broken:
        width, height = size = (96, 64)

        def save(self, path: Path) -> None:
            path.write_bytes(b"half")
            raise OSError("disk full")

    class Teacher:
        def __call__(self, prompt: list[str], **call: Any) -> Any:
            self.images = [Image.new("RGB", (96, 64)), Broken()]
            return self

    with pytest.raises(OSError, match="disk full"):
        make(Teacher(), tmp_path, batch_size=2)
    assert sorted(times(tmp_path)) == ["000000.json", "000000.png"]


def test_a_size_that_an_unknown_pipeline_rounds_is_not_kept(tmp_path):
    class Teacher:
        def __call__(self, prompt: list[str], **call: Any) -> Any:
            self.images = [Image.new("RGB", (88, 64))]
            return self

    with pytest.raises(ValueError, match="expected images of height 64 and width 96, the pipeline draws 64 and 88"):
        make(Teacher(), tmp_path)
    assert not any(tmp_path.iterdir())


def test_two_processes_cover_everything_once(pipe, tmp_path):
    assert make(pipe, tmp_path, rank=0, world=2) == Counts(done=2)
    first = times(tmp_path)
    assert make(pipe, tmp_path, rank=1, world=2) == Counts(done=1)
    assert len(first) == 4 and len(times(tmp_path)) == 6 and first.items() <= times(tmp_path).items()


@pytest.mark.parametrize(
    ("options", "said"),
    [({"seed": 8}, "'seed': 8.*got.*'seed': 7"), ({"prompts": PROMPTS[::-1]}, "yellow.*got.*red.*another folder")],
)
def test_pictures_of_other_prompts_or_seeds_are_refused(options, said, pipe, tmp_path):
    make_pictures(pipe, PROMPTS[:1], tmp_path, seed=7, call=CALL)
    before = times(tmp_path)
    with pytest.raises(ValueError, match=said):
        make_pictures(pipe, **{"prompts": PROMPTS, "folder": tmp_path, "seed": 7, "call": CALL, **options})
    assert times(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 128}, "'height': 128.*got.*'height': 64"),
        ({"num_inference_steps": 3}, "'num_inference_steps': 3.*got"),
    ],
)
def test_pictures_of_another_size_or_call_are_refused(change, message, pipe, tmp_path):
    make(pipe, tmp_path)
    before = times(tmp_path)
    with pytest.raises(ValueError, match=message):
        make(pipe, tmp_path, call={**CALL, **change})
    assert times(tmp_path) == before
    assert make(pipe, tmp_path) == Counts(skipped=3)


@pytest.mark.parametrize(("change", "message"), [({"height": 7}, "height=7; round it"), ({"width": 66}, "width=66")])
def test_a_size_that_the_pipeline_would_round_is_refused(change, message, pipe, tmp_path):
    with pytest.raises(ValueError, match=f"multiples of 8 pixels, got {message}"):
        make(pipe, tmp_path / "new", call={**CALL, **change})
    assert not (tmp_path / "new").exists()


def test_an_output_that_is_a_file_is_refused_before_anything_is_drawn(tmp_path):
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="expected a folder for the output; .*file is a file"):
            make(None, output)


def test_pictures_of_another_model_are_refused(pipe, tmp_path):
    make(pipe, tmp_path)
    other = FluxPipeline.from_pretrained(tiny.path("flux"))
    with torch.no_grad():
        other.transformer.proj_out.weight.mul_(1.5)
    with pytest.raises(ValueError, match="expected .*000000.png to be of .*'model'.*use another folder"):
        make(other, tmp_path)


def test_what_an_earlier_release_made_is_kept_where_its_size_is_right(pipe, tmp_path):
    make(pipe, tmp_path)
    for index, prompt in enumerate(PROMPTS):
        (tmp_path / f"00000{index}.json").write_text(json.dumps({"prompt": prompt, "seed": 7 + index}))
    assert make(pipe, tmp_path) == Counts(skipped=3)
    with pytest.raises(ValueError, match=r"height and width \[64, 64\], got \[64, 96\]"):
        make(pipe, tmp_path, call={**CALL, "width": 64})


CLIP = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 12}


@pytest.fixture(scope="module")
def wan() -> Any:
    return text_pipelines.PIPELINES["Wan"]()


def film(pipe: Any, folder: Path, **options: Any) -> Counts:
    return make_pictures(pipe, PROMPTS, folder, **{"seed": 7, "call": CLIP, **options})


def test_clips_come_with_prompt_seed_and_rate(wan, tmp_path):
    assert film(wan, tmp_path, fps=Fraction(12)) == Counts(done=3)
    assert sorted(times(tmp_path)) == [f"00000{i}.{ending}" for i in range(3) for ending in ("json", "mp4")]
    assert whole(tmp_path)["fps"] == "12" and whole(tmp_path)["call"]["num_frames"] == 5
    assert [found.caption for found in find_clips(tmp_path)] == PROMPTS
    info = probe(tmp_path / "000002.mp4")
    assert (info.frames, info.rate, info.height, info.width) == (5, 12, 32, 48)
    alone = wan([PROMPTS[2]], generator=torch.Generator().manual_seed(9), output_type="np", **CLIP).frames[0]
    for number, frame in enumerate(read_frames(tmp_path / "000002.mp4")):
        errors = [np.abs(frame - 255 * wanted).mean() for wanted in alone]
        assert np.argmin(errors) == number  # they are not equal: noise loses much as H.264


def test_clips_are_kept_where_their_call_is_the_same(wan, tmp_path):
    film(wan, tmp_path)
    before = times(tmp_path)
    (tmp_path / "000001.mp4").unlink()
    assert film(wan, tmp_path) == Counts(done=1, skipped=2)
    after = times(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {"000001.mp4", "000001.json"}
    for options, said in (
        ({"call": {**CLIP, "num_frames": 9}}, "'num_frames': 9.*got.*'num_frames': 5"),
        ({"fps": 8}, "'fps': '8'.*got.*'fps': '16'"),
        ({"call": {**CLIP, "num_frames": 1}}, "'num_frames': 1.*got.*'num_frames': 5"),
    ):
        with pytest.raises(ValueError, match=f"expected .*00000.* to be of .*{said}"):
            film(wan, tmp_path, **options)
    assert times(tmp_path) == after


def test_a_video_model_draws_an_image_where_no_frames_are_asked_for(wan, tmp_path):
    assert film(wan, tmp_path, call={**CLIP, "num_frames": 1}) == Counts(done=3)
    assert sorted(times(tmp_path)) == [f"00000{i}.{ending}" for i in range(3) for ending in ("json", "png")]


def test_frames_that_cannot_be_drawn_are_refused_before_anything_is(pipe, wan, tmp_path):
    with pytest.raises(ValueError, match=r"clips of 4 n \+ 1 frames.* got 6; ask for 5 or 9"):
        film(wan, tmp_path, call={**CLIP, "num_frames": 6})
    with pytest.raises(ValueError, match="frames a second above 0, got fps=0"):
        film(wan, tmp_path, fps=0)
    with pytest.raises(ValueError, match="FluxPipeline draws images, got num_frames=5; leave it out"):
        make(pipe, tmp_path, call={**CALL, "num_frames": 5})
    assert not any(tmp_path.iterdir())


def test_clips_that_a_pipeline_rounds_are_not_kept(tmp_path):
    class Teacher:
        def __call__(self, prompt: list[str], num_frames: int, **call: Any) -> Any:
            self.frames = [[Image.new("RGB", (48, 32))] * (num_frames - 1)]
            return self

    with pytest.raises(ValueError, match="expected clips of 5 frames, the pipeline draws 4: ask for so many"):
        film(Teacher(), tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("prompts", "batch_size"), [([], 1), ("a red circle", 1), (PROMPTS, 0)])
def test_wrong_arguments_are_refused(prompts, batch_size, tmp_path):
    with pytest.raises(ValueError, match="expected a"):
        make_pictures(None, prompts, tmp_path, batch_size=batch_size)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prompts.txt", "one\r\n\n  two \n"),
        ("prompts.txt", "\ufeffone\ntwo"),
        ("prompts.json", '["one", "two", ""]'),
    ],
)
def test_prompts_are_read(name, content, tmp_path):
    (tmp_path / name).write_bytes(content.encode())
    assert read_prompts(tmp_path / name) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.txt", "\n \n"), ("p.json", "[]"), ("p.json", '{"prompt": "one"}'), ("p.json", "[1]"), ("p.json", "one")],
)
def test_files_without_prompts_are_refused(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}"):
        read_prompts(tmp_path / name)
    with pytest.raises(ValueError, match="nowhere"):
        read_prompts(tmp_path / "nowhere.txt")
