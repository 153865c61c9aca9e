"""Degradation: what is drawn, what every step does, and that bad images lie on good ones."""

import dataclasses
import math
import random
import re
from collections import Counter
from functools import lru_cache

import numpy as np
import pytest
import torch
from diffattn.pipelines.pixel_aware_sr.training.blur_kernels import Blur, ShapedKernel, SincKernel
from diffattn.pipelines.pixel_aware_sr.training.degrade import (
    PASD,
    Degradation,
    DrawnDegradation,
    DrawnNoise,
    DrawnStage,
    add_noise,
    apply,
    blur,
    degrade,
    draw,
    jpeg,
    resize,
)
from torch import Tensor

DRAWS = 3000
MILD = DrawnNoise(kind="gaussian", strength=0.0, gray=False, seed=0)
LIGHT = 0.299, 0.587, 0.114


@lru_cache
def scene(rows: int = 97, columns: int = 131) -> Tensor:
    """Thirty discs of random colour on a slope: edges in all directions and nothing that repeats."""
    rng = np.random.default_rng(11)
    y, x = np.mgrid[:rows, :columns] + 0.5
    picture = np.stack([x / columns, y / rows, (x + y) / (rows + columns)])
    for _ in range(30):
        middle = rng.uniform(0, (rows, columns))
        inside = np.hypot(y - middle[0], x - middle[1]) < rng.uniform(3, 14)
        picture = np.where(inside, rng.uniform(0, 1, (3, 1, 1)), picture)
    return torch.from_numpy(picture).float()


@lru_cache
def drawn_many() -> list[DrawnDegradation]:
    return [draw(seed) for seed in range(DRAWS)]


def plain(**changes: object) -> DrawnDegradation:
    """A degradation that reduces and enlarges, and otherwise does as little as can be."""
    stage = DrawnStage(kernel=None, scale=1.0, mode="area", noise=MILD, jpeg_quality=100)
    fields = {
        "first": stage,
        "second": stage,
        "jpeg_before_reduction": False,
        "reduction_mode": "area",
        "final_scale": 4,
        "sinc": None,
        "restore_mode": "bilinear",
    }
    return DrawnDegradation(**{**fields, **changes})


def shift(good: Tensor, bad: Tensor, most: int = 4) -> tuple[int, int]:
    """Rows and columns by which `bad` lies off `good`: where their mean squared difference is least."""
    inner = good[:, most:-most, most:-most]
    rows, columns = inner.shape[1:]
    places = [(row, column) for row in range(-most, most + 1) for column in range(-most, most + 1)]
    return min(
        places,
        key=lambda at: float((bad[:, most + at[0] :, most + at[1] :][:, :rows, :columns] - inner).square().mean()),
    )


def test_a_known_shift_is_measured() -> None:
    assert shift(scene(), scene().roll((3, -2), (1, 2))) == (3, -2)


@pytest.mark.parametrize("seed", range(8))
def test_bad_pictures_lie_on_good_ones(seed: int) -> None:
    good = scene()
    bad = degrade(good, seed=seed)
    row, column = shift(good, bad)
    assert max(abs(row), abs(column)) <= 1
    error = (bad - good).square().mean()
    for flipped in (bad.flip(-1), bad.flip(-2)):
        assert error < 0.5 * (flipped - good).square().mean(), "not a mirror image"


@pytest.mark.parametrize("scale", [0.3, 0.337, 0.71, 1.0, 1.47])
@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
def test_resizes_move_no_corner(scale: float, mode: str) -> None:
    """Four blots near the corners stay where they were; 0.3 of 103 x 149 is just short of whole pixels."""
    y, x = torch.meshgrid(torch.arange(103.0), torch.arange(149.0), indexing="ij")
    places = [(row, column) for row in (14.0, 88.0) for column in (14.0, 134.0)]
    good = sum(torch.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * 4.0**2)) for row, column in places)
    first = dataclasses.replace(plain().first, scale=scale, mode=mode)
    bad = apply(good.expand(3, -1, -1), plain(first=first))[0]
    for row, column in places:
        near = ((y - row).abs() < 14) & ((x - column).abs() < 14)
        weights = bad * near
        off = (weights * y).sum() / weights.sum() - row, (weights * x).sum() / weights.sum() - column
        # Uneven ratios make "area" average over now 3, now 4 pixels.
        assert max(map(abs, off)) < 0.7


@pytest.mark.parametrize("size", [(4, 4), (5, 31), (33, 7), (64, 48)])
def test_any_size_comes_back(size: tuple[int, int]) -> None:
    for seed in range(6):
        bad = degrade(scene(*size), seed=seed)
        assert bad.shape == (3, *size)
        assert bad.dtype == torch.float32
        levels = 255 * bad
        assert 0 <= levels.min() <= levels.max() <= 255
        assert (levels - levels.round()).abs().max() < 1e-4


def test_one_pixel_needs_a_final_scale_of_one() -> None:
    pixel = torch.full((3, 1, 1), 0.5)
    with pytest.raises(ValueError, match="sides of 4 pixels or more"):
        degrade(pixel, seed=0)
    assert degrade(pixel, seed=0, config=Degradation(final_scale=1)).shape == (3, 1, 1)


def test_a_seed_gives_the_same_bytes_whatever_the_global_generators_did() -> None:
    once = degrade(scene(), seed=3)
    torch.rand(5)
    np.random.rand(5)
    random.random()
    assert torch.equal(degrade(scene(), seed=3), once)
    assert not torch.equal(degrade(scene(), seed=4), once)


def test_global_generators_are_left_alone() -> None:
    torch_state, (_, words, place, *_), python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    degrade(scene(24, 20), seed=1)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], words)
    assert np.random.get_state()[2] == place
    assert random.getstate() == python_state


def test_a_picture_of_a_batch_depends_on_its_own_seed_alone() -> None:
    batch = torch.stack([scene(41, 38), scene(41, 38).flip(-1), scene(41, 38)])
    bad = degrade(batch, seed=[7, 8, 9])
    assert bad.shape == batch.shape
    for number, seed in enumerate((7, 8, 9)):
        assert torch.equal(bad[number], degrade(batch[number], seed=seed))
    assert torch.equal(degrade(batch[1:2], seed=[8])[0], bad[1])


def test_inputs_are_left_alone_and_types_kept() -> None:
    good = scene(24, 20).double().requires_grad_()
    kept = good.detach().clone()
    bad = degrade(good, seed=2)
    assert bad.dtype == torch.float64
    assert not bad.requires_grad
    assert torch.equal(good, kept)
    assert torch.equal(bad.float(), degrade(scene(24, 20), seed=2))


def test_degrade_is_draw_and_apply() -> None:
    assert draw(5) == draw(5) != draw(6)
    assert torch.equal(degrade(scene(), seed=5), apply(scene(), draw(5)))


def test_drawings_can_be_logged() -> None:
    record = dataclasses.asdict(draw(0))
    assert {"first", "second", "sinc", "final_scale", "restore_mode"} <= set(record)
    assert set(record["first"]) == {"kernel", "scale", "mode", "noise", "jpeg_quality"}
    assert record["first"]["noise"]["kind"] in ("gaussian", "poisson")


def test_the_defaults_are_pasds() -> None:
    """Every number, as its training configuration has them."""
    first, second = PASD.first, PASD.second
    assert (first.blur, first.blur_probability) == (Blur(sigma=(0.2, 3.0)), 1.0)
    assert (second.blur, second.blur_probability) == (Blur(sigma=(0.2, 1.5)), 0.5)
    assert (first.resize_probabilities, first.resize_range) == ((0.2, 0.7, 0.1), (0.3, 1.5))
    assert (second.resize_probabilities, second.resize_range) == ((0.3, 0.4, 0.3), (0.6, 1.2))
    assert (first.gaussian_sigma, first.poisson_scale, first.jpeg_quality) == ((1, 15), (0.05, 2), (60, 95))
    assert (second.gaussian_sigma, second.poisson_scale, second.jpeg_quality) == ((1, 12), (0.05, 1), (60, 100))
    for stage in (first, second):
        assert (stage.gaussian_probability, stage.gray_probability) == (0.5, 0.4)
    assert (PASD.final_sinc_probability, PASD.final_scale) == (0.8, 4)


@pytest.mark.parametrize("stage", ["first", "second"])
def test_parameters_fill_their_ranges(stage: str) -> None:
    config = getattr(PASD, stage)
    drawn = [getattr(one, stage) for one in drawn_many()]
    for kind, span in (("gaussian", config.gaussian_sigma), ("poisson", config.poisson_scale)):
        strengths = [one.noise.strength for one in drawn if one.noise.kind == kind]
        slack = 0.01 * (span[1] - span[0])
        assert span[0] <= min(strengths) < span[0] + slack
        assert span[1] - slack < max(strengths) <= span[1]
    scales = [one.scale for one in drawn]
    assert config.resize_range[0] <= min(scales) < config.resize_range[0] + 0.01
    assert config.resize_range[1] - 0.01 < max(scales) <= config.resize_range[1]
    low, high = config.jpeg_quality
    assert {one.jpeg_quality for one in drawn} == set(range(low, high + 1))


@pytest.mark.parametrize("stage", ["first", "second"])
def test_choices_come_with_their_probabilities(stage: str) -> None:
    config = getattr(PASD, stage)
    drawn = [getattr(one, stage) for one in drawn_many()]
    ways = Counter(int(np.sign(one.scale - 1)) for one in drawn)
    shares = {
        "up": (ways[1], config.resize_probabilities[0]),
        "down": (ways[-1], config.resize_probabilities[1]),
        "keep": (ways[0], config.resize_probabilities[2]),
        "blur": (sum(one.kernel is not None for one in drawn), config.blur_probability),
        "gaussian": (sum(one.noise.kind == "gaussian" for one in drawn), 0.5),
        "gray": (sum(one.noise.gray for one in drawn), 0.4),
        **{mode: (sum(one.mode == mode for one in drawn), 1 / 3) for mode in ("area", "bilinear", "bicubic")},
    }
    for name, (count, share) in shares.items():
        assert abs(count / DRAWS - share) < 0.03, name
    assert len({one.noise.seed for one in drawn}) == DRAWS


def test_the_end_comes_with_its_probabilities() -> None:
    drawn = drawn_many()
    assert abs(np.mean([one.sinc is not None for one in drawn]) - 0.8) < 0.03
    assert abs(np.mean([one.jpeg_before_reduction for one in drawn]) - 0.5) < 0.03
    for name in ("reduction_mode", "restore_mode"):
        counts = Counter(getattr(one, name) for one in drawn)
        assert all(abs(counts[mode] / DRAWS - 1 / 3) < 0.03 for mode in ("area", "bilinear", "bicubic"))
    assert {one.final_scale for one in drawn} == {4}


def test_blur_is_a_sum_over_the_mirrored_neighbourhood() -> None:
    picture = torch.rand(3, 11, 8)
    kernel = ShapedKernel(family="aniso", size=7, sigma=(2.0, 0.7), angle=0.4)
    weights, plane = kernel.weights(), picture[1].double().numpy()
    want = np.zeros((11, 8))
    for row in range(11):
        for column in range(8):
            for down in range(-3, 4):
                for along in range(-3, 4):
                    y, x = 10 - abs(10 - abs(row + down)), 7 - abs(7 - abs(column + along))
                    want[row, column] += weights[down + 3, along + 3] * plane[y, x]
    np.testing.assert_allclose(blur(picture, kernel)[1].numpy(), want, atol=1e-6)


def test_blur_keeps_one_colour_even_where_the_kernel_is_larger_than_the_picture() -> None:
    for kernel in (SincKernel(size=21, cutoff=1.2), ShapedKernel(family="plateau_iso", size=21, sigma=(3.0, 3.0))):
        for size in ((1, 1), (2, 5), (30, 3)):
            np.testing.assert_allclose(blur(torch.full((3, *size), 0.3), kernel).numpy(), 0.3, atol=1e-6)


def test_sizes_are_rounded_down_to_one_pixel_at_least() -> None:
    assert resize(scene(9, 7), (4.9, 0.3), "bilinear").shape == (3, 4, 1)


@pytest.mark.parametrize("gray", [False, True])
def test_gaussian_noise_has_its_strength(gray: bool) -> None:
    picture = torch.full((3, 80, 90), 0.5)
    added = add_noise(picture, DrawnNoise(kind="gaussian", strength=12.0, gray=gray, seed=1)) - picture
    assert added.std().item() == pytest.approx(12 / 255, rel=0.03)
    assert abs(added.mean().item()) < 2e-3
    assert torch.equal(added[0], added[1]) == gray
    correlation = np.corrcoef(added[0].ravel(), added[2].ravel())[0, 1]
    assert correlation > 0.99 if gray else abs(correlation) < 0.05


@pytest.mark.parametrize("gray", [False, True])
def test_poisson_noise_grows_with_the_root_of_light(gray: bool) -> None:
    """On a ramp of 256 levels at strength s the deviation is s sqrt(level / 256), below where it is clipped."""
    ramp = (torch.arange(256.0) / 255)[None, None].expand(3, 400, 256)
    strength = 0.7
    added = add_noise(ramp, DrawnNoise(kind="poisson", strength=strength, gray=gray, seed=4)) - ramp
    for level in (30, 90, 190):
        near = added[:, :, level - 5 : level + 6]
        assert near.std().item() == pytest.approx(strength * math.sqrt(level / 255 / 256), rel=0.06)
        assert abs(near.mean().item()) < 2e-3
    assert torch.allclose(added[0, :, 50:190], added[1, :, 50:190], atol=1e-6) == gray


def test_gray_poisson_noise_follows_the_luma() -> None:
    """Green counts for more light than blue: the noise on it is stronger, in the ratio of the roots."""
    noises = []
    for channel in (1, 2):
        picture = torch.zeros(3, 120, 130)
        picture[channel] = 0.8
        picture[:, :, :40] = torch.linspace(0, 1, 256)[: 40 * 120 // 24].repeat(24).view(120, 40)
        noise = DrawnNoise(kind="poisson", strength=0.5, gray=True, seed=3)
        noises.append((add_noise(picture, noise) - picture)[channel, :, 40:].std().item())
    assert noises[0] / noises[1] == pytest.approx(math.sqrt(LIGHT[1] / LIGHT[2]), rel=0.06)


def test_levels_of_poisson_noise_are_counted_in_the_picture() -> None:
    """Three values make four levels: the noise of a pixel is a multiple of a quarter, less the pixel."""
    picture = torch.tensor([0.0, 51 / 255, 204 / 255]).repeat(3, 20, 10)
    got = add_noise(picture, DrawnNoise(kind="poisson", strength=0.5, gray=False, seed=0))
    inner = (got > 0) & (got < 1)
    counts = 4 * (2 * (got - picture) + picture)
    assert (counts - counts.round())[inner].abs().max() < 1e-4
    assert len(counts[inner].round().unique()) > 3


def test_poisson_noise_leaves_what_lies_between_two_gray_levels() -> None:
    """Light is counted in 8 bit, but the noise is added to the image as it was: at strength 0 it is unchanged."""
    picture = torch.rand(3, 6, 7)
    still = add_noise(picture, DrawnNoise(kind="poisson", strength=0.0, gray=False, seed=0))
    assert torch.equal(still, picture)
    between = torch.full((3, 60, 70), 0.5 + 0.3 / 255)
    between[:, 0] = torch.linspace(0, 1, 70)
    noise = DrawnNoise(kind="poisson", strength=0.01, gray=False, seed=0)
    # 70 values make 128 levels; 128 / 255 is the gray level below.
    counts = (((add_noise(between, noise) - between) / 0.01 + 128 / 255) * 128)[:, 1:]
    assert (counts - counts.round()).abs().max() < 0.01


def test_noise_is_clipped_and_its_seed_is_all() -> None:
    picture = scene(20, 24)
    noise = DrawnNoise(kind="poisson", strength=2.0, gray=False, seed=9)
    got = add_noise(picture, noise)
    assert 0 <= got.min() <= got.max() <= 1
    assert torch.equal(got, add_noise(picture, noise))
    assert not torch.equal(got, add_noise(picture, dataclasses.replace(noise, seed=10)))


def test_overshoots_before_poisson_noise_are_cut() -> None:
    got = add_noise(torch.full((3, 4, 5), -0.2), DrawnNoise(kind="poisson", strength=1.0, gray=False, seed=0))
    assert torch.equal(got, torch.zeros(3, 4, 5))


def test_jpeg_gets_worse_with_less_quality_and_keeps_place_and_channels() -> None:
    good = scene()
    errors = [(jpeg(good, quality) - good).square().mean().item() for quality in (95, 80, 60, 20)]
    assert errors == sorted(errors)
    assert 1e-6 < errors[0] < errors[-1] < 0.02
    channels = [(jpeg(good, 60)[channel] - good[channel]).square().mean() for channel in range(3)]
    assert max(channels) < 0.02, "red is red and blue is blue"
    assert jpeg(good[:, :1, :1], 60).shape == (3, 1, 1)


def test_jpeg_halves_the_resolution_of_colour_alone() -> None:
    stripes = torch.zeros(3, 32, 32)
    stripes[0, :, ::2] = stripes[2, :, 1::2] = 1.0
    assert (jpeg(stripes, 100) - stripes).abs().mean() > 0.2
    gray = stripes[0].expand(3, -1, -1)
    assert (jpeg(gray, 100) - gray).abs().mean() < 0.02


def test_both_orders_of_the_end_are_carried_out() -> None:
    """By hand, in a case without blur and noise whose second stage leaves 36 x 49 of 97 x 131 pixels."""
    sinc = SincKernel(size=9, cutoff=1.5)
    second = dataclasses.replace(plain().second, jpeg_quality=10, scale=1.5)
    start = resize(jpeg(scene(), 100), (36, 49), "area")
    hands = {
        True: blur(resize(jpeg(start, 10), (24, 32), "area"), sinc),
        False: jpeg(blur(resize(start, (24, 32), "area"), sinc), 10),
    }
    for first, small in hands.items():
        got = apply(scene(), plain(second=second, sinc=sinc, jpeg_before_reduction=first))
        want = resize(small, (97, 131), "bilinear").clamp(0, 1)
        assert (got - want).abs().max() < 0.51 / 255
    assert (hands[True] - hands[False]).abs().mean() > 0.01


def test_the_sinc_is_the_last_filter_of_the_small_picture() -> None:
    """Around an edge the ideal low-pass filter overshoots."""
    edge = torch.full((3, 80, 80), 0.3)
    edge[:, :, 40:] = 0.7
    sharp = apply(edge, plain())
    ringing = apply(edge, plain(sinc=SincKernel(size=21, cutoff=1.1)))
    assert sharp.max() < 0.72
    assert ringing.max() > 0.72
    assert ringing.min() < 0.28


def test_little_harm_leaves_a_little_smaller_picture() -> None:
    smooth = resize(scene(12, 15), (96, 120), "bicubic").clamp(0, 1)
    assert (apply(smooth, plain()) - smooth).abs().mean() < 0.02
    assert (degrade(smooth, seed=1) - smooth).abs().mean() > 0.01


@pytest.mark.parametrize(
    ("pictures", "seed", "message"),
    [
        (torch.zeros(3, 8, 8), [1], "give each image of a batch a seed of its own"),
        (torch.zeros(2, 3, 8, 8), 1, "with a sequence of them; got shape (2, 3, 8, 8) with 1"),
        (torch.zeros(2, 3, 8, 8), [1], "expected a seed for each of 2 images"),
        (torch.zeros(0, 3, 8, 8), [], "at least one"),
        (torch.zeros(8, 8), 1, "expected (3, rows, columns) with one seed"),
        (torch.zeros(3, 8, 8), -1, "whole numbers from 0 on; got [-1]"),
        (torch.zeros(3, 8, 8), 1.5, "whole numbers from 0 on"),
        (torch.zeros(1, 8, 8), 1, "of shape (1, 8, 8)"),
        (torch.zeros(3, 3, 8), 1, "sides of 4 pixels or more"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), 1, "got torch.uint8"),
        (torch.full((3, 8, 8), -1.0), 1, "expected values in 0..1; got -1..-1"),
        (torch.full((3, 8, 8), 255.0), 1, "expected values in 0..1"),
        (torch.full((3, 8, 8), math.nan), 1, "expected values in 0..1; got nan..nan"),
    ],
)
def test_wrong_pictures_and_seeds_are_refused(pictures: Tensor, seed: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        degrade(pictures, seed=seed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize_range": (1.1, 1.5)}, "expected resize_range with low <= 1 <= high"),
        ({"resize_probabilities": (0.5, 0.5)}, "expected resize_probabilities as 3 shares"),
        ({"jpeg_quality": (0, 95)}, "expected jpeg_quality"),
        ({"jpeg_quality": (60, 101)}, "expected jpeg_quality"),
        ({"gaussian_sigma": (-1.0, 2.0)}, "expected gaussian_sigma"),
        ({"poisson_scale": (2.0, 1.0)}, "expected poisson_scale"),
        ({"gray_probability": 1.2}, "expected gray_probability from 0 to 1"),
    ],
)
def test_wrong_stages_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PASD.first, **options)


def test_wrong_ends_are_refused() -> None:
    for options in ({"final_scale": 0}, {"final_scale": 2.5}, {"final_sinc_probability": -0.1}):
        with pytest.raises(ValueError, match="expected final_s"):
            Degradation(**options)
