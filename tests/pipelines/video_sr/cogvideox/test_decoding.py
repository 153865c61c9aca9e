import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from diffattn.pipelines.video_sr.cogvideox import decoding
from diffattn.pipelines.video_sr.cogvideox.decoding import fades, plan_chunks
from tiny_cogvideox import clip, draw, pipeline, vae

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def own():
    return vae()


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


def decode(network, latents, size=None, overlap=3):
    return torch.cat([part for _, part in decoding.decode(network, latents, size, overlap, CPU)])


def encode(network, frames, size=None, overlap=3, seed=0):
    return decoding.encode(network, frames, size, overlap, torch.Generator().manual_seed(seed), CPU)


def run(pipe, video, **options):
    options = {"num_inference_steps": 2, "upscale": 2, "output_type": "pt", **options}
    return pipe(video, "a cat", generator=torch.Generator().manual_seed(0), **options).frames[0]


def smooth(count, rows=4, columns=6):
    """Latents (1, count, 4, rows, columns) that swing slowly, each number with a phase of its own."""
    phase = 2 * math.pi * torch.rand(4, rows, columns, generator=torch.Generator().manual_seed(3))
    return torch.sin(torch.arange(count)[:, None, None, None] / 6 + phase)[None]


class CountingVAE:
    """One number for a frame. In a chunk frame f is f / 4 later than the chunk's first latent frame, and back."""

    config = SimpleNamespace(scaling_factor=0.5, temporal_compression_ratio=4)
    dtype = torch.float32

    def __init__(self):
        self.decoded, self.encoded = [], []

    def decode(self, z, return_dict):
        self.decoded.append(z.shape[2])
        assert z.shape[2] % 2 == 1  # an even number gives 4 frames for the first one too
        after = z[:, :1, :1] + torch.arange(1, 4 * z.shape[2] - 3).reshape(-1, 1, 1) / 4
        frames = torch.cat([z[:, :1, :1], after], dim=2)
        assert torch.equal(frames[:, :, ::4], z[:, :1])
        return (frames.expand(-1, 3, -1, -1, -1),)

    def encode(self, frames):
        self.encoded.append(frames.shape[2])
        assert frames.shape[2] % 8 == 1
        mean = frames[:, :1, ::4]
        parameters = torch.cat([mean, torch.full_like(mean, -60.0)], dim=1)
        return SimpleNamespace(latent_dist=SimpleNamespace(parameters=parameters))


@pytest.mark.parametrize(
    ("count", "size", "overlap"), [(1, 3, 1), (3, 3, 1), (5, 3, 1), (9, 5, 3), (11, 5, 1), (13, 7, 5), (25, 13, 3)]
)
def test_chunks_are_odd_begin_at_even_places_and_cover_the_clip(count, size, overlap):
    chunks = plan_chunks(count, size, overlap)
    assert chunks[0][0] == 0 and chunks[-1][1] == count
    assert all(end - begin == min(size, count) and begin % 2 == 0 for begin, end in chunks)
    for period in (1, 4):
        parts = fades(chunks, period)
        total = torch.zeros(period * (count - 1) + 1, dtype=torch.float64)
        for part in parts:
            total[part.begin : part.end] += part.weights
        torch.testing.assert_close(total, torch.ones_like(total))
        for (begin, end), part in zip(chunks, parts, strict=True):
            assert part.begin == (period * begin + 1 if begin else 0) and part.end == period * (end - 1) + 1


@pytest.mark.parametrize(("count", "size", "overlap"), [(1, 5, 3), (9, 5, 1), (11, 5, 3), (13, 7, 5), (15, 9, 3)])
def test_frames_of_a_chunk_come_to_their_place(count, size, overlap):
    latents = torch.arange(count).float().reshape(1, count, 1, 1, 1) * CountingVAE.config.scaling_factor
    network = CountingVAE()
    frames = decode(network, latents, size, overlap)
    torch.testing.assert_close(frames[:, 1, 0, 0], torch.arange(4 * count - 3) / 8 + 0.5)
    assert frames.shape == (4 * count - 3, 3, 1, 1) and max(network.decoded) == min(size, count)

    given = (torch.arange(4 * count - 3) / 8 + 0.5).reshape(-1, 1, 1, 1).expand(-1, 3, -1, -1)
    torch.testing.assert_close(encode(network, given, size, overlap), latents)
    assert max(network.encoded) == 4 * min(size, count) - 3


def test_one_chunk_is_the_whole_clip_bit_for_bit(own):
    latents, frames = draw(1, 7, 4, 2, 3), clip(25, 16, 24)
    scaled = latents.transpose(1, 2) / own.config.scaling_factor
    want = own.decode(scaled).sample[0].transpose(0, 1) / 2 + 0.5
    posterior = own.encode((2 * frames - 1).transpose(0, 1)[None]).latent_dist
    sample = posterior.sample(torch.Generator().manual_seed(0)).transpose(1, 2) * own.config.scaling_factor
    for size in (None, 7, 13):
        assert torch.equal(decode(own, latents, size), want)
        assert torch.equal(encode(own, frames, size), sample)


@pytest.mark.slow
def test_chunks_of_a_smooth_clip_leave_no_jumps(own):
    """From frame to frame, a fade changes no more than the whole clip does there; a cut changes nearly twice as much.

    The decoder's own jumps from latent frame to latent frame are part of both.
    """
    latents = smooth(25)

    def jumps(frames):
        return (frames[1:] - frames[:-1]).abs().mean((1, 2, 3))

    whole = jumps(decode(own, latents))

    def worst(size, overlap):
        """Over each overlap, from the last frame before it to the first one after it."""
        chunks = plan_chunks(25, size, overlap)
        ratio = jumps(decode(own, latents, size, overlap)) / whole
        return max(ratio[4 * later[0] : 4 * earlier[1] - 3].max() for earlier, later in pairwise(chunks))

    assert worst(9, 3) < 1.05 and worst(7, 5) < 1.05 and worst(13, 3) < 1.05
    assert worst(7, 1) > 1.5


def test_chunks_are_near_the_whole_clip(own):
    latents = smooth(17)
    whole = decode(own, latents)
    off = (decode(own, latents, 9, 5) - whole).abs().mean()
    late = (decode(own, latents, 9, 5)[4:] - whole[:-4]).abs().mean()
    assert 0 < off < late / 5
    still = decode(own, latents[:, :1].expand(-1, 17, -1, -1, -1))
    torch.testing.assert_close(decode(own, latents[:, :1].expand(-1, 17, -1, -1, -1), 5), still, atol=1e-5, rtol=1e-5)


def test_the_sample_of_an_encoded_clip_is_drawn_once_for_all_chunks(own):
    """Samples of chunks would have less noise where they are blended."""
    frames = clip(1, 16, 24).expand(65, -1, -1, -1)
    whole, parts = encode(own, frames), encode(own, frames, 5)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    assert not torch.equal(encode(own, frames, 5, seed=1), parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    half = vae().to(dtype)
    frames = decode(half, smooth(9).to(dtype), 5)
    assert frames.dtype == torch.float32 and torch.isfinite(frames).all()
    latents = encode(half, clip(33, 16, 24), 5)
    assert latents.dtype == dtype and torch.isfinite(latents).all()


def test_frames_are_handed_out_before_the_next_chunk_is_decoded():
    network = CountingVAE()
    latents = torch.arange(9).float().reshape(1, 9, 1, 1, 1) * CountingVAE.config.scaling_factor
    stream = decoding.decode(network, latents, 5, 3, CPU)
    for chunk, (begin, frames) in enumerate([(0, 9), (9, 8), (17, 16)], 1):
        place, part = next(stream)
        assert (place, len(part)) == (begin, frames) and network.decoded == [5] * chunk
    assert next(stream, None) is None


@pytest.mark.parametrize("size", [None, 5])
def test_even_numbers_of_latent_frames_are_refused(own, size):
    for work in (lambda: decode(own, draw(1, 6, 4, 2, 3), size), lambda: encode(own, clip(21, 16, 24), size)):
        with pytest.raises(ValueError, match=r"odd number of latent frames; got 6; pad the clip to 8 k \+ 1 frames"):
            work()


def test_the_vae_works_on_chunks_of_the_clip(pipe, monkeypatch):
    lengths = {"_encode": [], "_decode": []}
    for name, seen in lengths.items():
        work = getattr(pipe.vae, name)
        monkeypatch.setattr(
            pipe.vae, name, lambda x, seen=seen, work=work, **k: seen.append(x.shape[2]) or work(x, **k)
        )
    video = clip(1, 8, 8).expand(60, -1, -1, -1)
    whole = run(pipe, video, decode_chunk_size=None)
    parts = run(pipe, video, decode_chunk_size=7)
    assert lengths == {"_encode": [65, 25, 25, 25, 25], "_decode": [17, 7, 7, 7, 7]}
    assert 0 < (parts - whole).abs().mean() < 0.15 * whole.std()
    assert torch.equal(run(pipe, video[:49]), run(pipe, video[:49], decode_chunk_size=None))


def test_frames_stay_in_time(pipe, monkeypatch):
    """The same latents, as 9 frames and as 13, which are not an odd number of latent frames by themselves."""
    denoise = pipe.denoise
    latents = draw(1, 5, 4, 2, 2)
    monkeypatch.setattr(pipe, "denoise", lambda *given: denoise(*given) * 0 + latents[:, : given[1].shape[1]])
    short, long = (run(pipe, clip(frames, 8, 8), color_fix=None) for frames in (9, 13))
    torch.testing.assert_close(long[:9], short)


@pytest.mark.parametrize("options", [{}, {"decode_chunk_size": 3, "decode_overlap": 1}])
def test_tiling_of_the_vae(options):
    """Tiles of 48 x 80 pixels, 40 x 64 apart, cover 64 x 96."""
    plain, tiled = pipeline(), pipeline()
    tiled.vae.enable_tiling(tile_sample_min_height=48, tile_sample_min_width=80)
    video = clip(17, 16, 24)
    want, got = (run(one, video, upscale=4, color_fix=None, **options) for one in (plain, tiled))
    assert got.shape == want.shape and not torch.equal(got, want)
    assert (got - want).abs().mean() < 0.2 * want.std()


def test_slicing_of_the_vae_changes_nothing(pipe):
    sliced = pipeline()
    sliced.vae.enable_slicing()
    assert torch.equal(run(sliced, clip(5)), run(pipe, clip(5)))
