import inspect
from itertools import pairwise

import pytest
import torch
from diffattn.pipelines.video_sr.i2vgenxl.networks.unet import legal_size
from diffattn.pipelines.video_sr.i2vgenxl.pipeline import STARPipeline
from diffattn.pipelines.video_sr.i2vgenxl.settings import UpscaleSettings
from diffattn.pipelines.video_sr.i2vgenxl.sizes import plan_upscaling


def plan(frames=10, height=45, width=60, upscale=4.0, downsamplings=3, **settings):
    return plan_upscaling(
        frames, height, width, upscale, UpscaleSettings(**settings), steps=14, downsamplings=downsamplings
    )


@pytest.mark.parametrize("downsamplings", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (45, 60), (60, 45), (17, 301), (180, 2)])
@pytest.mark.parametrize("upscale", [1, 1.5, 2.37, 4])
def test_sizes_are_legal_and_tight(height, width, upscale, downsamplings):
    got = plan(height=height, width=width, upscale=upscale, downsamplings=downsamplings)
    assert got.target == (round(height * upscale), round(width * upscale)) and got.source == (height, width)
    rows, columns = got.latent
    assert legal_size(rows, columns, downsamplings) == got.latent
    padding = got.padding
    assert padding.top + padding.bottom + got.target[0] == 8 * rows
    assert padding.left + padding.right + got.target[1] == 8 * columns
    assert (
        8 * rows - got.target[0] < 8 * (2**downsamplings + 2) and 8 * columns - got.target[1] < 8 * 2**downsamplings + 8
    )


@pytest.mark.parametrize("frames", [1, 2, 31, 32, 33, 36, 40, 41, 64, 100])
def test_windows_and_chunks_cover_clips_of_any_length(frames):
    for official in (False, True):
        got = plan(frames=frames, official=official)
        for windows, most in ((got.windows, 40 if official else 32), (got.decode_windows, 3 if official else 8)):
            total = torch.zeros(frames, dtype=torch.float64)
            for window in windows:
                assert 1 <= window.end - window.begin <= most
                total[window.begin : window.end] += window.weights
            torch.testing.assert_close(total, torch.ones(frames, dtype=torch.float64))


def test_official_sizes_windows_and_chunks():
    got = plan(frames=72, height=240, width=426, upscale=4, official=True, decode_chunk=5)
    assert got.latent == (976 // 8, 1728 // 8)
    assert [(w.begin, w.end) for w in got.windows] == [(0, 32), (16, 48), (32, 72)]
    assert [(w.begin, w.end) for w in plan(frames=8, official=True).decode_windows] == [(0, 3), (3, 6), (6, 8)]
    assert plan(height=10, width=10, upscale=1, official=True).latent == (90, 160)


@pytest.mark.parametrize("tile", [72, 100, 128, 200, 1000])
def test_tiles_are_legal_whatever_is_asked_for(tile):
    got = plan(height=100, width=150, tile=tile)
    rows, columns = got.latent
    assert all(legal_size(t.height, t.width) == (t.height, t.width) for t in got.tiles)
    size = got.tiles[0]
    assert size.height == rows or tile <= 8 * size.height < tile + 64
    assert size.width == columns or tile <= 8 * size.width < tile + 64
    covered = torch.zeros(rows, columns)
    for t in got.tiles:
        covered[t.slices] += 1
    assert covered.min() >= 1 and (len(got.tiles) > 1) == (tile < 500)


def test_tiles_overlap_by_so_many_pixels():
    tiles = plan(height=100, width=150, tile=128, tile_overlap=60).tiles
    lefts = sorted({tile.left for tile in tiles})
    assert len(lefts) > 1 and all(a + tiles[0].width - b >= 8 for a, b in pairwise(lefts))


def test_tiles_of_the_decoder():
    got = plan(height=100, width=150, decode_tile=128)
    assert len(got.tiles) == 1 and {(tile.height, tile.width) for tile in got.decode_tiles} == {(16, 16)}
    assert len(plan().decode_tiles) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"frames": 0}, "at least 1 frame of 1 x 1 pixels; got 0 of 45 x 60"),
        ({"height": 0}, "got 10 of 0 x 60"),
        ({"upscale": 0.99}, "upscale of at least 1; got 0.99"),
        ({"upscale": float("inf")}, "got inf"),
        ({"upscale": float("nan")}, "got nan"),
        ({"num_inference_steps": 0}, "num_inference_steps of at least 1; got 0"),
        ({"window": 0, "overlap": 0}, "window of at least 1"),
        ({"window": 16}, "overlap from 0 to below window; got 16"),
        ({"overlap": -1}, "got -1; 16 is the default"),
        ({"tile": 71}, "tile 8 pixels above tile_overlap, or None; got 71"),
        ({"decode_tile": 0, "tile_overlap": 0}, "decode_tile 8 pixels above tile_overlap"),
        ({"tile_overlap": -1}, "tile_overlap of at least 0 pixels"),
        ({"encode_chunk": 0}, "encode_chunk of at least 1"),
        ({"decode_chunk": 2}, "decode_overlap from 0 to below decode_chunk; got 2"),
        ({"color_fix": "luma"}, "color_fix among 'adain', 'wavelet', None; got 'luma'"),
        ({"guidance_scale": -1.0}, "guidance_scale of at least 0"),
        ({"guidance_scale": float("nan")}, "got nan; 7.5 is the default"),
        ({"guidance_rescale": 1.5}, "guidance_rescale from 0 to 1; got 1.5"),
        ({"seed": -1}, "seed from 0"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        plan(**given)


def test_the_call_takes_the_settings_by_name():
    own = set(UpscaleSettings.__dataclass_fields__)
    call = inspect.signature(STARPipeline.__call__).parameters
    assert call["settings"].default is None and call["changes"].kind is inspect.Parameter.VAR_KEYWORD
    assert not own & set(call)  # a parameter of the call would hide the field of its name
