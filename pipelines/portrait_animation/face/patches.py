"""The local control image: patches around the eyes and the mouth of an aligned driving frame, on black.

In units of 1/256 of the frame's shorter side a patch reaches 32 from its middle, or, scaled with the face, a quarter of
the longer side of the points' bounding box. The middle is the rounded mean of its points, moved so far that the patch
lies in the frame: at a reach of 32 in a square one, into 32..223.
Source: Xie et al., X-Portrait, 2024, https://arxiv.org/abs/2403.15931; the released code, whose slices leave out the
first point of each group.
"""

from typing import Any

import numpy as np
from diffattn.pipelines.portrait_animation.face.alignment import Picture
from diffattn.pipelines.portrait_animation.face.detection import Points, check_points
from numpy.typing import NDArray

GROUPS = (slice(43, 48), slice(37, 42), slice(49, 68))
"""Points of the eye on the right of the image, the one on its left, and the mouth."""

UNITS = 256
REACH = 32
FACE_SHARE = 0.25
"""Reach of a scaled patch as a share of the face's longer side; 32 for a face of half the frame."""


def patch_boxes(points: Points, height: int, width: int, scaled: bool = False) -> list[tuple[slice, slice]]:
    """Rows and columns of the three patches in a frame of `height` x `width` pixels.

    Args:
        points: of the face, in pixels of the frame.
        scaled: as large as the face is, instead of as the frame is.
    """
    check_points(points)
    unit = min(height, width) / UNITS
    reach = REACH if not scaled else round(np.clip(FACE_SHARE * np.ptp(points, axis=0).max() / unit, 1, UNITS // 2 - 1))
    boxes = []
    for group in GROUPS:
        column, row = np.round(points[group].mean(0) / unit)
        spans = []
        for middle, side in ((row, height), (column, width)):
            inside = np.clip(middle, reach, side / unit - reach - 1)
            first = round(float(inside - reach) * unit)
            spans.append(slice(first, first + max(1, round(2 * reach * unit))))
        boxes.append((spans[0], spans[1]))
    return boxes


def local_control(picture: NDArray[Any], points: Points | None, scaled: bool = False) -> Picture:
    """The control image, RGB from 0 to 1, `(height, width, 3)`; all black where there is no face.

    Args:
        picture: aligned driving frame, RGB from 0 to 1.
        points: of the face in it, in its pixels; None for none.
        scaled: see `patch_boxes`.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape or picture.dtype.kind != "f":
        raise ValueError(
            f"expected a float image (height, width, 3) from 0 to 1; got {picture.dtype} of shape {picture.shape}; "
            "resize the frame first"
        )
    control = np.zeros(picture.shape, dtype=np.float32)
    if points is not None:
        height, width = picture.shape[:2]
        for box in patch_boxes(points, height, width, scaled):
            control[box] = picture[box]
    return control
