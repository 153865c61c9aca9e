"""What the page finds in the named folders, and what it leaves alone."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffattn.media.video import VideoWriter
from diffattn.web import found
from diffattn.web.found import Folders, frames_of, sheets


def image(path: Path, size: tuple[int, int] = (8, 6), colour: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 0, 0)).save(path)
    return path


def text(path: Path, words: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(words)
    return path


def test_comparisons_runs_and_clips_are_found_by_names_of_the_folders(tmp_path: Path) -> None:
    text(tmp_path / "out" / "one" / "compare.json")
    text(tmp_path / "out" / "one" / "runs" / "comparison.json")
    text(tmp_path / "out" / "deep" / "er" / "log.csv")
    text(tmp_path / "out" / "a.mp4")
    text(tmp_path / "out" / "b.GIF")
    image(tmp_path / "out" / "clip" / "frame-0000.png")
    image(tmp_path / "out" / "images" / "lake.png")
    text(tmp_path / "other" / "log.csv")
    folders = Folders([tmp_path / "out"])
    assert folders.comparisons() == {"out/one": tmp_path / "out" / "one"}
    assert folders.runs() == {"out/deep/er": tmp_path / "out" / "deep" / "er"}
    assert list(folders.clips()) == ["out/a.mp4", "out/b.GIF", "out/clip"]


def test_what_is_hidden_or_leads_out_is_left_alone(tmp_path: Path) -> None:
    secret = text(tmp_path / "secret" / "log.csv").parent
    text(tmp_path / "secret" / "a.mp4")
    inside = tmp_path / "out"
    text(inside / ".hidden" / "log.csv")
    text(inside / ".a.mp4")
    (inside / "b.mp4").symlink_to(secret / "a.mp4")
    (inside / "link").symlink_to(secret)
    (inside / "run").mkdir()
    (inside / "run" / "log.csv").symlink_to(secret / "log.csv")
    folders = Folders([inside])
    assert folders.runs() == folders.clips() == {}


def test_sheets_come_in_the_order_of_their_steps_and_from_the_run_alone(tmp_path: Path) -> None:
    for step in (20, 100, 3):
        image(tmp_path / "run" / "sheets" / f"step-{step:06d}.png")
    image(tmp_path / "run" / "sheet.png")
    (tmp_path / "run" / "sheets" / "step-000500.png").symlink_to(image(tmp_path / "else.png"))
    assert list(sheets(tmp_path / "run")) == ["step-000003", "step-000020", "step-000100", "sheet"]
    assert sheets(tmp_path) == {}


def test_a_clip_is_read_whole(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with VideoWriter(tmp_path / "a.mp4", 5) as video:
        for level in range(0, 200, 40):
            video.write(np.full((32, 48, 3), level, np.uint8))
    clip = frames_of(tmp_path / "a.mp4")
    assert (len(clip.images), clip.images[0].size, clip.rate, clip.told) == (5, (48, 32), 5.0, "")
    assert abs(int(np.asarray(clip.images[3])[0, 0, 0]) - 120) < 4


def test_long_and_large_clips_are_thinned_out_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found, "MOST_FRAMES", 4)
    monkeypatch.setattr(found, "MOST_SIDE", 10)
    for number in range(11):
        image(tmp_path / f"frame-{number:04d}.png", (40, 20), number)
    clip = frames_of(tmp_path)
    assert [np.asarray(frame)[0, 0, 0] for frame in clip.images] == [0, 4, 8]
    assert clip.images[0].size == (10, 5)
    assert clip.rate == 25 / 4
    assert clip.told == "every 4th frame is shown; 40 x 20 pixels are shown smaller"


def test_what_is_no_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="video"):
        frames_of(text(tmp_path / "a.mp4", "no video"))
