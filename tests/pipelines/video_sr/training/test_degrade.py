"""Degradation of clips: what holds for all frames, what a codec carries from frame to frame, and seeds."""

import dataclasses
import itertools
import math
import random
import re
import sys
from collections import Counter
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffattn.pipelines.pixel_aware_sr.training import degrade as picture
from diffattn.pipelines.pixel_aware_sr.training.blur_kernels import Blur, ShapedKernel, SincKernel
from diffattn.pipelines.pixel_aware_sr.training.degrade import DrawnDegradation, DrawnNoise, DrawnStage
from diffattn.pipelines.video_sr.training.codec import CodecRanges, DrawnCodec, recompress
from diffattn.pipelines.video_sr.training.degrade import STAR, ClipDegradation, Ranges, apply, degrade_clip, draw
from torch import Tensor

pytest.importorskip("av", reason="needs PyAV, the extra `video`")

NO_CODEC = Ranges(codec=CodecRanges(probability=0.0))
NO_NOISE = DrawnNoise(kind="gaussian", strength=0.0, gray=False, seed=0)
CODECS = pytest.mark.parametrize("codec", ["libx264", "mpeg4"])


@lru_cache
def scene(frames: int = 6, rows: int = 72, columns: int = 104) -> Tensor:
    """A smooth random image that moves by two pixels a frame to the left."""
    coarse = torch.rand(1, 3, 12, 24, generator=torch.Generator().manual_seed(4))
    wide = F.interpolate(coarse, size=(rows, columns + 2 * frames), mode="bicubic").clamp(0, 1)[0]
    return torch.stack([wide[:, :, 2 * number : 2 * number + columns] for number in range(frames)])


def still(frames: int, rows: int = 48, columns: int = 64) -> Tensor:
    return scene()[:1, :, :rows, :columns].repeat(frames, 1, 1, 1)


def plain(**changes: object) -> ClipDegradation:
    """A degradation that reduces, and otherwise does as little as can be."""
    stage = DrawnStage(kernel=None, scale=1.0, mode="area", noise=NO_NOISE, jpeg_quality=100)
    spatial = DrawnDegradation(
        first=stage,
        second=stage,
        jpeg_before_reduction=False,
        reduction_mode="area",
        final_scale=4,
        sinc=None,
        restore_mode="area",
    )
    codecs = {name: changes.pop(name, None) for name in ("first_codec", "second_codec")}
    return ClipDegradation(spatial=dataclasses.replace(spatial, **changes), **codecs)


def without_noise(drawn: ClipDegradation) -> ClipDegradation:
    stages = {
        name: dataclasses.replace(getattr(drawn.spatial, name), noise=NO_NOISE, mode="bilinear")
        for name in ("first", "second")
    }
    return dataclasses.replace(drawn, spatial=dataclasses.replace(drawn.spatial, **stages))


@pytest.mark.parametrize("seed", range(6))
def test_a_bad_clip_shows_the_good_one_a_quarter_as_large(seed: int) -> None:
    good = scene()
    bad = degrade_clip(good, seed)
    small = F.interpolate(good, size=(18, 26), mode="area")
    assert bad.shape == (6, 3, 18, 26)
    error = (bad - small).square().mean()
    for other in (small.flip(0), small.flip(-1), small.flip(-2), small.roll(1, 1)):
        assert error < (bad - other).square().mean(), "not another order, a mirror image or other channels"


@pytest.mark.parametrize(
    ("frames", "rows", "columns"), [(1, 16, 16), (1, 4, 4), (3, 17, 29), (2, 30, 16), (9, 16, 23), (2, 4, 90)]
)
def test_sizes_are_rounded_down_and_no_frame_is_lost(frames: int, rows: int, columns: int) -> None:
    for seed in range(4):
        bad = degrade_clip(torch.rand(frames, 3, rows, columns), seed)
        assert bad.shape == (frames, 3, rows // 4, columns // 4)
        assert 0 <= bad.min() <= bad.max() <= 1
        assert (255 * bad - (255 * bad).round()).abs().max() < 1e-4


def test_the_same_seed_gives_the_same_clip() -> None:
    good = scene(3, 33, 42)
    bad = degrade_clip(good, 7)
    assert torch.equal(bad, degrade_clip(good, 7))
    assert not torch.equal(bad, degrade_clip(good, 8))
    assert torch.equal(bad, apply(good, draw(7)))
    assert draw(7) == draw(7) != draw(8)


def test_a_generator_gives_a_seed_and_moves_on() -> None:
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    first, second = draw(generators[0]), draw(generators[0])
    assert first == draw(generators[1]) != second == draw(generators[1])
    good = scene(2, 16, 24)
    one = degrade_clip(good, torch.Generator().manual_seed(3))
    assert torch.equal(one, apply(good, first))


def test_no_global_generator_is_touched() -> None:
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    degrade_clip(scene(2, 16, 24), 5)
    degrade_clip(scene(2, 16, 24), torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(one, other) for one, other in zip(np.random.get_state(), numpy_state, strict=True))
    assert random.getstate() == python_state


@pytest.mark.parametrize("seed", range(8))
def test_everything_drawn_holds_for_all_frames(seed: int) -> None:
    """Without noise and codec, frames that are alike stay so, in both halves and whatever comes before."""
    drawn = without_noise(draw(seed, NO_CODEC))
    bad = apply(still(4), drawn)
    for frame in bad[1:]:
        assert torch.equal(frame, bad[0])
    moved = apply(torch.cat([scene()[3:5, :, :48, :64], still(2)]), drawn)
    assert torch.equal(moved[2:], bad[2:])


def test_noise_is_new_in_every_frame_and_of_one_strength() -> None:
    noise = DrawnNoise(kind="gaussian", strength=20.0, gray=True, seed=5)
    last = dataclasses.replace(plain().spatial.second, scale=1.0, noise=noise)
    gray = torch.full((4, 3, 240, 320), 0.5)
    bad = apply(gray, plain(second=last))
    strengths = [(frame - 0.5).std().item() for frame in bad]
    assert strengths == pytest.approx([20 / 255] * 4, rel=0.1)
    for one, other in itertools.combinations(bad, 2):
        assert abs(np.corrcoef(one.flatten(), other.flatten())[0, 1]) < 0.05
    assert torch.equal(apply(gray[:2], plain(second=last)), bad[:2]), "the number of frames does not matter"


def test_noise_of_both_stages_is_carried_out() -> None:
    noise = DrawnNoise(kind="poisson", strength=1.0, gray=False, seed=5)
    quiet = apply(scene(2), plain())
    for name in ("first", "second"):
        loud = apply(scene(2), plain(**{name: dataclasses.replace(plain().spatial.first, noise=noise)}))
        assert (loud - quiet).abs().mean() > 0.005


def test_without_a_codec_each_frame_is_the_picture_that_the_single_degradation_makes() -> None:
    """Of images it also undoes the reduction; here that is an area resize, which repeats pixels."""
    kernel = ShapedKernel(family="aniso", size=9, sigma=(2.0, 0.7), angle=0.4)
    for first in (True, False):
        drawn = plain(
            first=dataclasses.replace(plain().spatial.first, kernel=kernel, scale=0.7, jpeg_quality=50),
            second=dataclasses.replace(plain().spatial.first, scale=1.2, mode="bilinear", jpeg_quality=40),
            sinc=SincKernel(size=9, cutoff=1.5),
            jpeg_before_reduction=first,
        )
        bad = apply(scene(2), drawn)
        want = [picture.apply(frame, drawn.spatial)[:, ::4, ::4] for frame in scene(2)]
        torch.testing.assert_close(bad, torch.stack(want), rtol=0, atol=1e-6)


@CODECS
@pytest.mark.parametrize("place", ["first_codec", "second_codec"])
def test_a_codec_carries_faults_from_frame_to_frame(codec: str, place: str) -> None:
    """Another first frame changes the last one, which is the same; without a codec it does not."""
    good = scene()
    other = good.clone()
    other[0] = good[0].flip(-1)
    drawn = plain(**{place: DrawnCodec(name=codec, bitrate=10_000)})
    assert not torch.equal(apply(good, drawn)[-1], apply(other, drawn)[-1])
    assert torch.equal(apply(good, plain())[-1], apply(other, plain())[-1])
    assert not torch.equal(apply(good, drawn)[-1], apply(good[-1:], drawn)[0]), "nor is it the last frame alone"


@CODECS
def test_a_lower_bit_rate_does_more_harm(codec: str) -> None:
    noise = 0.1 * torch.randn(1, 1, 72, 104, generator=torch.Generator().manual_seed(0))
    clip = list((scene(8) + torch.cat([noise.roll(5 * n, -1) for n in range(8)])).clamp(0, 1))
    errors = []
    for bitrate in (3_000, 30_000, 1_000_000):
        out = torch.stack(list(recompress(clip, DrawnCodec(name=codec, bitrate=bitrate))))
        errors.append((out - torch.stack(clip)).square().mean().item())
    assert errors[0] > 1.3 * errors[1] > 1.3 * errors[2]


@CODECS
@pytest.mark.parametrize("size", [(72, 104), (71, 103), (1, 1), (2, 7)])
def test_a_codec_keeps_place_order_and_colour(codec: str, size: tuple[int, int]) -> None:
    clip = scene()[:, :, : size[0], : size[1]]
    out = torch.stack(list(recompress(clip, DrawnCodec(name=codec, bitrate=10_000_000))))
    assert out.dtype == torch.float32
    assert out.shape == clip.shape
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    assert ((out - clip) * luma).sum(1).abs().mean() < 0.01
    assert (out - clip).abs().mean() < 0.05, "colour has half the resolution"


def test_no_codec_hands_frames_on() -> None:
    clip = list(scene(2))
    assert [frame is other for frame, other in zip(recompress(clip, None), clip, strict=True)] == [True, True]


@CODECS
def test_encoding_takes_one_frame_at_a_time(codec: str) -> None:
    """Frames are asked for one by one, all of them before the first one comes back."""
    asked = []

    def clip():
        for number in range(5):
            asked.append(number)
            yield scene()[number]

    out = recompress(clip(), DrawnCodec(name=codec, bitrate=50_000))
    assert asked == []
    next(out)
    assert asked == list(range(5))


def test_both_codecs_take_their_place() -> None:
    """By hand: after the JPEG of each round, and in the second before or after the reduction."""
    one, two = DrawnCodec(name="mpeg4", bitrate=9_000), DrawnCodec(name="libx264", bitrate=4_000)
    start = [picture.jpeg(frame, 100) for frame in recompress((picture.jpeg(f, 100) for f in scene()), one)]
    second = dataclasses.replace(plain().spatial.second, scale=4.0)
    for first in (True, False):
        drawn = plain(first_codec=one, second_codec=two, second=second, jpeg_before_reduction=first)
        if first:
            want = [picture.resize(frame, (18, 26), "area") for frame in recompress(start, two)]
        else:
            small = [
                picture.resize(picture.resize(frame, (72, 104), "area"), (18, 26), "area")
                for frame in recompress((picture.jpeg(f, 100) for f in scene()), one)
            ]
            want = list(recompress((picture.jpeg(frame, 100) for frame in small), two))
        torch.testing.assert_close(apply(scene(), drawn), torch.stack(want), rtol=0, atol=0.51 / 255)


def test_inputs_are_left_alone_and_types_kept() -> None:
    good = scene(2, 24, 20).double().requires_grad_()
    kept = good.detach().clone()
    bad = degrade_clip(good, 2)
    assert bad.dtype == torch.float64
    assert not bad.requires_grad
    assert torch.equal(good, kept)
    assert torch.equal(bad.float(), degrade_clip(scene(2, 24, 20), 2))
    assert degrade_clip(scene(2, 24, 20).half(), 2).dtype == torch.float16


def test_the_defaults_are_stars() -> None:
    first, second = STAR.spatial.first, STAR.spatial.second
    assert (first.resize_range, second.resize_range) == ((0.15, 1.5), (0.3, 1.2))
    assert first.jpeg_quality == second.jpeg_quality == (30, 95)
    assert (first.blur, second.blur) == (Blur(sigma=(0.2, 3.0)), Blur(sigma=(0.2, 1.5)))
    assert (first.blur_probability, second.blur_probability) == (1.0, 0.8)
    assert (first.gaussian_sigma, first.poisson_scale) == ((1, 30), (0.05, 3))
    assert (second.gaussian_sigma, second.poisson_scale) == ((1, 25), (0.05, 2.5))
    assert (STAR.spatial.final_sinc_probability, STAR.spatial.final_scale) == (0.8, 4)
    assert (STAR.codec.bitrate, STAR.codec.probability) == ((1e4, 1e5), 1.0)


def test_codecs_are_drawn_for_each_round_with_their_probabilities() -> None:
    drawn = [draw(seed) for seed in range(600)]
    for name in ("first_codec", "second_codec"):
        codecs = [getattr(one, name) for one in drawn]
        shares = Counter(codec.name for codec in codecs)
        assert shares["libx264"] / 600 == pytest.approx(2 / 3, abs=0.06)
        assert shares["mpeg4"] == 600 - shares["libx264"]
        rates = [codec.bitrate for codec in codecs]
        assert 1e4 <= min(rates) < 1.1e4 < 9.9e4 < max(rates) <= 1e5
    assert sum(one.first_codec == one.second_codec for one in drawn) < 3
    assert len({one.spatial for one in drawn}) == 600
    half = Ranges(codec=CodecRanges(probability=0.5))
    assert sum(draw(seed, half).first_codec is None for seed in range(300)) / 300 == pytest.approx(0.5, abs=0.1)


def test_drawings_can_be_logged() -> None:
    record = dataclasses.asdict(draw(0))
    assert set(record) == {"spatial", "first_codec", "second_codec"}
    assert set(record["first_codec"]) == {"name", "bitrate"}


@pytest.mark.parametrize(
    ("frames", "seed", "message"),
    [
        (torch.zeros(3, 8, 8), 1, "of shape (3, 8, 8)"),
        (torch.zeros(2, 1, 8, 8), 1, "expected a clip of floats (frames, 3, rows, columns)"),
        (torch.zeros(0, 3, 8, 8), 1, "one frame or more"),
        (torch.zeros(2, 3, 3, 8), 1, "sides of 4 pixels or more"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 1, "got torch.uint8"),
        (torch.full((2, 3, 8, 8), -1.0), 1, "expected values in 0..1; got -1..-1"),
        (torch.full((2, 3, 8, 8), math.nan), 1, "got nan..nan"),
        (torch.zeros(2, 3, 8, 8), -1, "expected seed as a whole number from 0 on, or a torch.Generator; got -1"),
        (torch.zeros(2, 3, 8, 8), 1.5, "got 1.5"),
    ],
)
def test_wrong_clips_and_seeds_are_refused(frames: Tensor, seed: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        degrade_clip(frames, seed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bitrate": (1e5, 1e4)}, "expected bitrate"),
        ({"bitrate": (0.0, 1e4)}, "expected bitrate"),
        ({"codecs": ("mpeg4",)}, "expected probabilities as 1 shares"),
        ({"probability": 1.5}, "expected probability from 0 to 1"),
    ],
)
def test_wrong_ranges_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodecRanges(**options)


@pytest.mark.parametrize("name", ["libx999", "aac"])
def test_an_encoder_that_is_missing_is_named_before_any_work(name: str, monkeypatch) -> None:
    monkeypatch.setattr(picture, "blur", None)
    message = f"expected a video encoder of PyAV's FFmpeg; got '{name}'"
    ranges = Ranges(codec=CodecRanges(codecs=("mpeg4", name), probabilities=(1.0, 0.0)))
    with pytest.raises(ValueError, match=message):
        degrade_clip(scene(2), 0, ranges)
    with pytest.raises(ValueError, match=message):
        apply(scene(2), plain(second_codec=DrawnCodec(name=name, bitrate=10_000)))


def test_an_encoder_of_other_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="expected an encoder of yuv420p.*libx264rgb"):
        apply(scene(2), plain(first_codec=DrawnCodec(name="libx264rgb", bitrate=10_000)))


def test_without_pyav_the_extra_is_named_and_clips_without_codec_work(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'diffattn[video]'")):
        degrade_clip(scene(2), 0)
    assert degrade_clip(scene(2), 0, NO_CODEC).shape == (2, 3, 18, 26)
