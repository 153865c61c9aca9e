"""Bad clips from good ones, for training: two rounds of blur, resize, noise, JPEG and a video codec, 1/4 of the size.

    first     blur, resize, noise, JPEG, codec
    second    blur (with a probability), resize, noise
    last      resize to 1 / final_scale and sinc, JPEG, codec; or JPEG, codec, resize and sinc
    out       round to 8 bit

`draw` settles everything by a seed, once for a clip; `apply` carries it out; `degrade_clip` does both. Kernels, scales,
strengths, qualities and codecs hold for all frames; the noise itself is new in each. The steps of one image are those
of `pixel_aware_sr.training.degrade`, which says how they differ from Real-ESRGAN's.

Source: Wang, Xie, Dong, Shan, Real-ESRGAN, 2021, https://arxiv.org/abs/2107.10833, section 3, for the order and the
strengths; Xie et al., STAR, 2025, https://arxiv.org/abs/2501.02976, for the ranges of resizes, JPEG and codecs.
Differences to STAR's released training, which draws all of it anew for every frame and encodes single frames: here a
codec sees the whole clip, so that its faults last and move. The bad clip stays small, and good ones are not sharpened.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from diffattn.pipelines.pixel_aware_sr.training import degrade as picture
from diffattn.pipelines.pixel_aware_sr.training.blur_kernels import Blur
from diffattn.pipelines.pixel_aware_sr.training.degrade import Degradation, DrawnDegradation, DrawnStage, Stage
from torch import Tensor

from .codec import CodecRanges, DrawnCodec, check_codec, draw_codec, recompress

REAL_ESRGAN = Degradation(
    first=Stage(
        blur=Blur(sigma=(0.2, 3.0)),
        resize_probabilities=(0.2, 0.7, 0.1),
        resize_range=(0.15, 1.5),
        gaussian_sigma=(1.0, 30.0),
        poisson_scale=(0.05, 3.0),
        jpeg_quality=(30, 95),
    ),
    second=Stage(
        blur=Blur(sigma=(0.2, 1.5)),
        blur_probability=0.8,
        resize_probabilities=(0.3, 0.4, 0.3),
        resize_range=(0.3, 1.2),
        gaussian_sigma=(1.0, 25.0),
        poisson_scale=(0.05, 2.5),
        jpeg_quality=(30, 95),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """What the degradation of a clip is drawn from; the defaults are STAR's."""

    spatial: Degradation = REAL_ESRGAN
    """Of every frame; its `final_scale` is how many times smaller a clip gets."""
    codec: CodecRanges = dataclasses.field(default_factory=CodecRanges)
    """Of both rounds."""


STAR = Ranges()


@dataclass(frozen=True, kw_only=True)
class ClipDegradation:
    """All that happens to one clip; `dataclasses.asdict` makes it a log."""

    spatial: DrawnDegradation
    """The same for every frame, but that noise is seeded by its `seed` and the number of the frame; `restore_mode` has
    no use."""
    first_codec: DrawnCodec | None
    """None: no codec."""
    second_codec: DrawnCodec | None


def degrade_clip(frames: Tensor, seed: int | torch.Generator, ranges: Ranges = STAR) -> Tensor:
    """Degrade a clip; the same seed gives the same frames, and no global generator is used.

    Args:
        frames: values in 0..1, (frames, 3, rows, columns), both sides at least the final scale, 4.
        seed: from 0 on; a generator gives one and moves on.
        ranges: what to draw from.

    Returns:
        Multiples of 1/255, (frames, 3, rows // 4, columns // 4), of the dtype and device of `frames`; computed in
        float32 on the CPU.

    Raises:
        ValueError: another shape or range, a clip too small, a negative seed, or an encoder that PyAV lacks.
        ImportError: PyAV is not installed.
    """
    _check_clip(frames, ranges.spatial.final_scale)
    if ranges.codec.probability > 0:
        for name in ranges.codec.codecs:
            check_codec(name)
    return apply(frames, draw(seed, ranges))


def draw(seed: int | torch.Generator, ranges: Ranges = STAR) -> ClipDegradation:
    """Settle a degradation by a seed; it fits clips of any size and length."""
    if isinstance(seed, torch.Generator):
        seed = int(torch.randint(2**63 - 1, (), generator=seed, device=seed.device))
    if not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"expected seed as a whole number from 0 on, or a torch.Generator; got {seed!r}; change it")
    rng = np.random.default_rng([seed, 1])
    return ClipDegradation(
        spatial=picture.draw(seed, ranges.spatial),
        first_codec=draw_codec(rng, ranges.codec),
        second_codec=draw_codec(rng, ranges.codec),
    )


def apply(frames: Tensor, drawn: ClipDegradation) -> Tensor:
    """Carry a degradation out on a clip as in `degrade_clip`, of any length; returns the same."""
    frames, spatial = frames.detach(), drawn.spatial
    _check_clip(frames, spatial.final_scale)
    for codec in (drawn.first_codec, drawn.second_codec):
        if codec is not None:
            check_codec(codec.name)
    size = frames.shape[-2:]
    small = [side // spatial.final_scale for side in size]
    clip: Iterator[Tensor] = (frame.to("cpu", torch.float32) for frame in frames)
    clip = _run_stage(clip, spatial.first, [side * spatial.first.scale for side in size])
    clip = _compress(clip, spatial.first.jpeg_quality, drawn.first_codec)
    clip = _run_stage(clip, spatial.second, [side / spatial.final_scale * spatial.second.scale for side in size])
    if spatial.jpeg_before_reduction:
        clip = _compress(clip, spatial.second.jpeg_quality, drawn.second_codec)
    clip = (picture.blur(picture.resize(frame, small, spatial.reduction_mode), spatial.sinc) for frame in clip)
    if not spatial.jpeg_before_reduction:
        clip = _compress(clip, spatial.second.jpeg_quality, drawn.second_codec)
    return torch.stack([picture.quantise(frame) for frame in clip]).to(frames)


def _run_stage(clip: Iterable[Tensor], stage: DrawnStage, size: Sequence[float]) -> Iterator[Tensor]:
    """Blur, resize and noise of each frame."""
    for number, frame in enumerate(clip):
        seed = int(np.random.default_rng([stage.noise.seed, number]).integers(2**63))
        resized = picture.resize(picture.blur(frame, stage.kernel), size, stage.mode)
        yield picture.add_noise(resized, dataclasses.replace(stage.noise, seed=seed))


def _compress(clip: Iterable[Tensor], quality: int, codec: DrawnCodec | None) -> Iterator[Tensor]:
    """JPEG of each frame, then the codec over all."""
    return recompress((picture.jpeg(frame, quality) for frame in clip), codec)


def _check_clip(frames: Tensor, least: int) -> None:
    shape = tuple(frames.shape)
    if len(shape) != 4 or shape[1] != 3 or not frames.is_floating_point() or not len(frames) or min(shape[2:]) < least:
        raise ValueError(
            f"expected a clip of floats (frames, 3, rows, columns), one frame or more with sides of {least} pixels or "
            f"more; got {frames.dtype} of shape {shape}; convert or enlarge it first"
        )
    low, high = (float(bound) for bound in frames.detach().aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"expected values in 0..1; got {low:.3g}..{high:.3g}; take (x + 1) / 2 of -1..1")
