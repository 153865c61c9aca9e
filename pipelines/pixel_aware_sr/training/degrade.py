"""Bad images from good ones, for training: two rounds of blur, resize, noise and JPEG, each of random strength.

    first     blur, resize, noise, JPEG
    second    blur (with a probability), resize, noise
    last      resize to 1 / final_scale and sinc, JPEG; or JPEG, resize and sinc
    restore   resize to the size at the start, round to 8 bit

`draw` settles everything by a seed, `apply` carries it out, `degrade` does both. A bad image lies on its good one
pixel by pixel: nothing is flipped, cropped or shifted, so that the caller augments before.

Source: Wang, Xie, Dong, Shan, Real-ESRGAN, 2021, https://arxiv.org/abs/2107.10833, section 3, with the parameters of
PASD's released training (https://arxiv.org/abs/2308.14469).
Resizing is without antialiasing there and here: aliases are part of what is learnt to be taken away.
Differences to Real-ESRGAN: a resize maps edges on edges, where it rounds the size but not the ratio, and so moves the
right and the lower edge by up to three pixels; JPEG is libjpeg's with 4:2:0 chroma and whole qualities, in place of a
differentiable approximation; parameters belong to one image, not to a batch. As in PASD, good images are not
sharpened.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .blur_kernels import (
    Blur,
    Kernel,
    SincKernel,
    Span,
    check_around_one,
    check_probabilities,
    check_probability,
    check_span,
    draw_final_sinc,
    draw_kernel,
)

Mode = Literal["area", "bilinear", "bicubic"]
MODES: tuple[Mode, ...] = ("area", "bilinear", "bicubic")
"""Resizes, as likely as each other; "area" is the mean over the pixels covered, and repeats them when it enlarges."""

_LUMA = torch.tensor([0.299, 0.587, 0.114])[:, None, None]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One round of degradation: what is drawn, uniformly within spans."""

    blur: Blur
    blur_probability: float = 1.0
    resize_probabilities: tuple[float, ...]
    """Of enlarging, of reducing, and of keeping the size."""
    resize_range: Span
    """Smallest and largest factor of a side; 1 lies between."""
    gaussian_probability: float = 0.5
    """Of Gaussian noise; otherwise it is Poisson noise."""
    gaussian_sigma: Span
    """Standard deviation on the scale of 0..255."""
    poisson_scale: Span
    """Factor of the shot noise; at 1 a pixel of gray level g (of 0..255) counts about g photons."""
    gray_probability: float = 0.4
    """Of the same noise in all three channels."""
    jpeg_quality: tuple[int, int]
    """Lowest and highest, both included, 1..100."""

    def __post_init__(self) -> None:
        for name in ("blur_probability", "gaussian_probability", "gray_probability"):
            check_probability(name, getattr(self, name))
        check_probabilities("resize_probabilities", self.resize_probabilities, 3)
        check_span("resize_range", self.resize_range, least=1e-3)
        check_around_one("resize_range", self.resize_range)
        check_span("gaussian_sigma", self.gaussian_sigma)
        check_span("poisson_scale", self.poisson_scale)
        check_span("jpeg_quality", self.jpeg_quality, least=1, most=100)


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """Both rounds and the end; the defaults are PASD's, with less noise and JPEG than Real-ESRGAN's."""

    first: Stage = Stage(
        blur=Blur(sigma=(0.2, 3.0)),
        resize_probabilities=(0.2, 0.7, 0.1),
        resize_range=(0.3, 1.5),
        gaussian_sigma=(1.0, 15.0),
        poisson_scale=(0.05, 2.0),
        jpeg_quality=(60, 95),
    )
    second: Stage = Stage(
        blur=Blur(sigma=(0.2, 1.5)),
        blur_probability=0.5,
        resize_probabilities=(0.3, 0.4, 0.3),
        resize_range=(0.6, 1.2),
        gaussian_sigma=(1.0, 12.0),
        poisson_scale=(0.05, 1.0),
        jpeg_quality=(60, 100),
    )
    """Its factors of resize are relative to 1 / final_scale of the good image, whatever the first did."""
    final_sinc_probability: float = 0.8
    final_scale: int = 4
    """How many times smaller than the good image the bad one is before it is restored."""

    def __post_init__(self) -> None:
        check_probability("final_sinc_probability", self.final_sinc_probability)
        if not isinstance(self.final_scale, int) or self.final_scale < 1:
            raise ValueError(f"expected final_scale as a whole number from 1 on; got {self.final_scale!r}; PASD has 4")


PASD = Degradation()


@dataclass(frozen=True, kw_only=True)
class DrawnNoise:
    """Noise down to its random numbers."""

    kind: Literal["gaussian", "poisson"]
    strength: float
    """`Stage.gaussian_sigma` or `Stage.poisson_scale`."""
    gray: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class DrawnStage:
    """One round, settled."""

    kernel: Kernel | None
    """None: no blur."""
    scale: float
    mode: Mode
    noise: DrawnNoise
    jpeg_quality: int


@dataclass(frozen=True, kw_only=True)
class DrawnDegradation:
    """All that happens to one image; `dataclasses.asdict` makes it a log."""

    first: DrawnStage
    second: DrawnStage
    """Its JPEG comes before or after the last reduction."""
    jpeg_before_reduction: bool
    reduction_mode: Mode
    final_scale: int
    sinc: SincKernel | None
    """None: no sinc."""
    restore_mode: Mode


def degrade(pictures: Tensor, *, seed: int | Sequence[int], config: Degradation = PASD) -> Tensor:
    """Degrade an image or a batch; the same seed gives the same bytes, whatever else is in the batch.

    Args:
        pictures: values in 0..1, (3, rows, columns) or (batch, 3, rows, columns), both sides at least `final_scale`.
        seed: from 0 on; one for an image, as many as there are images for a batch.
        config: what to draw from.

    Returns:
        Multiples of 1/255, of the shape, dtype and device of `pictures`; computed in float32 on the CPU.

    Raises:
        ValueError: another shape or range, an image too small, or seeds that do not match.
    """
    seeds = list(seed) if isinstance(seed, Sequence) else [seed]
    if pictures.ndim not in (3, 4) or isinstance(seed, Sequence) != (pictures.ndim == 4):
        raise ValueError(
            "expected (3, rows, columns) with one seed, or (batch, 3, rows, columns) with a sequence of them; got "
            f"shape {tuple(pictures.shape)} with {seed!r}; give each image of a batch a seed of its own"
        )
    batch = pictures.detach().reshape(-1, *pictures.shape[-3:])
    if len(batch) != len(seeds) or not seeds:
        raise ValueError(f"expected a seed for each of {len(batch)} images, at least one; got {seeds}")
    if not all(isinstance(one, Integral) and one >= 0 for one in seeds):
        raise ValueError(f"expected seeds as whole numbers from 0 on; got {seeds}; take them modulo 2**63")
    for picture in batch:
        _check_picture(picture, config.final_scale)
    bad = torch.stack([apply(picture, draw(one, config)) for picture, one in zip(batch, seeds, strict=True)])
    return bad.reshape(pictures.shape)


def draw(seed: int, config: Degradation = PASD) -> DrawnDegradation:
    """Settle a degradation by a seed; it fits images of any size."""
    rng = np.random.default_rng(seed)
    return DrawnDegradation(
        first=_draw_stage(rng, config.first),
        second=_draw_stage(rng, config.second),
        jpeg_before_reduction=bool(rng.uniform() < 0.5),
        reduction_mode=_draw_mode(rng),
        final_scale=config.final_scale,
        sinc=draw_final_sinc(rng) if rng.uniform() < config.final_sinc_probability else None,
        restore_mode=_draw_mode(rng),
    )


def apply(picture: Tensor, drawn: DrawnDegradation) -> Tensor:
    """Carry a degradation out on one image (3, rows, columns) with values in 0..1; returns as `degrade`."""
    picture = picture.detach()
    _check_picture(picture, drawn.final_scale)
    size = picture.shape[-2:]
    small = [side // drawn.final_scale for side in size]
    out = picture.to("cpu", torch.float32)
    out = _run_stage(out, drawn.first, [side * drawn.first.scale for side in size])
    out = jpeg(out, drawn.first.jpeg_quality)
    out = _run_stage(out, drawn.second, [side / drawn.final_scale * drawn.second.scale for side in size])
    if drawn.jpeg_before_reduction:
        out = jpeg(out, drawn.second.jpeg_quality)
    out = blur(resize(out, small, drawn.reduction_mode), drawn.sinc)
    if not drawn.jpeg_before_reduction:
        out = jpeg(out, drawn.second.jpeg_quality)
    return quantise(resize(out, size, drawn.restore_mode)).to(picture)


def blur(picture: Tensor, kernel: Kernel | None) -> Tensor:
    """Filter each channel; beyond the edges the image goes on as its mirror image."""
    if kernel is None:
        return picture
    reach = kernel.size // 2
    # numpy's mirror goes on for as long as it takes; torch's ends at the size of the image.
    padded = torch.from_numpy(np.pad(picture.numpy(), ((0, 0), (reach, reach), (reach, reach)), mode="reflect"))
    return F.conv2d(padded[:, None], torch.from_numpy(kernel.weights()).float()[None, None])[:, 0]


def resize(picture: Tensor, size: Sequence[float], mode: Mode) -> Tensor:
    """Resize to (rows, columns), rounded down but at least 1; outer edges stay on outer edges."""
    whole = [max(1, math.floor(side)) for side in size]
    return F.interpolate(picture[None], size=whole, mode=mode)[0]


def add_noise(picture: Tensor, noise: DrawnNoise) -> Tensor:
    """Add noise and clip to 0..1.

    gaussian    x + strength / 255 * n,    n unit normal
    poisson     x + strength * (P(levels * q) / levels - q),    q = x in 8 bit,    P Poisson,
                levels = 2^ceil(log2(number of values in q))

    With `gray`, all channels get the same noise: one n, or the Poisson noise of the luma 0.299 R + 0.587 G + 0.114 B.
    An image of one value has a single level, and Poisson noise as strong as itself, as in Real-ESRGAN.
    """
    rng = np.random.default_rng(noise.seed)
    source = (_LUMA * picture).sum(0, keepdim=True) if noise.gray else picture
    if noise.kind == "gaussian":
        added = noise.strength / 255 * torch.from_numpy(rng.standard_normal(source.shape, dtype=np.float32))
    else:
        light = quantise(source)
        levels = 2 ** math.ceil(math.log2(len(light.unique())))
        counts = torch.from_numpy(rng.poisson((levels * light).double().numpy())).float()
        added = noise.strength * (counts / levels - light)
    return (picture + added).clamp(0, 1)


def jpeg(picture: Tensor, quality: int) -> Tensor:
    """What is left of an image after compression with 4:2:0 chroma."""
    file = io.BytesIO()
    pixels = (255 * quantise(picture)).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, format="JPEG", quality=quality, subsampling="4:2:0")
    with Image.open(file) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def quantise(picture: Tensor) -> Tensor:
    """Round to multiples of 1/255 in 0..1."""
    return (255 * picture).round().clamp(0, 255) / 255


def _run_stage(picture: Tensor, stage: DrawnStage, size: Sequence[float]) -> Tensor:
    return add_noise(resize(blur(picture, stage.kernel), size, stage.mode), stage.noise)


def _draw_stage(rng: np.random.Generator, stage: Stage) -> DrawnStage:
    kernel = draw_kernel(rng, stage.blur) if rng.uniform() < stage.blur_probability else None
    low, high = stage.resize_range
    scale = (rng.uniform(1, high), rng.uniform(low, 1), 1.0)[rng.choice(3, p=stage.resize_probabilities)]
    gaussian = rng.uniform() < stage.gaussian_probability
    return DrawnStage(
        kernel=kernel,
        scale=scale,
        mode=_draw_mode(rng),
        noise=DrawnNoise(
            kind="gaussian" if gaussian else "poisson",
            strength=rng.uniform(*(stage.gaussian_sigma if gaussian else stage.poisson_scale)),
            gray=bool(rng.uniform() < stage.gray_probability),
            seed=int(rng.integers(2**63)),
        ),
        jpeg_quality=int(rng.integers(*stage.jpeg_quality, endpoint=True)),
    )


def _draw_mode(rng: np.random.Generator) -> Mode:
    return MODES[rng.integers(len(MODES))]


def _check_picture(picture: Tensor, least: int) -> None:
    if picture.ndim != 3 or len(picture) != 3 or not picture.is_floating_point() or min(picture.shape[1:]) < least:
        raise ValueError(
            f"expected an image of floats (3, rows, columns) with sides of {least} pixels or more; got "
            f"{picture.dtype} of shape {tuple(picture.shape)}; convert or enlarge it first"
        )
    low, high = float(picture.min()), float(picture.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"expected values in 0..1; got {low:.3g}..{high:.3g}; take (x + 1) / 2 of -1..1")
