"""Blur kernels of random shape, as real lenses, motion and resampling leave them.

With x in pixels from the kernel's middle, Sigma = R(angle) diag(sigma_x^2, sigma_y^2) R(angle)^T, q = x^T Sigma^-1 x:

    gaussian       k = exp(-q / 2)
    generalised    k = exp(-q^beta / 2)
    plateau        k = 1 / (1 + q^beta)
    sinc           k = cutoff J_1(cutoff r) / (2 pi r),    r = |x|,  k(0) = cutoff^2 / (4 pi)

each divided by its sum. The first three come isotropic (sigma_x = sigma_y, angle 0) and anisotropic: six families. The
sinc is the ideal circular low-pass filter, cut off at the kernel's edge; it rings and overshoots.

Source: Wang, Xie, Dong, Shan, Real-ESRGAN, 2021, https://arxiv.org/abs/2107.10833, sections 3.1 and 3.3; Liu et al.,
Estimating generalized Gaussian blur kernels for out-of-focus image deblurring, 2020.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

FAMILIES = ("iso", "aniso", "generalised_iso", "generalised_aniso", "plateau_iso", "plateau_aniso")
"""Isotropic and anisotropic of each shape; the first two are Gaussian."""

SIZES = (7, 9, 11, 13, 15, 17, 19, 21)
"""Sides of a kernel in pixels, each as likely as the others."""

Span = tuple[float, float]
"""Lowest and highest value of a uniform distribution."""


@dataclass(frozen=True, kw_only=True)
class ShapedKernel:
    """A kernel of one of the six families."""

    family: str
    size: int
    """Side in pixels, odd."""
    sigma: Span
    """Standard deviation along x and y before rotation, in pixels; a radius for the plateau."""
    angle: float = 0.0
    """Rotation in radians, of the x axis towards the y axis, which points down."""
    beta: float = 1.0
    """Exponent; 1 makes the generalised Gaussian the Gaussian."""

    def weights(self) -> np.ndarray:
        """Weights in float64, (size, size), with a sum of 1."""
        x, y = _offsets(self.size)
        along = (x * math.cos(self.angle) + y * math.sin(self.angle)) / self.sigma[0]
        across = (y * math.cos(self.angle) - x * math.sin(self.angle)) / self.sigma[1]
        power = (along**2 + across**2) ** self.beta
        kernel: np.ndarray = 1 / (1 + power) if self.family.startswith("plateau") else np.exp(-power / 2)
        return kernel / kernel.sum()


@dataclass(frozen=True, kw_only=True)
class SincKernel:
    """A circular low-pass filter."""

    size: int
    """Side in pixels, odd."""
    cutoff: float
    """Lowest frequency taken away, in radians per pixel; pi is the highest of the grid along an axis."""

    def weights(self) -> np.ndarray:
        """Weights in float64, (size, size), with a sum of 1; some are negative."""
        radius = np.hypot(*_offsets(self.size))
        middle = self.size // 2
        radius[middle, middle] = 1.0
        kernel = self.cutoff * torch.special.bessel_j1(torch.from_numpy(self.cutoff * radius)).numpy()
        kernel /= 2 * math.pi * radius
        kernel[middle, middle] = self.cutoff**2 / (4 * math.pi)
        return kernel / kernel.sum()


Kernel = ShapedKernel | SincKernel


@dataclass(frozen=True, kw_only=True)
class Blur:
    """How kernels are drawn; the defaults are PASD's, as Real-ESRGAN's."""

    sigma: Span
    """In pixels, along each axis."""
    probabilities: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    """Of `FAMILIES`, where it is no sinc."""
    sinc_probability: float = 0.1
    generalised_beta: Span = (0.5, 4.0)
    """Half of the exponents lie below 1 and half above, each half uniform; as for the plateau."""
    plateau_beta: Span = (1.0, 2.0)

    def __post_init__(self) -> None:
        check_span("sigma", self.sigma, least=1e-3)
        check_probabilities("probabilities", self.probabilities, len(FAMILIES))
        check_probability("sinc_probability", self.sinc_probability)
        for name in ("generalised_beta", "plateau_beta"):
            check_span(name, getattr(self, name), least=1e-3)
            check_around_one(name, getattr(self, name))


def draw_kernel(rng: np.random.Generator, blur: Blur) -> Kernel:
    """A kernel for one stage of blur."""
    size = draw_size(rng)
    if rng.uniform() < blur.sinc_probability:
        return SincKernel(size=size, cutoff=rng.uniform(math.pi / (3 if size < 13 else 5), math.pi))
    family = FAMILIES[rng.choice(len(FAMILIES), p=blur.probabilities)]
    sigma = rng.uniform(*blur.sigma)
    across, angle, beta = sigma, 0.0, 1.0
    if family.endswith("aniso"):
        across, angle = rng.uniform(*blur.sigma), rng.uniform(-math.pi, math.pi)
    if family.startswith("generalised"):
        beta = _draw_beta(rng, blur.generalised_beta)
    elif family.startswith("plateau"):
        beta = _draw_beta(rng, blur.plateau_beta)
    return ShapedKernel(family=family, size=size, sigma=(sigma, across), angle=angle, beta=beta)


def draw_final_sinc(rng: np.random.Generator) -> SincKernel:
    """The last filter, which stands for the ringing of sharpened and recompressed images."""
    return SincKernel(size=draw_size(rng), cutoff=rng.uniform(math.pi / 3, math.pi))


def draw_size(rng: np.random.Generator) -> int:
    """One of `SIZES`."""
    return SIZES[rng.integers(len(SIZES))]


def check_span(name: str, span: Span, *, least: float = 0.0, most: float = math.inf) -> None:
    """Raise `ValueError` unless least <= low <= high <= most, all finite."""
    if len(span) != 2 or not least <= span[0] <= span[1] <= most or not math.isfinite(span[1]):
        raise ValueError(
            f"expected {name} as (low, high) with {least} <= low <= high <= {most}; got {span!r}; put the lower first"
        )


def check_around_one(name: str, span: Span) -> None:
    """Raise `ValueError` unless a span holds 1, from which it is drawn either way."""
    if not span[0] <= 1 <= span[1]:
        raise ValueError(f"expected {name} with low <= 1 <= high; got {span!r}; widen it up to 1")


def check_probability(name: str, value: float) -> None:
    """Raise `ValueError` unless a number lies in 0..1."""
    if not 0 <= value <= 1:
        raise ValueError(f"expected {name} from 0 to 1; got {value!r}; give a share, not a percentage")


def check_probabilities(name: str, values: tuple[float, ...], count: int) -> None:
    """Raise `ValueError` unless there are `count` probabilities with a sum of 1."""
    if (
        len(values) != count
        or not all(value >= 0 for value in values)
        or not math.isclose(sum(values), 1, abs_tol=1e-9)
    ):
        raise ValueError(f"expected {name} as {count} shares with a sum of 1; got {values!r}; divide them by their sum")


def _draw_beta(rng: np.random.Generator, span: Span) -> float:
    return rng.uniform(span[0], 1) if rng.uniform() < 0.5 else rng.uniform(1, span[1])


def _offsets(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of each pixel from the middle, (size, size) each."""
    pixels = np.arange(size) - size // 2
    columns, rows = np.meshgrid(pixels, pixels)
    return columns.astype(np.float64), rows.astype(np.float64)
