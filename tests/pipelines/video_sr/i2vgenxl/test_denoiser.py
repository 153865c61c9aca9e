import pytest
import tiny_star
import torch
from diffattn.pipelines.video_sr.i2vgenxl.denoiser import Denoiser
from diffattn.pipelines.video_sr.i2vgenxl.guidance import guide
from diffattn.pipelines.video_sr.i2vgenxl.tiles import run_in_tiles, spread_tiles
from star_runs import StubControl, StubUNet

TIMESTEP = torch.tensor(500)
WHOLE = spread_tiles(18, 16, 18, 16, 0)
PARTS = spread_tiles(18, 16, 10, 16, 2)


@pytest.fixture(scope="module")
def networks():
    return tiny_star.unet().double(), tiny_star.controlnet().double()


def inputs(frames=3):
    return (tiny_star.latents(frames, 18, 16, seed=seed).double() for seed in (0, 1))


def texts():
    return tiny_star.text(seed=0).double(), tiny_star.text(seed=1).double()


def velocity(networks, tiles=WHOLE, text=None, frames=3, **options):
    settings = {"guidance_scale": 7.5, "guidance_rescale": 0.2, **options}
    with torch.no_grad():
        return Denoiser(*networks, text or texts(), tiles, **settings)(*inputs(frames), TIMESTEP)


def plain(networks, x, hint, text):
    """The networks, called by hand."""
    unet, controlnet = networks
    with torch.no_grad():
        down, mid = controlnet(x, TIMESTEP, text, hint, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return unet(x, TIMESTEP, text, **residuals, return_dict=False)[0]


@pytest.mark.parametrize("frames", [1, 3])
def test_both_halves_are_guided(networks, frames):
    x, hint = inputs(frames)
    positive, negative = (plain(networks, x, hint, text).float() for text in texts())
    got = velocity(networks, frames=frames)
    assert got.dtype == torch.float32 and got.shape == x.shape
    torch.testing.assert_close(got, guide(positive, negative, 7.5, 0.2))
    assert (got - positive).abs().max() > 0.1 * positive.std()


@pytest.mark.parametrize("tiles", [WHOLE, PARTS])
def test_halves_in_one_call_or_two_are_the_same(networks, tiles):
    one, two = (velocity(networks, tiles, batch=batch) for batch in (True, False))
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-6)


def test_a_scale_of_one_leaves_the_negative_half_out():
    stub = StubUNet(time=1.0)
    for batch in (False, True):
        Denoiser(stub, StubControl(), texts(), WHOLE, guidance_scale=1, guidance_rescale=0.2, batch=batch)(
            *inputs(), TIMESTEP
        )
    assert stub.seen == [(1, 4, 3, 18, 16)] * 2
    stub.seen.clear()
    for batch in (False, True):
        Denoiser(stub, StubControl(), texts(), WHOLE, guidance_scale=2, guidance_rescale=0.2, batch=batch)(
            *inputs(), TIMESTEP
        )
    assert stub.seen == [(1, 4, 3, 18, 16)] * 2 + [(2, 4, 3, 18, 16)]


def test_tiles_are_blended_before_they_are_guided(networks):
    """Each half over the whole image, then one gain for both."""
    x, hint = inputs()
    halves = []
    for text in texts():
        parts = {tile: plain(networks, x[..., *tile.slices], hint[..., *tile.slices], text).float() for tile in PARTS}
        halves.append(run_in_tiles(parts.__getitem__, PARTS))
    got = velocity(networks, PARTS)
    torch.testing.assert_close(got, guide(*halves, 7.5, 0.2), atol=1e-5, rtol=1e-5)
    assert (got - velocity(networks)).abs().max() > 1e-2


def test_networks_see_tiles_of_their_size():
    stub = StubUNet()
    Denoiser(stub, StubControl(), texts(), PARTS, guidance_scale=1, guidance_rescale=0)(*inputs(), TIMESTEP)
    assert set(stub.seen) == {(1, 4, 3, 10, 16)} and len(stub.seen) == len(PARTS) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_work_in_their_own_dtype(dtype):
    networks = tiny_star.unet().to(dtype), tiny_star.controlnet().to(dtype)
    got = velocity(networks, PARTS)
    assert got.dtype == torch.float32 and torch.isfinite(got).all()
    want = velocity((tiny_star.unet(), tiny_star.controlnet()), PARTS)
    assert (got - want).abs().mean() < 0.2 * want.abs().mean()
