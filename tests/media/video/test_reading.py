"""Video files: what they hold, their frames, and new ones with sound. The files are made here, bar one real clip."""

import logging
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffattn.media.video import VideoInfo, VideoWriter, colours, probe, read_frames, timing

av = pytest.importorskip("av", reason="needs PyAV, the extra `video`")

CLIP = Path(__file__).parents[2] / "data" / "carphone.mp4"
COLOURS = np.array([(220, 30, 40), (40, 200, 90), (30, 60, 210), (235, 235, 235)], dtype=np.uint8)


def picture(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Four quarters in colours of their own, and the frame's number as a bar from the left."""
    rows, columns = np.indices((height, width))
    frame = COLOURS[2 * (rows >= height // 2) + (columns >= width // 2)]
    frame[: height // 4, : 4 * number] = 10
    return frame


def number_of(frame: np.ndarray) -> int:
    """What `picture` was asked for."""
    return int((frame[2].max(-1) < 90).sum() + 2) // 4


def write(path: Path, count: int, rate: Fraction | int = 25, **options: Any) -> Path:
    with VideoWriter(path, rate, **options) as video:
        for number in range(count):
            video.write(picture(number))
    return path


def encode(path: Path, ticks: list[int], rate: int = 25, kind: str = "libx264", **options: str) -> Path:
    """Frames at times of the test's choice, in units of 1 / rate."""
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(kind, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        for number, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def tone(path: Path, seconds: float, codec: str = "aac", video: bool = False) -> Path:
    """Sound whose pitch rises; with a video beside it on demand."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream(codec, rate=48000, layout="mono")
        pictures = container.add_stream("libx264", rate=25) if video else None
        if pictures is not None:
            pictures.height, pictures.width, pictures.pix_fmt = 48, 64, "yuv420p"
            for number in range(round(25 * seconds)):
                container.mux(pictures.encode(av.VideoFrame.from_ndarray(picture(number % 9), format="rgb24")))
            container.mux(pictures.encode())
        wave = np.sin(np.cumsum(np.linspace(0.02, 0.3, round(48000 * seconds)))) * 20000
        for start in range(0, len(wave), 1024):
            part = wave[None, start : start + 1024].astype(np.int16)
            frame = av.AudioFrame.from_ndarray(part, format="s16", layout="mono")
            frame.sample_rate, frame.pts = 48000, start
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    return path


def packets_of(path: Path) -> list[tuple[float, bytes]]:
    """Time and bytes of each packet of sound."""
    with av.open(str(path)) as container:
        packets = container.demux(container.streams.audio[0])
        return [(float(p.pts * p.time_base), bytes(p)) for p in packets if p.dts is not None]


@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv"])
def test_what_is_written_is_read_back(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"new/a.{ending}", 12, Fraction(30000, 1001))
    frames = list(read_frames(path))
    assert [number_of(frame) for frame in frames] == list(range(12))
    for number, frame in enumerate(frames):
        assert frame.dtype == np.uint8 and frame.flags.c_contiguous
        assert np.abs(frame.astype(int) - picture(number)).mean() < 4
    info = probe(path)
    assert (info.width, info.height, info.frames, info.rotation, info.audio) == (64, 48, 12, 0, False)
    assert info.rate == Fraction(30000, 1001) and info.duration == pytest.approx(12 * 1001 / 30000, abs=2e-3)
    assert [file.name for file in path.parent.iterdir()] == [f"a.{ending}"]


@pytest.mark.parametrize("height", [48, 736])
def test_colours_last_and_are_named(tmp_path: Path, height: int) -> None:
    with VideoWriter(tmp_path / "a.mp4", 25) as video:
        video.write(picture(0, height, 64))
    (frame,) = read_frames(tmp_path / "a.mp4")
    for row, column, colour in ((1, 1, 0), (1, 3, 1), (3, 1, 2), (3, 3, 3)):
        found = frame[row * height // 4 + 2, column * 16 - 4]
        assert np.abs(found.astype(int) - COLOURS[colour]).max() <= 3
    with av.open(str(tmp_path / "a.mp4")) as container:
        raw = next(container.decode(video=0))
    assert (raw.height, raw.colorspace, raw.color_primaries, raw.color_trc, raw.color_range) == (height, 1, 1, 1, 1)


@pytest.mark.parametrize(("height", "colours"), [(48, 5), (720, 1)])
def test_a_file_that_names_no_colours_is_taken_by_its_height(tmp_path: Path, height: int, colours: int) -> None:
    """BT.601 (5) below 720 rows and BT.709 (1) from there on."""
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = height, 64, "yuv420p"
        frame = av.VideoFrame.from_ndarray(picture(0, height), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=colours)
        frame.colorspace = 2
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert next(container.decode(video=0)).colorspace == 2
    (frame,) = read_frames(tmp_path / "a.mp4")
    assert np.abs(frame.astype(int) - picture(0, height)).max(-1)[height // 4 + 2, 60] <= 3


@pytest.mark.parametrize(("height", "width"), [(47, 64), (48, 33), (1, 1)])
def test_an_odd_side_repeats_its_last_pixels(tmp_path: Path, height: int, width: int) -> None:
    with VideoWriter(tmp_path / "a.mp4", 25) as video:
        video.write(picture(0, height, width))
    (frame,) = read_frames(tmp_path / "a.mp4")
    want = np.pad(picture(0, height, width), ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    assert frame.shape == want.shape
    assert np.abs(frame[-1, -1].astype(int) - want[-1, -1]).max() < 20


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        ({"start": 3}, [3, 4, 5, 6, 7, 8]),
        ({"count": 2}, [0, 1]),
        ({"start": 1, "count": 3, "skip": 2}, [1, 4, 7]),
        ({"skip": 3}, [0, 4, 8]),
        ({"start": 7, "count": 9}, [7, 8]),
        ({"start": 99}, []),
    ],
)
def test_a_range_of_frames(tmp_path: Path, arguments: dict[str, int], want: list[int]) -> None:
    assert [number_of(frame) for frame in read_frames(write(tmp_path / "a.mp4", 9), **arguments)] == want


def test_frames_come_as_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than the frames asked for become RGB, so memory does not grow with the video."""
    made, convert = [], colours.Shown._to_rgb
    monkeypatch.setattr(colours.Shown, "_to_rgb", lambda self, frame: made.append(frame.pts) or convert(self, frame))
    frames = read_frames(CLIP)
    assert not made
    assert len(list(islice(frames, 3))) == 3 and len(made) == 3


def turn(path: Path, *matrix: int) -> Path:
    """Put a display matrix (a, b, c, d: x' = a x + c y, y' = b x + d y, y down) into the track header of an MP4."""
    data = bytearray(path.read_bytes())
    place = data.find(b"tkhd") + 44
    a, b, c, d = (entry << 16 for entry in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("matrix", "clockwise"), [((1, 0, 0, 1), 0), ((0, 1, -1, 0), 1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 3)]
)
def test_frames_are_turned_as_the_file_says(tmp_path: Path, matrix: tuple[int, ...], clockwise: int) -> None:
    path = turn(write(tmp_path / "a.mp4", 2), *matrix)
    want, info = np.rot90(picture(1), -clockwise), probe(path)
    frame = list(read_frames(path))[1]
    assert frame.shape == want.shape == (info.height, info.width, 3)
    assert np.abs(frame.astype(int) - want).mean() < 4
    assert info.rotation == -90 * clockwise % 360


def test_uneven_frames_are_shown_at_their_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At 25 per second: the second frame lasts for three ticks."""
    path = encode(tmp_path / "a.mp4", [0, 1, 4, 5, 6, 7, 8, 9], bf="0")
    with caplog.at_level(logging.WARNING, "diffattn"):
        numbers = [number_of(frame) for frame in read_frames(path)]
    assert numbers == [0, 1, 1, 1, 2, 3, 4, 5, 6, 7] and probe(path).frames == 10
    assert [record.message.count("not evenly spaced") for record in caplog.records] == [1]


def test_two_frames_at_one_tick_are_both_shown() -> None:
    """The second a tick late; none waits for longer."""
    times = [Fraction(stamp, 1000) for stamp in (0, 40, 45, 80, 120, 200, 201, 202, 203)]
    assert list(timing.ticks(times, Fraction(25))) == [0, 1, 2, 3, 4, 5, 6, None, None]


def test_even_frames_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert probe(CLIP) == VideoInfo(
        width=176,
        height=144,
        frames=120,
        rate=Fraction(30000, 1001),
        duration=4.004,
        rotation=0,
        audio=False,
        aspect=Fraction(128, 117),
    )
    assert sum(1 for _ in read_frames(CLIP)) == 120 and not caplog.records


def spoil(path: Path, frame: int) -> Path:
    """Overwrite the inside of a frame's packet; frames without reordering."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = next(islice(container.demux(video=0), frame, None))
        place, size = packet.pos, packet.size
    data[place + 5 : place + size] = bytes(size - 5)
    path.write_bytes(data)
    return path


def test_a_broken_frame_is_named(tmp_path: Path) -> None:
    path = spoil(encode(tmp_path / "a.mp4", list(range(12)), g="5", bf="0", crf="1"), 6)
    frames = read_frames(path)
    seen = []
    with pytest.raises(ValueError, match=r"expected a whole video in .*a.mp4.*soon after frame 6:"):
        seen.extend(number_of(frame) for frame in frames)


def test_a_broken_frame_is_held_up_to_the_next_key_frame(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = spoil(encode(tmp_path / "a.mp4", list(range(12)), g="5", bf="0", crf="1"), 6)
    with caplog.at_level(logging.WARNING, "diffattn"):
        numbers = [number_of(frame) for frame in read_frames(path, on_error="hold")]
    assert numbers == [0, 1, 2, 3, 4, 5, 5, 5, 5, 5, 10, 11]
    assert "frame 6" in caplog.text


def test_a_broken_first_frame_cannot_be_held(tmp_path: Path) -> None:
    path = spoil(encode(tmp_path / "a.mp4", [0, 1, 2], bf="0", crf="1"), 0)
    with pytest.raises(ValueError, match="broken at or soon after frame 0"):
        list(read_frames(path, on_error="hold"))


def test_a_broken_end_is_held_to_the_end(tmp_path: Path) -> None:
    path = spoil(encode(tmp_path / "a.mp4", list(range(12)), bf="0", crf="1"), 6)
    assert [number_of(frame) for frame in read_frames(path, on_error="hold")] == [0, 1, 2, 3, 4, *[5] * 7]


def test_a_cut_off_file(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", list(range(12)), g="1", bf="0", crf="1")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(ValueError, match="expected a whole video"):
        list(read_frames(path))
    numbers = [number_of(frame) for frame in read_frames(path, on_error="hold")]
    assert len(numbers) == 12 and numbers[:4] == [0, 1, 2, 3] and 4 <= numbers[-1] < 11


def test_an_unknown_codec_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", 3)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    for function in (probe, read_frames):
        with pytest.raises(ValueError, match="a.mp4 of a codec that FFmpeg knows; got another; encode it anew"):
            function(path)


@pytest.mark.parametrize("function", [probe, read_frames])
def test_what_is_no_video_is_refused(tmp_path: Path, function: Callable[[Path], Any]) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video at all" * 40)
    (tmp_path / "empty.mp4").touch()
    for name in ("a.mp4", "empty.mp4"):
        with pytest.raises(ValueError, match="expected a video in .*cannot be opened"):
            function(tmp_path / name)
    with pytest.raises(ValueError, match="a file without images"):
        function(tone(tmp_path / "a.m4a", 0.2))
    for name in ("missing.mp4", "."):
        with pytest.raises(FileNotFoundError, match="expected a video file"):
            function(tmp_path / name)


@pytest.mark.parametrize("arguments", [{"start": -1}, {"count": 0}, {"skip": -1}, {"on_error": "ignore"}])
def test_a_wrong_range_is_refused_at_once(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected (start|count|skip|on_error)"):
        read_frames(CLIP, **arguments)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_sound_is_copied_and_ends_with_the_frames(tmp_path: Path, ending: str) -> None:
    source = tone(tmp_path / "source.mp4", 1.0, video=True)
    path = write(tmp_path / f"a.{ending}", 10, audio_from=source)
    assert probe(path).audio and probe(path).frames == 10
    sound, whole = packets_of(path), packets_of(source)
    inside = [data for time, data in whole if 0 <= time < 0.4]
    assert [data for _, data in sound] == inside and len(inside) > 15
    assert 0.35 < sound[-1][0] < 0.4


def test_sound_from_the_middle(tmp_path: Path) -> None:
    source = tone(tmp_path / "source.mp4", 1.0, video=True)
    sound = packets_of(write(tmp_path / "a.mp4", 10, audio_from=source, audio_start=0.5))
    whole = packets_of(source)
    assert [data for _, data in sound] == [data for time, data in whole if 0.5 <= time < 0.9]
    first = next(time for time, data in whole if time >= 0.5)
    assert sound[0][0] == pytest.approx(first - 0.5, abs=1e-3)


def test_sound_lies_beside_the_frames(tmp_path: Path) -> None:
    """Written as the frames come, not in one piece at the end."""
    path = write(tmp_path / "a.mkv", 15, audio_from=tone(tmp_path / "s.m4a", 1.0))
    with av.open(str(path)) as container:
        kinds = "".join(packet.stream.type[0] for packet in container.demux() if packet.dts is not None)
    assert "v" in kinds.strip("a") and "va" in kinds and "av" in kinds and kinds.count("av") > 5


def test_a_source_without_sound_gives_none(tmp_path: Path) -> None:
    assert not probe(write(tmp_path / "a.mp4", 2, audio_from=CLIP)).audio


def test_sound_that_does_not_fit_is_refused_before_any_frame(tmp_path: Path) -> None:
    source = tone(tmp_path / "s.wav", 0.1, "pcm_u8")
    with pytest.raises(ValueError, match="expected sound that .mp4 files hold; got pcm_u8"):
        VideoWriter(tmp_path / "a.mp4", 25, audio_from=source).__enter__()
    with pytest.raises(ValueError, match="expected sound in .*none.wav"):
        VideoWriter(tmp_path / "a.mp4", 25, audio_from=tmp_path / "none.wav").__enter__()
    assert [file.name for file in tmp_path.iterdir()] == ["s.wav"]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_failed_block_leaves_what_was_there(tmp_path: Path, count: int) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"older")

    def frames() -> Iterator[np.ndarray]:
        yield from (picture(number) for number in range(count))
        raise KeyError("the model failed")

    with pytest.raises(KeyError, match="the model failed"), VideoWriter(path, 25) as video:
        for frame in frames():
            video.write(frame)
    assert path.read_bytes() == b"older" and len(list(tmp_path.iterdir())) == 1


def test_no_frame_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected frames for"), VideoWriter(tmp_path / "a.mp4", 25):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (picture(0, 48, 62), r"expected frames of \(48, 64\) as the first; got \(48, 62\)"),
        (picture(0).astype(np.float32), "expected a uint8 RGB frame"),
        (picture(0)[..., 0], "expected a uint8 RGB frame"),
        (picture(0)[:0], "expected a uint8 RGB frame"),
    ],
)
def test_a_wrong_frame_is_refused(tmp_path: Path, frame: np.ndarray, message: str) -> None:
    with VideoWriter(tmp_path / "a.mp4", 25) as video:
        video.write(picture(0))
        with pytest.raises(ValueError, match=message):
            video.write(frame)


def test_a_wrong_output_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ends in .mp4, .mov, .mkv"):
        VideoWriter(tmp_path / "a.avi", 25)
    (tmp_path / "dir.mp4").mkdir()
    with pytest.raises(ValueError, match="ends in .mp4, .mov, .mkv"):
        VideoWriter(tmp_path / "dir.mp4", 25)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="expected a folder to write to"):
        VideoWriter(tmp_path / "file" / "a.mp4", 25)
    for rate, start in ((0, 0.0), (-1, 0.0), (25, -0.1)):
        with pytest.raises(ValueError, match="expected rate > 0 and audio_start >= 0"):
            VideoWriter(tmp_path / "a.mp4", rate, audio_start=start)


def test_without_pyav_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    for call in (lambda: probe(CLIP), lambda: read_frames(CLIP), lambda: VideoWriter(tmp_path / "a.mp4", 25)):
        with pytest.raises(ImportError, match=r"pip install 'diffattn\[video\]'"):
            call()
