"""Windows of frames."""

import pytest
import torch
from diffattn.pipelines.portrait_animation.sampling.windows import circular_windows, plain_windows

from diffattn.media.windows import blend_windows


@pytest.mark.parametrize("frames", [1, 2, 7, 15, 16, 17, 24, 28, 29, 100])
def test_plain_windows_cover_any_video_and_leave_what_agrees_alone(frames):
    windows = plain_windows(frames, 16, 4)
    assert {len(place) for place in windows.places} == {min(16, frames)}
    assert {frame for place in windows.places for frame in place} == set(range(frames))
    assert windows.places[0][0] == 0 and windows.places[-1][-1] == frames - 1
    video = torch.randn(frames, 3, 2)
    joined = blend_windows([video[list(place)] for place in windows.places], windows.places, windows.weights, frames, 0)
    torch.testing.assert_close(joined, video)


def test_plain_windows_cross_fade():
    first, second = plain_windows(28, 16, 4).weights
    torch.testing.assert_close(first[-4:], torch.tensor([0.8, 0.6, 0.4, 0.2], dtype=torch.float64))
    torch.testing.assert_close(second[:4], torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64))


@pytest.mark.parametrize("offset", [0, 5, 19])
def test_circular_windows_go_round_the_end(offset):
    windows = circular_windows(20, 16, 4, offset)
    assert [place[0] for place in windows.places] == [offset, (offset + 12) % 20]
    assert all([(place[0] + i) % 20 for i in range(16)] == list(place) for place in windows.places)
    assert {frame for place in windows.places for frame in place} == set(range(20))
    assert windows.weights.eq(1).all()


def test_circular_windows_need_a_video_as_long_as_one():
    assert len(circular_windows(16, 16, 4, 3).places) == 1
    for frames, size, overlap in ((15, 16, 4), (20, 16, 16), (20, 16, -1)):
        with pytest.raises(ValueError, match="leave official=True out"):
            circular_windows(frames, size, overlap, 0)


@pytest.mark.parametrize(("count", "sizes"), [(1, [1] * 3), (2, [2, 1]), (5, [3])])
def test_batches_hold_every_window_once(count, sizes):
    windows = plain_windows(40, 16, 4)
    batches = list(windows.batches(count))
    assert [len(batch) for batch in batches] == sizes
    assert [place for batch in batches for place in batch] == list(windows.places)
