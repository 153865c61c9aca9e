"""How close two images are, or two videos.

PSNR(a, b) = 10 log10(1 / mean((a - b)^2)),   a and b in 0-1
flicker(a, b) = sqrt(mean_t(((a_t+1 - a_t) - (b_t+1 - b_t))^2))
"""

import math
from typing import Any

import numpy as np
import torch

from ..media.pixels import as_pixels


def psnr(a: Any, b: Any) -> float:
    """Peak signal-to-noise ratio of two images in dB; infinite where they are equal.

    Images are of Pillow, NumPy or torch, `(height, width, channels)`, uint8 or floats in 0-1. Raises `ValueError` for
    two shapes.
    """
    first, second = as_pixels(a), as_pixels(b)
    if first.shape != second.shape:
        raise ValueError(f"psnr compares images of one shape, got {first.shape} and {second.shape}")
    error = float(np.mean((first - second) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def psnr_of_frames(a: Any, b: Any) -> tuple[float, ...]:
    """PSNR of every frame of two videos (frames, height, width, channels), in dB."""
    first, second = _videos(a, b, least=1)
    return tuple(psnr(one, other) for one, other in zip(first, second, strict=True))


def flicker(a: Any, b: Any) -> float:
    """Error of what changes from frame to frame, in 0-1: 0 where both videos change alike, whatever their colours.

    Root of the mean square over all pixels of two videos (frames, height, width, channels).
    """
    first, second = _videos(a, b, least=2)
    return float(np.sqrt(np.mean((np.diff(first, axis=0) - np.diff(second, axis=0)) ** 2)))


def _videos(a: Any, b: Any, least: int) -> tuple[np.ndarray, np.ndarray]:
    first, second = as_pixels(a), as_pixels(b)
    if first.shape != second.shape or first.ndim != 4 or len(first) < least:
        raise ValueError(
            f"expected two videos of one shape (frames, height, width, channels), {least} or more frames, got "
            f"{first.shape} and {second.shape}"
        )
    return first, second


def ssim(a: Any, b: Any) -> float:
    """Structural similarity of two images (height, width, channels), 1 where they are equal.

    Needs the extra `metrics`. Raises `ValueError` for images of two shapes.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ImportError('ssim needs torchmetrics: pip install "diffattn[metrics]"') from error
    pixels = [as_pixels(picture) for picture in (a, b)]
    if pixels[0].shape != pixels[1].shape or pixels[0].ndim != 3:
        shapes = " and ".join(str(picture.shape) for picture in pixels)
        raise ValueError(f"ssim compares images of one shape (height, width, channels), got {shapes}")
    first, second = (torch.from_numpy(picture).permute(2, 0, 1)[None] for picture in pixels)
    return float(structural_similarity_index_measure(first, second, data_range=1.0))
