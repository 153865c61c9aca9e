"""Clips with captions: which frames of a video, from which files, and what is said of what can't be used."""

import io
import tarfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from diffattn.distill.data.clips import Cut, clips_in, digest_of, find_clips, load_clip
from diffattn.distill.data.pictures import CLIP_ENDINGS, Counts, find_pictures, unpack_shards
from PIL import Image
from torch import Tensor
from video_files import encode, number_of, picture

SIZE = (48, 64)
FOUR = Cut(frames=4)


def video(path: Path, count: int, **options: Any) -> Path:
    """Numbered frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return encode(path, [picture(number) for number in range(count)], **options)


def frames_in(folder: Path, count: int) -> Path:
    """Numbered frames as images whose names have no leading zeros."""
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(picture(number)).save(folder / f"{number}.png")
    return folder


def gif(path: Path, count: int) -> Path:
    images = [Image.fromarray(picture(number)) for number in range(count)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=40)
    return path


def numbers(clip: Tensor) -> list[int]:
    pixels = clip.permute(1, 2, 3, 0).add(1).mul(127.5).round().byte().numpy()
    return [number_of(frame) for frame in pixels]


@pytest.mark.parametrize(
    ("cut", "wanted"),
    [
        (FOUR, [0, 1, 2, 3]),
        (Cut(frames=4, stride=3), [0, 3, 6, 9]),
        (Cut(frames=4, fps=Fraction(8)), [0, 3, 6, 9]),
        (Cut(frames=5, fps=Fraction(10)), [0, 2, 4, 7, 9]),
        (Cut(frames=4, fps=Fraction("23.976")), [0, 1, 2, 3]),
        (Cut(frames=4, fps=Fraction("24.1")), [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_frames_are_taken_by_stride_or_rate(cut: Cut, wanted: list[int], tmp_path: Path) -> None:
    clip = load_clip(video(tmp_path / "a.mp4", 11, rate=24), SIZE, cut)
    assert clip.shape == (3, cut.frames, *SIZE) and clip.dtype == torch.float32
    assert -1 <= clip.min() < clip.max() <= 1
    assert numbers(clip) == wanted


def test_files_gifs_and_folders_are_clips(tmp_path: Path) -> None:
    clips = [video(tmp_path / "a.mp4", 11), gif(tmp_path / "b.gif", 11), frames_in(tmp_path / "c", 11)]
    for path in clips:
        assert numbers(load_clip(path, SIZE, Cut(frames=3, stride=5))) == [0, 5, 10]
        assert numbers(load_clip(path, SIZE, Cut(frames=3, fps=Fraction(10)))) == [0, 2, 5]


def test_frames_cover_the_size_and_their_pixels_become_square(tmp_path: Path) -> None:
    """A frame of 48 x 64 pixels, each twice as wide as high, is 48 x 128: its middle half is what is left.

    So the bars, of at most a quarter of the width, are gone.
    """
    wide = encode(tmp_path / "a.mp4", [picture(4) for _ in range(9)], aspect=Fraction(2))
    for cut in (FOUR, Cut(frames=4, fps=Fraction(10))):
        assert numbers(load_clip(wide, SIZE, cut)) == [0, 0, 0, 0]
    tall = encode(tmp_path / "b.mp4", [picture(8, 96, 64) for _ in range(4)])
    assert load_clip(tall, SIZE, FOUR)[:, 0, 0].max() > 0.2, "nor is the upper quarter of a portrait in it"


def short(path: Path) -> str:
    video(path, 3)
    return "is too short: it has 3 of 4 frames"


def cut_off(path: Path) -> str:
    video(path, 40, kind="mpeg4")
    path.write_bytes(path.read_bytes()[:-400])
    return "is not a whole clip"


def no_video(path: Path) -> str:
    path.write_bytes(b"none")
    return r"is not a whole clip \(expected a video"


def empty(path: Path) -> str:
    path.write_bytes(b"")
    return "is not a whole clip"


def gone(path: Path) -> str:
    return "is not a whole clip"


@pytest.mark.parametrize("damage", [short, cut_off, no_video, empty, gone])
def test_what_cannot_be_read_is_named(damage: Any, tmp_path: Path) -> None:
    said = damage(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=f"a.mp4 .*{said}.*; replace or remove it") as error:
        load_clip(tmp_path / "a.mp4", SIZE, FOUR)
    assert "\n" not in str(error.value)


def test_a_video_that_is_slower_than_asked_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 25 frames a second, expected 30 or more"):
        load_clip(video(tmp_path / "a.mp4", 8), SIZE, Cut(frames=4, fps=Fraction(30)))


def test_frames_of_two_sizes_and_broken_ones_are_named(tmp_path: Path) -> None:
    folder = frames_in(tmp_path / "a", 5)
    (folder / "2.png").write_bytes(b"none")
    with pytest.raises(ValueError, match="a is not a whole clip .*2.png"):
        load_clip(folder, SIZE, FOUR)
    Image.new("RGB", (8, 8)).save(folder / "2.png")
    with pytest.raises(ValueError, match="frames of one size"):
        load_clip(folder, SIZE, FOUR)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"frames": 1}, "frames must be 2 or more, an image is a clip of one: leave it out, got 1"),
        ({"frames": 0}, "frames must be 2 or more"),
        ({"frames": 4, "stride": 0}, "stride must be an int of at least 1"),
        ({"frames": 4, "fps": Fraction(0)}, "fps must be a positive int or Fraction"),
        ({"frames": 4, "fps": 23.976}, "fps must be a positive int or Fraction.*, got 23.976"),
        ({"frames": 4, "stride": 2, "fps": Fraction(8)}, "a stride or a rate .*got stride=2 and fps=8; drop one"),
    ],
)
def test_wrong_cuts_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Cut(**options)


@pytest.mark.parametrize("cut", [FOUR, Cut(frames=9, stride=2), Cut(frames=9, fps=Fraction(24000, 1001))])
def test_a_cut_goes_through_the_facts(cut: Cut) -> None:
    assert Cut.of(cut.facts) == cut
    assert Cut.of({"frames": 1}) is None and Cut.of({}) is None


def test_names_tell_clips_from_images() -> None:
    files = ["a.mp4", "a.png", "b/1.png", "b/2.png", "b.txt", "c/1.png", "c/1.txt", "d/e.GIF", "d/e.jpg", "f/g.v2.mov"]
    assert clips_in(files) == {"a": "a.mp4", "b": "b", "d/e": "d/e.GIF", "f/g.v2": "f/g.v2.mov"}
    for pair in (["a.mp4", "a.mov"], ["a.mp4", "a/1.png"]):
        with pytest.raises(ValueError, match="would share one caption and one cache; rename one of them"):
            clips_in(pair)


def test_captions_lie_beside_clips(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    video(tmp_path / "a.mp4", 2)
    frames_in(tmp_path / "deep/b", 2)
    frames_in(tmp_path / "deep/c", 2)
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "deep/b.json").write_text('{"prompt": "two"}')
    (tmp_path / "deep/metadata.jsonl").write_text('{"file_name": "c", "text": "three"}')
    found = find_clips(tmp_path)
    assert [(one.name, one.path, one.caption) for one in found] == [
        ("a", tmp_path / "a.mp4", "one"),
        ("deep/b", tmp_path / "deep/b", "two"),
        ("deep/c", tmp_path / "deep/c", "three"),
    ]
    assert not caplog.text
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"a caption for every clip .* none for 1 \(a.mp4\)"):
        find_clips(tmp_path)


def test_images_are_left_out_of_clips_and_videos_of_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames_in(tmp_path / "c", 1)
    for name in ("a", "b", "c/0"):
        (tmp_path / f"{name}.txt").write_text("one")
    video(tmp_path / "a.mp4", 2)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    assert [one.name for one in find_clips(tmp_path)] == ["a"]
    assert "images are left out of a cache of clips: 2 (b.png, c/0.png)" in caplog.text
    assert [one.name for one in find_pictures(tmp_path)] == ["b", "c/0"]
    assert "videos are left out where no number of frames is given: 1 (a.mp4)" in caplog.text
    caplog.clear()
    find_clips(tmp_path, told=False)
    find_pictures(tmp_path, told=False)
    assert not caplog.text


def test_folders_of_the_other_kind_say_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected videos .*got none"):
        find_clips(tmp_path)
    video(tmp_path / "a/b.mp4", 2)
    with pytest.raises(ValueError, match="expected images .*got 1 videos only; say how many frames a clip has"):
        find_pictures(tmp_path / "a")
    frames_in(tmp_path / "c/d", 3)
    for folder in (tmp_path / "c/d",):
        with pytest.raises(ValueError, match="got 3 images only; leave the number of frames out to cache these"):
            find_clips(folder)


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    folder, path = frames_in(tmp_path / "a", 3), video(tmp_path / "b.mp4", 3)
    before = digest_of(folder), digest_of(path)
    assert (digest_of(folder), digest_of(path)) == before
    Image.fromarray(picture(9)).save(folder / "1.png")
    path.write_bytes(path.read_bytes() + b"x")
    assert digest_of(folder) != before[0] and digest_of(path) != before[1]


def test_videos_are_unpacked_from_shards(tmp_path: Path) -> None:
    data = video(tmp_path / "a.mp4", 5).read_bytes()
    image = io.BytesIO()
    Image.new("RGB", (8, 6)).save(image, "PNG")
    with tarfile.open(tmp_path / "data.tar", "w") as shard:
        for name, content in (("0.mp4", data), ("0.png", image.getvalue()), ("0.json", b'{"prompt": "one"}')):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    out = tmp_path / "out"
    assert unpack_shards([tmp_path / "data.tar"], out, endings=CLIP_ENDINGS) == Counts(done=1)
    assert sorted(path.name for path in (out / "data").iterdir()) == ["0.json", "0.mp4"]
    [found] = find_clips(out)
    assert (found.name, found.caption) == ("data/0", "one") and numbers(load_clip(found.path, SIZE, FOUR)) == [
        0, 1, 2, 3,
    ]  # fmt: skip
    assert unpack_shards([tmp_path / "data.tar"], out, endings=CLIP_ENDINGS) == Counts(skipped=1)
    with tarfile.open(tmp_path / "images.tar", "w") as shard:
        for name, content in (("0.png", image.getvalue()), ("0.txt", b"one")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match="expected a video and a caption .* for images/0, got png, txt only"):
        unpack_shards([tmp_path / "images.tar"], out, endings=CLIP_ENDINGS)
