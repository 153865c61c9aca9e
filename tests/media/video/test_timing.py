"""Frames that are not evenly spaced: all of them are shown, at their time, as long as the file says."""

import logging
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("av", reason="needs PyAV, the extra `video`")

from video_files import encode, noise, number_of, picture

from diffattn.media.video import probe, read_frames
from diffattn.media.video.timing import choose_rate, ticks


def gif(path: Path, hundredths: list[int]) -> Path:
    frames = [Image.fromarray(picture(number % 15)) for number in range(len(hundredths))]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[10 * each for each in hundredths])
    return path


def runs(path: Path) -> list[tuple[int, int]]:
    """Numbers of the frames that are shown, each with how often it comes."""
    found: list[tuple[int, int]] = []
    for frame in read_frames(path):
        number = number_of(frame)
        if found and found[-1][0] == number:
            found[-1] = number, found[-1][1] + 1
        else:
            found.append((number, 1))
    return found


def test_the_last_frame_of_a_gif_is_held(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = gif(tmp_path / "a.gif", [10] * 11 + [300])
    with caplog.at_level(logging.WARNING, "diffattn"):
        assert runs(path) == [*((number, 1) for number in range(11)), (11, 30)]
    info = probe(path)
    assert (info.rate, info.frames, info.duration) == (10, 41, pytest.approx(4.1))
    assert caplog.messages == [f"{path}: frames are not evenly spaced; shown at 10 per second"]


@pytest.mark.parametrize(
    ("hundredths", "rate", "times"),
    [
        ([7, 8] * 6, Fraction(40, 3), [1] * 12),  # a coarse clock
        ([20, 4, 4, 4, 20, 4, 4], 25, [5, 1, 1, 1, 5, 1, 1]),
        ([100], 1, [1]),
        ([5, 100, 5], 20, [1, 20, 1]),
    ],
)
def test_all_frames_of_a_gif_are_shown_at_their_time(
    tmp_path: Path, hundredths: list[int], rate: Fraction, times: list[int]
) -> None:
    path = gif(tmp_path / "a.gif", hundredths)
    assert runs(path) == list(enumerate(times)) and probe(path).rate == rate
    assert probe(path).duration == pytest.approx(sum(hundredths) / 100, abs=0.05)


@pytest.mark.parametrize(("ending", "bf"), [("mp4", "0"), ("mp4", "2"), ("mkv", "2"), ("mov", "0")])
def test_a_rate_that_changes_keeps_every_frame(tmp_path: Path, ending: str, bf: str) -> None:
    """30 a second, then 2 a second."""
    moments = [*range(12), *range(12, 57, 15)]
    path = encode(tmp_path / f"a.{ending}", [picture(n) for n in range(15)], ticks=moments, rate=30, bf=bf)
    want = [*((number, 1) for number in range(11)), (11, 1), (12, 15), (13, 15), (14, 1)]
    assert runs(path) == want and probe(path).rate == 30 and probe(path).frames == 43


def test_more_slow_frames_than_quick_ones_keep_every_frame(tmp_path: Path) -> None:
    moments = [*range(0, 80, 10), *range(80, 86)]
    path = encode(tmp_path / "a.mp4", [picture(n) for n in range(14)], ticks=moments, rate=10, bf="0")
    assert [number for number, _ in runs(path)] == list(range(14)) and probe(path).rate == 10


def test_an_evenly_spaced_file_is_not_decoded_for_its_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffattn.media.video.timing._times_of_frames", lambda *_: pytest.fail("decoded"))
    for ending in ("mp4", "mkv", "mov", "avi", "ts"):
        path = encode(tmp_path / f"a.{ending}", noise(9, 32, 48), rate=24)
        assert (probe(path).rate, probe(path).frames) == (24, 9), ending


def test_a_file_that_changes_is_looked_at_again(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", noise(3, 32, 48), rate=10)
    assert probe(path).frames == 3
    encode(path, noise(5, 32, 48), rate=12)
    assert (probe(path).frames, probe(path).rate) == (5, 12)


def test_a_jitter_neither_drops_nor_repeats() -> None:
    rng = np.random.default_rng(3)
    times = [Fraction(int(40 * n + jitter), 1000) for n, jitter in enumerate(rng.integers(0, 9, 300))]
    rate = choose_rate(times, [Fraction(25), Fraction(25)])
    assert rate == 25 and list(ticks(times, rate)) == list(range(300))


@pytest.mark.parametrize(
    ("times", "hints", "rate"),
    [
        ([0, 1, 2, 3], [1000, 1], 1),  # a clock
        ([0, 1, 2, 3], [], 1),
        ([], [25], 25),
        ([], [], None),
        ([0, Fraction(1, 300), Fraction(2, 300)], [300], 300),
    ],
)
def test_choice_of_a_rate(times: list[Fraction], hints: list[Fraction], rate: Fraction | None) -> None:
    assert choose_rate([Fraction(time) for time in times], [Fraction(hint) for hint in hints]) == rate


def test_frames_that_come_too_fast_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Five in 5 ms among 12 in a second: no rate shows them all."""
    moments = [0, 80, 160, 161, 162, 163, 164, 240, 320, 400]
    path = encode(tmp_path / "a.mkv", [picture(n) for n in range(10)], ticks=moments, rate=1000, bf="0")
    with caplog.at_level(logging.WARNING, "diffattn"):
        shown = [number for number, _ in runs(path)]
    assert shown[:3] == [0, 1, 2] and shown[-3:] == [7, 8, 9] and "left out" in caplog.text
