import pytest
import torch
from diffattn.pipelines.video_sr.clips.chunks import plan_windows
from diffattn.pipelines.video_sr.clips.streaming import finished, finished_sizes, regroup
from diffattn.pipelines.video_sr.i2vgenxl.tiles import run_in_tiles, spread_tiles
from torch import Tensor

LENGTHS = [1, 2, 7, 8, 9, 12, 15, 31, 100]


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("frames", LENGTHS)
def test_frames_are_finished_once_and_in_order(frames, official):
    """Each is the blend over all windows that hold it."""
    windows = plan_windows(frames, 8, 5, official=official)
    parts = [torch.randn(w.end - w.begin, 2, 3) for w in windows]
    want = torch.zeros(frames, 2, 3, dtype=torch.float64)
    for window, part in zip(windows, parts, strict=True):
        want[window.begin : window.end] += window.weights[:, None, None] * part
    blocks = list(finished(windows, parts))
    assert [begin for begin, _ in blocks] == [window.begin for window in windows]
    assert [len(block) for _, block in blocks] == finished_sizes(windows)
    torch.testing.assert_close(torch.cat([block for _, block in blocks]), want.float())


def test_windows_are_taken_one_at_a_time():
    windows, taken = plan_windows(100, 8, 4), []

    def parts():
        for window in windows:
            taken.append(window.begin)
            yield torch.ones(window.end - window.begin, 1)

    stream = finished(windows, parts())
    for i, (begin, block) in enumerate(stream):
        assert len(taken) == i + 1 and begin == windows[i].begin and block.min() > 0.999


def test_one_window_and_hard_cuts_change_no_bit():
    part = torch.randn(5, 3)
    ((begin, block),) = finished(plan_windows(5, 8, 4), [part])
    assert begin == 0 and torch.equal(block, part)
    windows = plan_windows(20, 8, 4, official=True)
    clip = torch.randn(20, 3)
    blocks = finished(windows, [clip[window.begin : window.end] for window in windows])
    assert torch.equal(torch.cat([block for _, block in blocks]), clip)


@pytest.mark.parametrize("given", [[10], [1] * 10, [3, 0, 3, 4], [9, 1]])
@pytest.mark.parametrize("sizes", [[10], [1] * 10, [4, 4, 2], [7, 3]])
def test_regrouped_frames_are_the_same(given, sizes):
    clip = torch.arange(10.0)[:, None]
    blocks = list(regroup(clip.split(given), sizes))
    assert [len(block) for block in blocks] == sizes and torch.equal(torch.cat(blocks), clip)


def test_regrouping_reads_no_further_than_it_must():
    read = []

    def chunks():
        for i in range(100):
            read.append(i)
            yield torch.zeros(2, 1)

    blocks = regroup(chunks(), [3] * 60)
    next(blocks), next(blocks)
    assert len(read) == 3


def test_another_number_of_frames_is_told():
    with pytest.raises(ValueError, match="expected 8 frames or more; got 7"):
        list(regroup([torch.zeros(7, 1)], [4, 4]))
    with pytest.raises(ValueError, match="expected 4 frames or more; got 0"):
        list(regroup([], [4]))
    for more in ([torch.zeros(9, 1)], [torch.zeros(8, 1), torch.zeros(0, 1), torch.zeros(1, 1)]):
        with pytest.raises(ValueError, match="expected 8 frames; got more"):
            list(regroup(more, [4, 4]))


def crops(x: Tensor, scale: int = 1):
    """Of an enlarged image, for a tile of the small one."""
    return lambda tile: x[..., *tile.scaled(scale).slices]


@pytest.mark.parametrize(("height", "width"), [(18, 32), (26, 40), (34, 24), (90, 8), (10, 160)])
@pytest.mark.parametrize("overlap", [0, 1, 5, 9])
def test_tiles_cover_a_picture_with_one_size_and_join_to_it(height, width, overlap):
    tiles = spread_tiles(height, width, 18, 16, overlap)
    assert len({(tile.height, tile.width) for tile in tiles}) == 1
    x = torch.randn(2, 4, height, width)
    torch.testing.assert_close(run_in_tiles(crops(x), tiles), x)
    large = torch.randn(3, 8 * height, 8 * width)
    torch.testing.assert_close(run_in_tiles(crops(large, 8), tiles, 8), large)


def test_one_tile_changes_no_bit():
    x = torch.randn(2, 3, 18, 16)
    assert run_in_tiles(lambda tile: x, spread_tiles(18, 16, 18, 32, 8)) is x


def test_tiles_cross_fade_linearly_in_both_axes():
    tiles = spread_tiles(12, 12, 8, 8, 4)
    assert [(tile.top, tile.left) for tile in tiles] == [(0, 0), (0, 4), (4, 0), (4, 4)]
    got = run_in_tiles(lambda tile: torch.full((8, 8), float(tile.top)), tiles)
    want = torch.tensor([0.0] * 4 + [4 * k / 5 for k in (1, 2, 3, 4)] + [4.0] * 4)
    torch.testing.assert_close(got, want[:, None].expand(12, 12))
    columns = run_in_tiles(lambda tile: torch.full((8, 8), float(tile.left)), tiles)
    torch.testing.assert_close(columns, want.expand(12, 12))
