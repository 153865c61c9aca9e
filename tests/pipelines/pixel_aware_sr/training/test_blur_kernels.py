"""Blur kernels against slow loops and numerical integrals, and how they are drawn."""

import math
from collections import Counter

import numpy as np
import pytest
from diffattn.pipelines.pixel_aware_sr.training.blur_kernels import (
    FAMILIES,
    SIZES,
    Blur,
    Kernel,
    ShapedKernel,
    SincKernel,
    draw_final_sinc,
    draw_kernel,
)

DRAWS = 4000
BLUR = Blur(sigma=(0.2, 3.0))


def draws(blur: Blur = BLUR, count: int = DRAWS) -> list[Kernel]:
    rng = np.random.default_rng(5)
    return [draw_kernel(rng, blur) for _ in range(count)]


def slow_shaped(kernel: ShapedKernel) -> np.ndarray:
    """Pixel by pixel, through the inverse of the covariance."""
    turn = np.array(
        [[math.cos(kernel.angle), -math.sin(kernel.angle)], [math.sin(kernel.angle), math.cos(kernel.angle)]]
    )
    inverse = np.linalg.inv(turn @ np.diag(np.square(kernel.sigma)) @ turn.T)
    out = np.zeros((kernel.size, kernel.size))
    for row in range(kernel.size):
        for column in range(kernel.size):
            point = np.array([column, row]) - kernel.size // 2
            q = float(point @ inverse @ point)
            if kernel.family in ("iso", "aniso"):
                out[row, column] = math.exp(-0.5 * q)
            elif kernel.family in ("generalised_iso", "generalised_aniso"):
                out[row, column] = math.exp(-0.5 * q**kernel.beta)
            else:
                out[row, column] = 1 / (q**kernel.beta + 1)
    return out / out.sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_shaped_kernels_are_their_formulas(family: str) -> None:
    sigma, angle = ((1.3, 2.9), 0.7) if family.endswith("aniso") else ((1.3, 1.3), 0.0)
    beta = 1.0 if family in ("iso", "aniso") else 1.7
    kernel = ShapedKernel(family=family, size=9, sigma=sigma, angle=angle, beta=beta)
    np.testing.assert_allclose(kernel.weights(), slow_shaped(kernel), rtol=0, atol=1e-14)


def test_a_kernel_is_long_in_the_direction_of_its_angle() -> None:
    weights = ShapedKernel(family="aniso", size=21, sigma=(3.0, 0.8), angle=math.pi / 4).weights()
    assert weights[13, 13] > 10 * weights[13, 7], "at 45 degrees it goes right and down"
    flat = ShapedKernel(family="aniso", size=21, sigma=(3.0, 0.8)).weights()
    assert flat[10, 14] > 10 * flat[14, 10]


def test_a_plateau_is_flat_in_the_middle_and_a_generalised_gaussian_may_be_a_box() -> None:
    plateau = ShapedKernel(family="plateau_iso", size=21, sigma=(4.0, 4.0), beta=2.0).weights()
    gaussian = ShapedKernel(family="iso", size=21, sigma=(4.0, 4.0)).weights()
    assert plateau[10, 12] / plateau[10, 10] > gaussian[10, 12] / gaussian[10, 10]
    box = ShapedKernel(family="generalised_iso", size=21, sigma=(4.0, 4.0), beta=4.0).weights()
    assert box[10, 13] > 0.9 * box[10, 10]
    assert box[10, 16] < 1e-3 * box[10, 10]


@pytest.mark.parametrize("cutoff", [math.pi / 5, 1.9, math.pi])
def test_a_sinc_is_the_average_of_the_waves_it_lets_through(cutoff: float) -> None:
    """The inverse Fourier transform of a disc of radius `cutoff`, integrated over rings and angles by midpoints."""
    frequencies = (np.arange(2000) + 0.5) / 2000 * cutoff
    angles = (np.arange(64) + 0.5) / 64 * math.pi
    want = np.zeros((7, 7))
    for row in range(7):
        for column in range(7):
            radius = math.hypot(row - 3, column - 3)
            waves = np.cos(radius * frequencies[:, None] * np.cos(angles)[None, :])
            want[row, column] = (frequencies[:, None] * waves).sum()
    np.testing.assert_allclose(SincKernel(size=7, cutoff=cutoff).weights(), want / want.sum(), rtol=0, atol=2e-6)


def test_a_large_sinc_passes_below_its_cutoff_and_stops_above() -> None:
    """Measured on the transform, for which the signs and the normalisation have to be right."""
    weights = SincKernel(size=101, cutoff=math.pi / 2).weights()
    response = np.abs(np.fft.fft2(weights))
    assert np.all(np.abs(response[:20, 0] - 1) < 0.15), "up to 0.4 of the sampling frequency over 2"
    assert np.all(response[32:50, 0] < 0.15)
    assert weights.min() < 0


def test_every_drawn_kernel_keeps_brightness_and_place() -> None:
    for kernel in draws(count=300):
        weights = kernel.weights()
        assert weights.shape == (kernel.size, kernel.size)
        assert weights.dtype == np.float64
        assert abs(weights.sum() - 1) < 1e-12
        np.testing.assert_allclose(weights, weights[::-1, ::-1], rtol=0, atol=1e-12)


def test_the_sharpest_kernel_leaves_all_as_it_is() -> None:
    weights = ShapedKernel(family="generalised_iso", size=7, sigma=(0.2, 0.2), beta=4.0).weights()
    want = np.zeros((7, 7))
    want[3, 3] = 1
    np.testing.assert_allclose(weights, want, atol=1e-12)


def test_families_come_with_their_probabilities() -> None:
    drawn = draws()
    sincs = [kernel for kernel in drawn if isinstance(kernel, SincKernel)]
    assert abs(len(sincs) / DRAWS - 0.1) < 0.02
    counts = Counter(kernel.family for kernel in drawn if isinstance(kernel, ShapedKernel))
    for family, share in zip(FAMILIES, (0.45, 0.25, 0.12, 0.03, 0.12, 0.03), strict=True):
        assert abs(counts[family] / (DRAWS - len(sincs)) - share) < 0.03, family


def test_sizes_are_odd_from_7_to_21_and_equally_likely() -> None:
    counts = Counter(kernel.size for kernel in draws())
    assert sorted(counts) == [7, 9, 11, 13, 15, 17, 19, 21] == list(SIZES)
    assert max(counts.values()) < 1.3 * min(counts.values())


def test_parameters_lie_in_their_ranges_and_fill_them() -> None:
    shaped = [kernel for kernel in draws() if isinstance(kernel, ShapedKernel)]
    sigmas = [value for kernel in shaped for value in kernel.sigma]
    assert 0.2 <= min(sigmas) < 0.3
    assert 2.9 < max(sigmas) <= 3.0
    for kernel in shaped:
        if kernel.family.endswith("aniso"):
            assert kernel.sigma[0] != kernel.sigma[1]
        else:
            assert (kernel.sigma[0], kernel.angle) == (kernel.sigma[1], 0.0)
        if kernel.family in ("iso", "aniso"):
            assert kernel.beta == 1.0
    angles = [kernel.angle for kernel in shaped if kernel.family.endswith("aniso")]
    assert -math.pi <= min(angles) < -3
    assert 3 < max(angles) <= math.pi


@pytest.mark.parametrize(("shape", "low", "high"), [("generalised", 0.5, 4.0), ("plateau", 1.0, 2.0)])
def test_half_of_the_exponents_lie_below_one(shape: str, low: float, high: float) -> None:
    betas = [kernel.beta for kernel in draws() if isinstance(kernel, ShapedKernel) and kernel.family.startswith(shape)]
    assert low <= min(betas) < low + 0.05
    assert high - 0.1 < max(betas) <= high
    assert abs(np.mean([beta <= 1 for beta in betas]) - 0.5) < 0.08


def test_small_sincs_cut_off_later() -> None:
    sincs = [kernel for kernel in draws() if isinstance(kernel, SincKernel)]
    small = [kernel.cutoff for kernel in sincs if kernel.size < 13]
    large = [kernel.cutoff for kernel in sincs if kernel.size >= 13]
    assert math.pi / 3 <= min(small) < math.pi / 3 + 0.1
    assert math.pi / 5 <= min(large) < math.pi / 5 + 0.1
    assert 3.0 < max(small + large) <= math.pi


def test_the_final_sinc_never_cuts_below_a_third_of_pi() -> None:
    rng = np.random.default_rng(2)
    cutoffs = [draw_final_sinc(rng).cutoff for _ in range(1000)]
    assert math.pi / 3 <= min(cutoffs) < math.pi / 3 + 0.05
    assert math.pi - 0.05 < max(cutoffs) <= math.pi


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": (3.0, 0.2)}, r"expected sigma .*; got \(3.0, 0.2\)"),
        ({"sigma": (0.0, 1.0)}, "expected sigma"),
        ({"sigma": (0.2, math.inf)}, "expected sigma"),
        ({"sigma": (0.2, math.nan)}, "expected sigma"),
        ({"probabilities": (0.5, 0.5)}, "expected probabilities as 6 shares"),
        ({"probabilities": (0.5, 0.6, -0.1, 0.0, 0.0, 0.0)}, "expected probabilities"),
        ({"probabilities": (0.5, 0.6, 0.0, 0.0, 0.0, 0.0)}, "sum of 1"),
        ({"sinc_probability": 10}, "expected sinc_probability from 0 to 1; got 10"),
        ({"generalised_beta": (1.5, 4.0)}, "low <= 1 <= high"),
        ({"plateau_beta": (0.5, 0.9)}, "low <= 1 <= high"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Blur(**{"sigma": (0.2, 3.0), **options})
