"""Which frames the U-Net sees together, and how what it predicts for them is joined.

    default     windows begin at 0, step, 2 step, ..; the last one ends with the video; linear cross-fades
    official    windows begin at o, o + step, .. < o + frames - overlap and go round the end; equal weights

with step = size - overlap and another offset o at every denoising step.

Source: the default and its weights as in `diffattn.media.windows`; the other as in X-Portrait's released code.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffattn.media.windows import ramp_weights, starts


@dataclass(frozen=True)
class Windows:
    """Windows of one length that cover a video."""

    places: Sequence[Sequence[int]]
    """Numbers of the frames of each."""
    weights: Tensor
    """(windows, size)."""

    def batches(self, count: int) -> Iterator[Sequence[Sequence[int]]]:
        """The windows, up to `count` at a time."""
        for first in range(0, len(self.places), count):
            yield self.places[first : first + count]


def plain_windows(frames: int, size: int, overlap: int) -> Windows:
    """For any number of frames from 1; a video shorter than `size` is one window."""
    begins = starts(frames, size, overlap)
    size = min(size, frames)
    return Windows([range(begin, begin + size) for begin in begins], ramp_weights(begins, size, frames))


def circular_windows(frames: int, size: int, overlap: int, offset: int) -> Windows:
    """The official ones; raises `ValueError` for fewer than `size` frames, which one window would hold twice."""
    if not 0 <= overlap < size <= frames:
        raise ValueError(
            f"expected a window of at most {frames} frames, all of the video, and a smaller overlap; got {size} and "
            f"{overlap}; leave official=True out for short videos"
        )
    begins = range(offset, offset + frames - overlap, size - overlap)
    places = [[(begin + i) % frames for i in range(size)] for begin in begins]
    return Windows(places, torch.ones(len(places), size, dtype=torch.float64))
