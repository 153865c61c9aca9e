"""What is between windows, chunks and tiles: with stand-ins that disagree from one to the next, no jump at the borders.

Neighbours are as far apart as the slope times what they are shifted by. Their cross-fade spreads that over the overlap,
so that no step is larger than those inside a window; a cut makes it one step.
"""

import math

import pytest
import torch
from star_runs import StubUNet, StubVAE, run, stubbed

FRAMES, SLOPE = 40, 0.01
CUT = {"official": True, "window": 8}
FADE = {"window": 8, "overlap": 4}


def clip(frames, moving, height=16, width=16):
    """Gray; or a wave that moves by as much in every frame."""
    place = torch.arange(width) + torch.arange(height)[:, None] + torch.arange(frames)[:, None, None]
    wave = torch.sin(2 * math.pi * place / 80) if moving else torch.zeros(frames, height, width)
    return (0.5 + 0.02 * wave)[:, None].expand(-1, 3, -1, -1)


def jumps(pictures, axis):
    """Largest step between neighbours along an axis, at each place of it."""
    steps = pictures.diff(dim=axis).abs()
    return steps.amax([other for other in range(steps.ndim) if other != axis % steps.ndim])


def latents(pipe, video, start=None, **options):
    """(4, frames, rows, columns) after a step from zeros."""
    shape = (1, 4, len(video), 90, 160) if options.get("official") else (1, 4, len(video), *start)
    return run(pipe, video, latents=torch.zeros(shape), output_type="latent", upscale=1, **options)


@pytest.mark.parametrize("moving", [False, True])
def test_windows(moving):
    """The denoiser's x0 is sigma times its slopes, from a start of zeros."""
    pipe = stubbed(StubUNet(time=SLOPE))
    inside = jumps(latents(pipe, clip(8, moving), (10, 8), window=8, overlap=4), 1).max()
    faded = jumps(latents(pipe, clip(FRAMES, moving), (10, 8), **FADE), 1)
    cut = jumps(latents(pipe, clip(FRAMES, moving), **CUT), 1)
    print(f"windows: inside {inside:.4f}, cross-faded {faded.max():.4f}, cut {cut.max():.4f}")
    assert inside > 0 and faded.max() <= 1.001 * inside and cut.max() > 2.9 * inside


@pytest.mark.parametrize("moving", [False, True])
def test_decoded_chunks(moving):
    """With what the clip itself moves by from frame to frame."""
    pipe = stubbed(vae=StubVAE(time=SLOPE))
    start = torch.zeros(1, 4, FRAMES, 10, 8)
    video, options = clip(FRAMES, moving), {"color_fix": None, "upscale": 1, **FADE}

    def decoded(**more):
        shape = (1, 4, FRAMES, 90, 160) if more.get("official") else start.shape
        return jumps(run(pipe, video, latents=torch.zeros(shape), **{**options, **more}), 0)

    inside = decoded(decode_chunk=FRAMES, decode_overlap=0).max()
    faded, cut = decoded(decode_chunk=8, decode_overlap=2), decoded(official=True, window=64)
    print(f"chunks: inside {inside:.4f}, cross-faded {faded.max():.4f}, cut {cut.max():.4f}")
    assert inside > 0 and faded.max() <= 1.001 * inside and cut.max() > 1.9 * inside


@pytest.mark.parametrize("axis", [-2, -1])
def test_tiles(axis):
    pipe = stubbed(StubUNet(rows=SLOPE, columns=SLOPE))
    video, size = clip(2, False, 200, 240), (26, 32)
    inside = jumps(latents(pipe, video, size), axis).max()
    faded = jumps(latents(pipe, video, size, tile=136, tile_overlap=64), axis)
    cut = jumps(latents(pipe, video, size, tile=136, tile_overlap=0), axis)
    print(f"tiles: inside {inside:.4f}, cross-faded {faded.max():.4f}, cut {cut.max():.4f}")
    assert inside > 0 and faded.max() <= 1.001 * inside and cut.max() > 4 * inside


@pytest.mark.parametrize("axis", [-2, -1])
def test_tiles_of_the_decoder(axis):
    pipe = stubbed(vae=StubVAE(rows=SLOPE / 8, columns=SLOPE / 8))
    video, size = clip(2, False, 200, 240), (26, 32)

    def decoded(**more):
        start = torch.zeros(1, 4, 2, *size)
        return jumps(run(pipe, video, latents=start, upscale=1, color_fix=None, **more), axis)

    inside, faded = decoded().max(), decoded(decode_tile=128, tile_overlap=64)
    cut = decoded(decode_tile=128, tile_overlap=0)
    print(f"tiles of the decoder: inside {inside:.5f}, cross-faded {faded.max():.5f}, cut {cut.max():.5f}")
    assert inside > 0 and faded.max() <= 1.001 * inside and cut.max() > 4 * inside


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
