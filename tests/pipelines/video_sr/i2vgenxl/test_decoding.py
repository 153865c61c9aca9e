"""The VAE's two ends: frames to latents, and latents to frames with the colours of the clip."""

import pytest
import tiny_star
import torch
from diffattn.pipelines.video_sr.i2vgenxl.decoding import decode, fix_colors
from diffattn.pipelines.video_sr.i2vgenxl.encoding import encode, enlarge, prepare, widened
from diffattn.pipelines.video_sr.i2vgenxl.settings import UpscaleSettings
from diffattn.pipelines.video_sr.i2vgenxl.sizes import plan_upscaling
from diffattn.pipelines.video_sr.i2vgenxl.tiles import spread_tiles

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae():
    return tiny_star.vae()


def plan(height, width, upscale, **settings):
    return plan_upscaling(2, height, width, upscale, UpscaleSettings(**settings), steps=1)


def test_frames_are_enlarged_bilinearly():
    frames = tiny_star.clip(2, 5, 7)
    want = torch.nn.functional.interpolate(frames, (13, 20), mode="bilinear", align_corners=False, antialias=False)
    assert torch.equal(enlarge(frames, (13, 20)), want) and torch.equal(enlarge(frames, (5, 7)), frames)


def test_frames_are_padded_by_reflection_or_with_white():
    frames = tiny_star.clip(2, 5, 7)
    tight = plan(5, 7, 4)
    got = prepare(frames, tight, official=False)
    assert got.shape == (2, 3, 8 * tight.latent[0], 8 * tight.latent[1]) and got.min() >= -1 and got.max() <= 1
    inner = tight.padding.crop(got)
    assert torch.equal(inner, 2 * enlarge(frames, (20, 28)) - 1)
    row = tight.padding.top
    assert torch.equal(tight.padding.crop(got)[..., 1, :], got[..., row - 1, tight.padding.left :][..., :28])
    official = plan(5, 7, 4, official=True)
    white = prepare(frames, official, official=True)
    assert white.shape[-2:] == (720, 1280) and white[..., 0, 0].eq(1).all() and white[..., -1, -1].eq(1).all()
    assert torch.equal(official.padding.crop(white), inner)


def test_latents_are_the_mean_or_a_sample(vae):
    pictures = 2 * tiny_star.clip(2, 80, 64) - 1
    with torch.no_grad():
        posterior = vae.encode(pictures).latent_dist
        noise = tiny_star.latents(2, 10, 8)[0].transpose(0, 1)
        torch.testing.assert_close(encode(vae, pictures, None), 0.18215 * posterior.mean)
        torch.testing.assert_close(encode(vae, pictures, noise), 0.18215 * (posterior.mean + posterior.std * noise))
        both = torch.cat([encode(vae, picture[None], None) for picture in pictures])
        torch.testing.assert_close(both, encode(vae, pictures, None), atol=1e-5, rtol=1e-5)


def test_the_encoder_is_widened_only_from_float16_and_then_given_back():
    vae = tiny_star.vae()
    own = [parameter.clone() for parameter in vae.half().parameters()]
    for force, used in ((True, torch.float32), (False, torch.float16)):
        vae.register_to_config(force_upcast=force)
        with pytest.raises(RuntimeError, match="on the way"), widened(vae):
            assert vae.dtype == used
            raise RuntimeError("on the way")
        assert vae.dtype == torch.float16
    assert all(map(torch.equal, own, vae.parameters()))
    with widened(vae.bfloat16()):
        assert vae.dtype == torch.bfloat16


def test_a_chunk_is_decoded_as_one_video(vae):
    z = tiny_star.latents(3, 10, 8)[0].transpose(0, 1)
    with torch.no_grad():
        want = vae.decode(z / 0.18215, num_frames=3).sample / 2 + 0.5
        got = decode(vae, z, spread_tiles(10, 8, 10, 8, 0), CPU)
        alone = torch.cat([decode(vae, frame[None], spread_tiles(10, 8, 10, 8, 0), CPU) for frame in z])
    assert got.shape == (3, 3, 80, 64) and got.dtype == torch.float32
    torch.testing.assert_close(got, want)
    assert (got - alone).abs().max() > 1e-3  # its convolutions go along the frames


def test_tiles_of_the_decoder_are_near_the_whole(vae):
    z = tiny_star.latents(2, 18, 16)[0].transpose(0, 1)
    tiles = spread_tiles(18, 16, 13, 12, 8)
    with torch.no_grad():
        whole, tiled = (decode(vae, z, places, CPU) for places in (spread_tiles(18, 16, 18, 16, 0), tiles))
    assert len(tiles) == 4 and tiled.shape == whole.shape == (2, 3, 144, 128)
    assert 0 < (tiled - whole).abs().mean() < 0.5 * whole.std()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.slow
def test_half_precision_decodes_to_float32(dtype):
    z = tiny_star.latents(2, 10, 8)[0].transpose(0, 1)
    with torch.no_grad():
        got = decode(tiny_star.vae().to(dtype), z, spread_tiles(10, 8, 10, 8, 0), CPU)
    assert got.dtype == torch.float32 and torch.isfinite(got).all()


@pytest.mark.parametrize("how", ["adain", "wavelet"])
def test_colours_come_from_the_clip_frame_by_frame(how):
    source = 0.3 * tiny_star.clip(2, 10, 12) + torch.tensor([[0.5, 0.1, 0.3], [0.2, 0.6, 0.4]])[..., None, None]
    frames = 0.3 * tiny_star.clip(2, 40, 48, seed=1) + 0.3
    got = fix_colors(frames, source, how)
    far, near = ((x.mean((2, 3)) - source.mean((2, 3))).abs().max() for x in (frames, got))
    assert near < 0.02 < far
    assert torch.equal(fix_colors(2 * frames, source, None), (2 * frames).clamp(0, 1))
