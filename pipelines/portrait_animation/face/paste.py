"""Cut a square around a face out of a frame, and put it back, the rest of the frame untouched."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from diffattn.pipelines.portrait_animation.face.alignment import Picture, resize
from diffattn.pipelines.portrait_animation.face.detection import Pixels, Points
from numpy.typing import NDArray


@dataclass(frozen=True)
class Box:
    """A square inside a frame, in pixels."""

    top: int
    left: int
    side: int

    @property
    def area(self) -> tuple[slice, slice]:
        """Its rows and columns."""
        return slice(self.top, self.top + self.side), slice(self.left, self.left + self.side)


def face_box(points: Points, height: int, width: int, margin: float = 0.6) -> Box:
    """The square around a face, or around all places of it: `(68, 2)` or `(frames, 68, 2)` points.

    Its side is the longer one of the points' bounding box and `margin` of it on either side, at most the frame's
    shorter side; where it would reach out of the frame, it is moved in.
    """
    flat = points.reshape(-1, 2)
    if not flat.size or not np.isfinite(flat).all():
        raise ValueError(f"expected finite points of a face; got shape {points.shape}; leave out frames without a face")
    if margin < 0:
        raise ValueError(f"expected a margin of at least 0; got {margin}; 0.6 shows head and shoulders")
    low, high = flat.min(0), flat.max(0)
    side = int(np.clip(np.ceil((high - low).max() * (1 + 2 * margin)), 1, min(height, width)))
    left, top = np.round((low + high - side) / 2)
    return Box(int(np.clip(top, 0, height - side)), int(np.clip(left, 0, width - side)), side)


def crop(frame: Pixels, box: Box, size: int) -> Picture:
    """The square at `size` x `size` pixels, RGB from 0 to 1."""
    return resize(frame[box.area], size, size)


def paste(frame: Pixels, face: NDArray[Any], box: Box, feather: float = 0.1) -> Pixels:
    """A copy of the frame with a square image of 0 to 1 in its box, blended in towards the box's edges.

        out = (1 - m) frame + m face,    m = min(1, d / (feather side))

    with d the distance in pixels from a pixel's middle to the nearest edge of the box; edges on the frame's own border
    do not count. Outside the box every pixel is as before.

    Args:
        feather: width of the blend as a share of the box's side, 0 to 0.5; 0 for a hard edge.
    """
    height, width = frame.shape[:2]
    if frame.dtype != np.uint8 or box.area[0].stop > height or box.area[1].stop > width or min(box.top, box.left) < 0:
        raise ValueError(
            f"expected a uint8 frame that holds {box}; got {frame.dtype} of shape {frame.shape}; crop anew"
        )
    if not 0 <= feather <= 0.5:
        raise ValueError(f"expected feather from 0 to 0.5; got {feather}; 0.1 blends over a tenth of the side")
    mask = np.minimum(
        _ramp(box.top, box.side, height, feather)[:, None], _ramp(box.left, box.side, width, feather)[None]
    )
    blended = frame[box.area] + mask[..., None] * (255 * resize(face, box.side, box.side) - frame[box.area])
    out = frame.copy()
    out[box.area] = np.clip(np.round(blended), 0, 255).astype(np.uint8)
    return out


def _ramp(start: int, side: int, length: int, feather: float) -> NDArray[np.float64]:
    """Weight of each of `side` pixels from `start` in a frame of `length`."""
    pixels = np.arange(side) + 0.5
    before = pixels if start > 0 else np.full(side, np.inf)
    after = side - pixels if start + side < length else np.full(side, np.inf)
    distance = np.minimum(before, after)
    ramp: NDArray[np.float64] = np.minimum(1.0, distance / (feather * side)) if feather else np.ones(side)
    return ramp
