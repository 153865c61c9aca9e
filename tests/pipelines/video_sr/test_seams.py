"""What is between windows, chunks and tiles: with stand-ins that disagree from one to the next, no jump at the borders.

Neighbours are as far apart as the slope times what they are shifted by. Their cross-fade spreads that over the overlap,
so that no step is larger than those inside a window; a cut makes it one step. Windows and tiles share half of what they
hold, decoded chunks a quarter, where the fade is as steep as the slope: less would not do for neighbours that disagree
so much.
"""

import math

import pytest
import torch
from diffattn.pipelines.video_sr.i2vgenxl.settings import UpscaleSettings
from star_runs import StubUNet, StubVAE, run, stubbed

SLOPE = 0.01
LARGE = 720, 640
"""Pixels; 9 x 5 tiles of 80 x 128 cover it without overlap, and so do 9 x 8 of 80 x 80."""


def clip(frames, moving=False, height=16, width=96):
    """Gray; or a wave that moves by as much in every frame."""
    place = torch.arange(width) + torch.arange(height)[:, None] + torch.arange(frames)[:, None, None]
    wave = torch.sin(2 * math.pi * place / 80) if moving else torch.zeros(frames, height, width)
    return (0.5 + 0.02 * wave)[:, None].expand(-1, 3, -1, -1)


def jumps(pictures, axis):
    """Largest step between neighbours along an axis."""
    return float(pictures.diff(dim=axis).abs().max())


def result(pipe, video, output_type="latent", **settings):
    """(4, frames, rows, columns), or frames, of one step from zeros; the velocity gives x0 all that is in it."""
    options = {"upscale": 1, "color_fix": None, "output_type": output_type, **settings}
    own = {name: value for name, value in settings.items() if name in UpscaleSettings.__dataclass_fields__}
    plan = pipe.plan(*(video.shape[i] for i in (0, 2, 3)), 1, UpscaleSettings(**own))
    return run(pipe, video, latents=torch.zeros(1, 4, len(video), *plan.latent), **options)


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("frames", [9, 24, 27, 40])
def test_windows(frames, moving):
    pipe, video = stubbed(StubUNet(time=SLOPE)), clip(frames, moving)
    inside = jumps(result(pipe, video, window=frames, overlap=0), 1)
    faded = jumps(result(pipe, video, window=8, overlap=4), 1)
    assert inside > 0 and faded <= 1.001 * inside


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("frames", [9, 15, 24, 40])
def test_decoded_chunks(frames, moving):
    pipe, video = stubbed(vae=StubVAE(time=SLOPE)), clip(frames, moving)
    inside = jumps(result(pipe, video, "pt", decode_chunk=frames), 0)
    faded = jumps(result(pipe, video, "pt", decode_chunk=8, decode_overlap=2), 0)
    assert inside > 0 and faded <= 1.001 * inside


def test_cuts_of_the_released_code():
    """Windows of 8 that share 4 frames: 3 slopes at a cut. Chunks of 3: 2 slopes."""
    video = clip(12)
    pipe = stubbed(StubUNet(time=SLOPE))
    faded, cut = (jumps(result(pipe, video, window=8, overlap=4, official=way), 1) for way in (False, True))
    assert cut == pytest.approx(3 * SLOPE, rel=0.01) and cut > 2.9 * faded
    pipe = stubbed(vae=StubVAE(time=SLOPE))
    faded, cut = (jumps(result(pipe, video, "pt", official=way), 0) for way in (False, True))
    assert cut == pytest.approx(2 * SLOPE / 2, rel=0.01) and cut > 1.9 * faded


@pytest.mark.parametrize("axis", [-2, -1])
def test_tiles(axis):
    pipe, video = stubbed(StubUNet(rows=SLOPE, columns=SLOPE)), clip(1, False, *LARGE)
    inside = jumps(result(pipe, video), axis)
    faded = jumps(result(pipe, video, tile=80, tile_overlap=40), axis)
    cut = jumps(result(pipe, video, tile=80, tile_overlap=0), axis)
    assert inside > 0 and faded <= 1.001 * inside and cut > 4 * inside


@pytest.mark.parametrize("axis", [-2, -1])
def test_tiles_of_the_decoder(axis):
    pipe, video = stubbed(vae=StubVAE(rows=SLOPE / 80, columns=SLOPE / 80)), clip(1, False, *LARGE)
    inside = jumps(result(pipe, video, "pt"), axis)
    faded = jumps(result(pipe, video, "pt", decode_tile=80, tile_overlap=40), axis)
    cut = jumps(result(pipe, video, "pt", decode_tile=80, tile_overlap=0), axis)
    assert inside > 0 and faded <= 1.001 * inside and cut > 4 * inside


def test_guidance_has_one_gain_for_all_tiles():
    """Where one tile has a larger deviation than another, rescaling would show at their border."""

    class Uneven(StubUNet):
        def forward(self, sample, timestep, text, *args, **kwargs):
            half = text.mean((1, 2))[:, None, None, None, None]
            return (sample * half,)

    pipe = stubbed(Uneven())
    start = torch.randn(1, 4, 2, 26, 32) * torch.cat([torch.ones(16), 9 * torch.ones(16)])
    embeds = {"prompt_embeds": torch.full((1, 77, 12), 1.0), "negative_prompt_embeds": torch.full((1, 77, 12), 0.5)}
    given = {"latents": start, "output_type": "latent", "upscale": 1, "guidance_scale": 5.0, **embeds}
    whole, tiled = (run(pipe, clip(2, False, 200, 240), tile=tile, **given) for tile in (None, 136))
    torch.testing.assert_close(tiled, whole, atol=1e-4, rtol=1e-4)
