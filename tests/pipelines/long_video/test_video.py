"""Video files in parts, joined without encoding anew, and folders of images."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from diffattn.pipelines.long_video.video import check_output, join_parts, write_part, write_pictures
from PIL import Image

LENGTHS = (5, 1, 8)


def frames(count: int = sum(LENGTHS)) -> list[np.ndarray]:
    """A grey that goes up by the number of the frame, with a white square that moves."""
    made = []
    for number in range(count):
        frame = np.full((32, 48, 3), 12 * number, dtype=np.uint8)
        frame[8:16, 2 * number : 2 * number + 8] = 255
        made.append(frame)
    return made


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("fps", [8, 24])
def test_joined_parts_are_one_playable_video(tmp_path: Path, ending: str, fps: int) -> None:
    import av

    want, parts, first = frames(), [], 0
    for number, length in enumerate(LENGTHS):
        parts.append(tmp_path / f"part-{number}.mp4")
        write_part(want[first : first + length], parts[-1], fps)
        first += length
    join_parts(parts, LENGTHS, tmp_path / f"out{ending}", fps)
    with av.open(str(tmp_path / f"out{ending}")) as container:
        stream = container.streams.video[0]
        got = list(container.decode(stream))
        assert (stream.width, stream.height) == (48, 32)
        assert abs(stream.average_rate - Fraction(fps)) < 0.01
    assert len(got) == len(want)
    times = [float(frame.pts * frame.time_base) for frame in got]
    np.testing.assert_allclose(times, np.arange(len(want)) / fps, atol=2e-3)
    for frame, wanted in zip(got, want, strict=True):
        assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - wanted).mean() < 6
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*(p.name for p in parts), f"out{ending}"])


def test_a_video_has_the_colours_of_the_pictures(tmp_path: Path) -> None:
    """In high definition too, where files that name no colours are taken for BT.709; and the same in every run."""
    import av

    from diffattn.media.video import read_frames

    blocks = np.random.default_rng(0).integers(20, 236, (3, 4, 3))
    want = np.kron(blocks, np.ones((240, 32, 1), int)).astype(np.uint8)
    found = set()
    for _ in range(2):
        parts = [tmp_path / "part-0.mp4", tmp_path / "part-1.mp4"]
        for part in parts:
            write_part([want, want], part, 8)
        join_parts(parts, (2, 2), tmp_path / "out.mp4", 8)
        found.add((tmp_path / "out.mp4").read_bytes())
    assert len(found) == 1
    got = list(read_frames(tmp_path / "out.mp4"))
    assert len(got) == 4
    for frame in got:
        assert np.abs(frame[120::240, 16::32].astype(int) - blocks).max() <= 3
    with av.open(str(tmp_path / "out.mp4")) as container:
        raw = next(container.decode(video=0))
    assert (raw.colorspace, raw.color_primaries, raw.color_trc, raw.color_range) == (1, 1, 1, 1)


def test_pictures_are_numbered_in_the_whole_video(tmp_path: Path) -> None:
    write_pictures(frames(2), tmp_path / "frames", 7)
    names = sorted(file.name for file in (tmp_path / "frames").iterdir())
    assert names == ["frame-000007.png", "frame-000008.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "frames" / names[1])), frames(2)[1])


def test_a_part_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> object:
        yield frames(1)[0]
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_part(broken(), tmp_path / "part.mp4", 8)
    assert not list(tmp_path.iterdir())


def test_outputs_that_can_not_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    for output, size, message in (
        (tmp_path / "out.gif", 16, "expected a file name that ends in .mp4"),
        (tmp_path / "folder.mp4", 16, "is a folder"),
        (tmp_path / "file", 16, "expected a folder for --output; got .*, which is a file"),
        (tmp_path / "file" / "out.mp4", 16, "expected a folder to write to"),
        (tmp_path / "out.mp4", 15, "needs even sides"),
    ):
        with pytest.raises(ValueError, match=message):
            check_output(output, size, 16)
    with pytest.raises(ValueError, match="at most 16384 pixels a side"):
        check_output(tmp_path / "out.mp4", 16, 16386)
    check_output(tmp_path / "new" / "out.mp4", 16, 16)
    assert not (tmp_path / "new").exists()
