from itertools import pairwise

import pytest
import torch
from diffattn.pipelines.video_sr.clips.chunks import Window, kept, official_chunks, plan_windows

CLIPS = [(1, 8, 4), (5, 8, 4), (8, 8, 4), (9, 8, 4), (21, 8, 3), (33, 32, 16), (41, 32, 16), (50, 7, 6), (5, 1, 0)]


def totals(windows: list[Window], frames: int) -> torch.Tensor:
    total = torch.zeros(frames, dtype=torch.float64)
    for window in windows:
        total[window.begin : window.end] += window.weights
    return total


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize(("frames", "size", "overlap"), CLIPS)
def test_weights_sum_to_one_at_every_frame(frames: int, size: int, overlap: int, official: bool) -> None:
    windows = plan_windows(frames, size, overlap, official=official)
    torch.testing.assert_close(totals(windows, frames), torch.ones(frames, dtype=torch.float64))
    assert all(len(window.weights) == window.end - window.begin for window in windows)
    assert all(bool((window.weights >= 0).all()) for window in windows)


@pytest.mark.parametrize(("frames", "size", "overlap"), CLIPS)
def test_windows_are_equally_long_and_end_with_the_clip(frames: int, size: int, overlap: int) -> None:
    windows = plan_windows(frames, size, overlap)
    assert {window.end - window.begin for window in windows} == {min(size, frames)}
    assert (windows[0].begin, windows[-1].end) == (0, frames)
    shared = [a.end - b.begin for a, b in pairwise(windows)]
    assert all(overlap <= frames_in_both < size for frames_in_both in shared)


def test_short_clips_are_one_window() -> None:
    for frames in (1, 5, 8):
        for official in (False, True):
            (window,) = plan_windows(frames, 8, 4, official=official)
            assert (window.begin, window.end) == (0, frames)
            assert window.weights.tolist() == [1.0] * frames


def test_neighbours_cross_fade_linearly() -> None:
    first, second = plan_windows(13, 8, 3)
    assert first.weights.tolist() == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert second.weights.tolist() == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])


def test_official_weights_cut_in_the_middle_of_the_overlap() -> None:
    first, second = plan_windows(16, 12, 1, official=True)
    assert ((first.begin, first.end), (second.begin, second.end)) == ((0, 12), (6, 16))
    assert first.weights.tolist() == [1.0] * 9 + [0.0] * 3
    assert second.weights.tolist() == [0.0] * 3 + [1.0] * 7


def test_last_official_chunk_takes_a_quarter_more_but_no_more() -> None:
    assert official_chunks(40, 32) == [(0, 40)]
    assert official_chunks(41, 32) == [(0, 32), (16, 41)]
    assert official_chunks(56, 32) == [(0, 32), (16, 56)]
    assert official_chunks(57, 32) == [(0, 32), (16, 48), (32, 57)]
    assert official_chunks(32, 32) == [(0, 32)]


def test_odd_chunks_overlap_by_less_than_half() -> None:
    assert official_chunks(24, 15) == [(0, 15), (8, 24)]
    assert kept([(0, 15), (8, 24)]) == [(0, 11), (11, 24)]


@pytest.mark.parametrize("max_len", [1, 2, 3, 8, 33])
def test_official_parts_cover_every_clip_once(max_len: int) -> None:
    for frames in range(1, 120):
        chunks = official_chunks(frames, max_len)
        parts = kept(chunks)
        assert [frame for part in parts for frame in range(*part)] == list(range(frames))
        assert all(begin <= a < b <= end for (begin, end), (a, b) in zip(chunks, parts, strict=True))
        assert all(end - begin <= max(1.25 * max_len, 1) for begin, end in chunks)


@pytest.mark.parametrize(
    ("frames", "size", "overlap", "official"),
    [(0, 8, 4, False), (9, 8, 8, False), (9, 0, 0, False), (0, 8, 4, True), (9, 0, 0, True)],
)
def test_impossible_windows_are_refused(frames: int, size: int, overlap: int, official: bool) -> None:
    with pytest.raises(ValueError, match="expected .*; got .*; "):
        plan_windows(frames, size, overlap, official=official)
