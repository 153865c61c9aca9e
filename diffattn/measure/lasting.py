"""Whether a long video holds together, by its pixels alone: what needs no other video to compare with.

    flicker = sqrt(mean (x_t+1 - 2 x_t + x_t-1)^2) / 2,                   pixels x in 0-1
    drift   = mean |mean of the first `span` frames - mean of the last ones|
    loop    = 1 - mean_t min_s d(s, t) / mean_t mean_s d(s, t),           over |s - t| >= span,  d: mean |x_s - x_t|

A frame that comes again exactly after `span` frames or more counts 1 in `loop`, and a still video is one. What swings
to and fro, as the bundled model's object does, comes near itself again: compare such a figure with that of other videos
of the same model.
"""

from typing import Any

import numpy as np

from ..media.pixels import as_pixels


def own_flicker(video: Any) -> float:
    """What flashes from frame to frame, in 0-1: 0 where each pixel changes evenly; nan below three frames."""
    pixels = _checked(video)
    if len(pixels) < 3:
        return float("nan")
    return float(np.sqrt(np.mean(np.diff(pixels, n=2, axis=0) ** 2)) / 2)


def drift(video: Any, span: int = 16) -> float:
    """How far the mean of the last `span` frames is from that of the first, in 0-1; nan for fewer than 2 `span`."""
    pixels = _checked(video)
    if len(pixels) < 2 * span:
        return float("nan")
    return float(np.abs(pixels[:span].mean(0) - pixels[-span:].mean(0)).mean())


def loop(video: Any, span: int = 16) -> float:
    """How much the frames come again, `span` frames or more away, in 0-1; nan for no more frames than `span`."""
    pixels = _checked(video)
    if len(pixels) <= span:
        return float("nan")
    flat = pixels.reshape(len(pixels), -1)
    nearest, usual = [], []
    for number, frame in enumerate(flat):
        far = np.abs(np.arange(len(flat)) - number) >= span
        if far.any():
            distance = np.abs(flat[far] - frame).mean(1)
            nearest.append(distance.min())
            usual.append(distance.mean())
    total = float(np.mean(usual))
    return 1.0 if total == 0 else 1 - float(np.mean(nearest)) / total


def _checked(video: Any) -> np.ndarray:
    pixels = as_pixels(video)
    if pixels.ndim != 4 or not len(pixels):
        raise ValueError(f"expected a video (frames, height, width, channels), got the shape {pixels.shape}")
    return pixels
