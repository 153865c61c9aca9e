"""Equal frames make equal files; captures that begin between key frames; the sound that is taken over."""

import hashlib
import logging
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("av", reason="needs PyAV, the extra `video`")

import av
from video_files import encode, noise, picture, silence

from diffattn.media.video import VideoWriter, probe, read_frames
from diffattn.media.video.timing import timing_of


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(path: Path, frames: np.ndarray, **options: Any) -> Path:
    with VideoWriter(path, 25, **options) as video:
        for frame in frames:
            video.write(frame)
    return path


@pytest.mark.parametrize("reordered", [True, False])
def test_equal_frames_make_equal_files(tmp_path: Path, reordered: bool) -> None:
    """Whatever the process computes in between."""
    frames, layer = noise(14, 54, 98), torch.nn.Conv2d(8, 8, 3)
    found = set()
    for number in range(20):
        layer(torch.randn(1, 8, 64 + number, 64))
        found.add(digest_of(write(tmp_path / "a.mp4", frames, reordered=reordered)))
    assert len(found) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the cores of a process can't be chosen here")
def test_the_number_of_cores_does_not_matter(tmp_path: Path) -> None:
    frames, cores = noise(14, 64, 98), os.sched_getaffinity(0)
    many = digest_of(write(tmp_path / "a.mp4", frames))
    os.sched_setaffinity(0, [min(cores)])
    try:
        assert digest_of(write(tmp_path / "a.mp4", frames)) == many
    finally:
        os.sched_setaffinity(0, cores)


def test_no_frame_leans_on_later_ones_where_files_are_to_be_joined(tmp_path: Path) -> None:
    for reordered in (True, False):
        path = write(tmp_path / "a.mp4", noise(9, 48, 64), reordered=reordered)
        with av.open(str(path)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
        assert (any(packet.pts != packet.dts for packet in packets)) == reordered


def test_a_side_that_h264_cannot_hold_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="at most 16384 pixels for H.264; got 2 x 16386; make it smaller"),
        VideoWriter(tmp_path / "a.mp4", 25) as video,
    ):
        video.write(np.zeros((2, 16386, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def capture(path: Path, kind: str = "libx264", **options: str) -> Path:
    """Transport stream of 60 frames with sound, whose first ninth is cut off: a key frame every 15, one lost."""
    whole = path.with_name("whole.ts")
    frames = noise(60, 48, 64)
    frames[:, :24] = 4 * np.arange(60, dtype=np.uint8)[:, None, None, None]
    encode(whole, frames, kind=kind, sound=2.4, **{"g": "15", **options})
    data = whole.read_bytes()
    path.write_bytes(data[len(data) // 188 // 9 * 188 :])
    return path


CODECS = pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("libx264", {}),
        ("libx264", {"x264-params": "open-gop=1"}),
        ("libx265", {"x265-params": "keyint=15:crf=4:open-gop=1:log-level=none"}),
        ("mpeg2video", {"b": "2000000", "bf": "2"}),
    ],
    ids=["h264", "h264-open", "hevc-open", "mpeg2"],
)


@CODECS
def test_a_capture_is_read_from_its_first_key_frame_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, options: dict[str, str]
) -> None:
    path = capture(tmp_path / "a.ts", kind, **options)
    with caplog.at_level(logging.WARNING, "diffattn"):
        frames = list(read_frames(path))
    numbers = [round(frame[8:16].mean() / 4) for frame in frames]
    assert numbers == list(range(numbers[0], 60)) and 0 < numbers[0] < 20
    assert probe(path).frames == len(frames) and probe(path).rate == 25
    assert caplog.messages == [f"{path}: begins between two key frames; read from the first one on"]


@CODECS
def test_sound_stays_with_its_picture(tmp_path: Path, kind: str, options: dict[str, str]) -> None:
    """Of a source whose first frames cannot be read: packets of sound keep their distance to the frames."""
    path = capture(tmp_path / "a.ts", kind, **options)
    with av.open(str(path)) as container:
        frames = container.streams.video[0]
        assert timing_of(path).begin > (frames.start_time or 0) * frames.time_base
    with VideoWriter(tmp_path / "out.mkv", 25, audio_from=path) as video:
        for frame in read_frames(path):
            video.write(frame)
    before, after = times_of_sound(path), times_of_sound(tmp_path / "out.mkv")
    kept = [time - float(timing_of(path).begin) for time in before if time >= timing_of(path).begin]
    assert len(after) > 60 and after == pytest.approx(kept[: len(after)], abs=2e-3)


def times_of_sound(path: Path) -> list[float]:
    with av.open(str(path)) as container:
        return [float(p.pts * p.time_base) for p in container.demux(audio=0) if p.size]


def test_a_file_without_a_key_frame_is_refused(tmp_path: Path) -> None:
    path = capture(tmp_path / "a.ts", g="1000", sc_threshold="0")
    with pytest.raises(ValueError, match="expected a whole video .* frame 0: no frame that does not lean on others"):
        list(read_frames(path))


def tracks(path: Path, default: int, subtitles: bool = False) -> Path:
    """Two tracks of sound at 48 and 44.1 kHz, of which one is the default."""
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("libx264", rate=25)
        pictures.height, pictures.width, pictures.pix_fmt = 48, 64, "yuv420p"
        voices = [container.add_stream("aac", rate=rate, layout="mono") for rate in (48000, 44100)]
        for number, voice in enumerate(voices):
            voice.disposition = av.stream.Disposition.default if number == default else av.stream.Disposition(0)
        if subtitles:
            text = path.with_suffix(".srt")
            text.write_text("1\n00:00:00,000 --> 00:00:00,300\nHello\n")
            with av.open(str(text)) as source:
                words = container.add_stream_from_template(source.streams.subtitles[0])
                for packet in source.demux():
                    if packet.size:
                        packet.stream = words
                        container.mux(packet)
        for number in range(10):
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
        container.mux(pictures.encode())
        silence(container, voices[0], 0.4)
        for start in range(0, 17640, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 44100, start
            container.mux(voices[1].encode(frame))
        container.mux(voices[1].encode())
    return path


@pytest.mark.parametrize("ending", ["mov", "mp4", "mkv"])
@pytest.mark.parametrize(("default", "rate"), [(0, 48000), (1, 44100)])
def test_the_default_track_of_sound_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ending: str, default: int, rate: int
) -> None:
    source = tracks(tmp_path / f"in.{ending}", default)
    with caplog.at_level(logging.WARNING, "diffattn"):
        path = write(tmp_path / f"out.{ending}", noise(10, 48, 64), audio_from=source)
    with av.open(str(path)) as container:
        assert [stream.rate for stream in container.streams.audio] == [rate]
    assert caplog.messages == [f"{source}: not taken over: 1 audio track"]


def test_what_is_not_taken_over_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tracks(tmp_path / "in.mkv", 0, subtitles=True)
    with caplog.at_level(logging.WARNING, "diffattn"):
        write(tmp_path / "out.mp4", noise(3, 48, 64), audio_from=source)
    assert caplog.messages == [f"{source}: not taken over: 1 audio track, 1 subtitle track"]


def sound_file(path: Path, codec: str) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=48000, layout="mono")
        for start in range(0, 20480, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), "s16", "mono")
            frame.sample_rate, frame.pts = 48000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("codec", "source", "ending", "hint"),
    [
        ("pcm_u8", "s.wav", ".mp4", "write a .mkv or a .mov"),
        ("pcm_mulaw", "s.wav", ".mp4", "write a .mov"),
        ("pcm_mulaw", "s.wav", ".mkv", "write a .mov"),
        ("libopus", "s.ogg", ".mov", "write a .mkv or a .mp4"),
        ("adpcm_ms", "s.wav", ".mkv", "encode the sound anew first, as AAC"),
    ],
)
def test_a_hint_names_files_that_hold_the_sound(
    tmp_path: Path, codec: str, source: str, ending: str, hint: str
) -> None:
    path = sound_file(tmp_path / source, codec)
    with pytest.raises(ValueError, match=rf"expected sound that {ending} files hold; got .*; {hint}$"):
        VideoWriter(tmp_path / f"a{ending}", 25, audio_from=path).__enter__()
    for name in (name for name in (".mp4", ".mov", ".mkv") if f"a {name}" in hint):
        assert probe(write(tmp_path / f"a{name}", noise(5, 32, 48), audio_from=path)).audio


def test_hints_name_no_option_that_commands_lack(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", noise(12, 48, 64))
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="make the file anew") as caught:
        list(read_frames(path))
    assert "on_error" not in str(caught.value)


def test_rates_last(tmp_path: Path) -> None:
    for rate in (Fraction(24000, 1001), Fraction(60), Fraction(15, 2)):
        with VideoWriter(tmp_path / "a.mkv", rate) as video:
            for frame in noise(8, 32, 48):
                video.write(frame)
        assert probe(tmp_path / "a.mkv").rate == pytest.approx(rate, rel=1e-3)
        assert probe(tmp_path / "a.mkv").frames == 8


@pytest.mark.parametrize("make", [lambda path: path.touch(), lambda path: path.write_bytes(b"x" * 999)])
def test_a_source_of_sound_that_is_none(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "s.mp4")
    with pytest.raises(ValueError, match="expected sound in .*s.mp4"):
        VideoWriter(tmp_path / "a.mp4", 25, audio_from=tmp_path / "s.mp4").__enter__()
    assert [file.name for file in tmp_path.iterdir()] == ["s.mp4"]
