"""Clips: frames of a file or of a folder, in part, with their rate, and what does not fit."""

import logging
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("av", reason="needs PyAV, the extra `video`")

from diffattn.media.clip import Clip, digest, read_opaque
from diffattn.media.video import VideoWriter

FRAMES = [
    np.full((32, 48, 3), 40 * number, np.uint8) + np.arange(48, dtype=np.uint8)[:, None] % 7 for number in range(5)
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of three frames at 10 a second."""
    folder = tmp_path_factory.mktemp("clips")
    with VideoWriter(folder / "clip.mp4", 10) as video:
        for frame in FRAMES[:3]:
            video.write(frame)
    return folder


def write_folder(folder: Path, count: int) -> Path:
    """Frames as files, in an order that is not the alphabet's."""
    folder.mkdir()
    for number in range(count):
        Image.fromarray(FRAMES[number]).save(folder / f"{number + 8}.png")
    return folder


def test_frames_of_a_folder_in_their_order(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "frames", 5)
    clip = Clip(path=folder, start=1, count=2, skip=1, fps=Fraction(30))
    expected = FRAMES
    assert np.array_equal(list(clip.frames()), [expected[1], expected[3]])
    assert (clip.rate, clip.begin, clip.sound) == (15, pytest.approx(1 / 30), None)
    assert Clip(path=folder).rate == 25
    before = clip.digest()
    Image.new("RGB", (48, 32)).save(folder / "9.png")
    assert clip.digest() != before


def test_frames_of_a_file(clips: Path) -> None:
    clip = Clip(path=clips / "clip.mp4", start=1, skip=1)
    (frame,) = clip.frames()
    assert np.abs(frame.astype(int) - FRAMES[1]).mean() < 8
    assert (clip.rate, clip.begin, clip.sound) == (5, pytest.approx(0.1), clips / "clip.mp4")
    assert clip.digest() == digest(clips / "clip.mp4")


def test_pixels_that_are_not_square(clips: Path, tmp_path: Path) -> None:
    """Left as stored, with their aspect, or widened; a folder has none."""
    with VideoWriter(tmp_path / "wide.mp4", 10, aspect=Fraction(64, 45)) as video:
        video.write(FRAMES[1])
    stored, square = Clip(path=tmp_path / "wide.mp4"), Clip(path=tmp_path / "wide.mp4", square=True)
    assert (stored.aspect, square.aspect) == (Fraction(64, 45), 1)
    (first,), (second,) = stored.frames(), square.frames()
    assert first.shape == (32, 48, 3) and second.shape == (32, 68, 3)
    assert second.mean() == pytest.approx(first.mean(), abs=0.5)
    for path in (clips / "clip.mp4", write_folder(tmp_path / "frames", 1)):
        assert Clip(path=path).aspect == 1 and next(Clip(path=path, square=True).frames()).shape == (32, 48, 3)


def test_frames_that_do_not_fit_are_refused(clips: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "frames", 2)
    with pytest.raises(ValueError, match="expected a frame from --start 2 on in .*frames; got none"):
        next(Clip(path=folder, start=2).frames())
    with pytest.raises(ValueError, match="expected a frame from --start 7 on in .*clip.mp4; got none"):
        next(Clip(path=clips / "clip.mp4", start=7).frames())
    Image.new("RGB", (7, 5)).save(folder / "10.png")
    with pytest.raises(ValueError, match=r"expected frames of one size in .*; got \(5, 7\) for number 2"):
        list(Clip(path=folder).frames())
    with pytest.raises(ValueError, match="--fps is for a folder of frames"):
        Clip(path=clips / "clip.mp4", fps=Fraction(25))
    with pytest.raises(ValueError, match="expected --fps above 0; got 0"):
        Clip(path=folder, fps=Fraction(0))
    with pytest.raises(FileNotFoundError):
        Clip(path=tmp_path / "none.mp4")


def test_transparent_pixels_show_white(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixels = np.array([[(10, 20, 30, 0), (10, 20, 30, 255), (0, 100, 200, 128)]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[:, 1:2]).save(tmp_path / "b.png")
    with caplog.at_level(logging.WARNING, logger="diffattn"):
        assert read_opaque(tmp_path / "b.png").tolist() == [[[10, 20, 30]]] and not caplog.messages
        assert read_opaque(tmp_path / "a.png").tolist() == [[[255, 255, 255], [10, 20, 30], [127, 177, 227]]]
    assert caplog.messages == [f"{tmp_path / 'a.png'}: transparent in places; put on white"]
