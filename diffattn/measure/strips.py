"""How far a video is from another of the same prompt and seed, in figures and as strips of frames."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..media.drawing import Entry, error_map, sheet
from ..media.pixels import as_pixels
from .fidelity import flicker, psnr_of_frames

MOST_FRAMES = 9
"""Of a strip."""


@dataclass(frozen=True)
class VideoDistance:
    """Of a video to a reference."""

    psnr: tuple[float, ...]
    """Of each frame, in dB."""
    flicker: float
    """Error of what changes from frame to frame, in 0-1; nan for a single frame."""

    @classmethod
    def between(cls, video: Any, reference: Any) -> "VideoDistance":
        """Of two videos `(frames, height, width, channels)` of one shape."""
        return cls(psnr_of_frames(video, reference), flicker(video, reference) if len(video) > 1 else math.nan)

    @property
    def mean(self) -> float:
        """Mean PSNR of the frames in dB; infinite where one of them is identical."""
        return float(np.mean(self.psnr))

    @property
    def worst(self) -> int:
        """Number of the frame with the lowest PSNR."""
        return int(np.argmin(self.psnr))

    def __str__(self) -> str:
        if math.isinf(min(self.psnr)):
            return "identical"
        return (
            f"PSNR of the frames {self.mean:.1f} dB in the mean, {self.psnr[self.worst]:.1f} at worst "
            f"(frame {self.worst}); flicker {self.flicker:.4f}"
        )


def strips(
    reference: Sequence[Any], videos: Mapping[str, Sequence[Any]], *, name: str, note: str = "", side: int = 128
) -> Image.Image:
    """A sheet: the reference's frames in a row, called `name`, and below it each video's with PSNR and error.

    At most `MOST_FRAMES` frames, evenly chosen, the first and the last among them; the longer side of each is drawn
    `side` pixels long.
    """
    numbers = np.unique(np.linspace(0, len(reference) - 1, MOST_FRAMES).round().astype(int)).tolist()
    rows = [[Entry(to_image(reference[number])) for number in numbers]]
    for video in videos.values():
        values = psnr_of_frames(np.stack([*map(as_pixels, video)]), np.stack([*map(as_pixels, reference)]))
        rows.append(
            [
                Entry(
                    to_image(video[number]),
                    (f"{values[number]:.1f} dB" if math.isfinite(values[number]) else "identical",),
                    error_map(video[number], reference[number]),
                )
                for number in numbers
            ]
        )
    return sheet(rows, [name, *videos], [f"frame {number}" for number in numbers], note=note, side=side)


def to_image(frame: Any) -> Image.Image:
    """An image of any kind, as Pillow has it."""
    if isinstance(frame, Image.Image):
        return frame
    return Image.fromarray((as_pixels(frame).clip(0, 1) * 255).round().astype(np.uint8))
