"""Move and scale a driving face onto the source's: one axis-aligned map for all frames.

    x' = s x + t,    s = extent(source) / extent(driving),    t = mean(source) - s mean(driving),    for x and y each

with mean and extent (largest less least) over the 68 points. Resizing and the map are both linear in the pixels and
separable, so each is a matrix for the rows and one for the columns.
Source: Xie et al., X-Portrait, 2024, https://arxiv.org/abs/2403.15931; the released code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from diffattn.pipelines.portrait_animation.face.detection import Points, check_points
from numpy.typing import NDArray

Picture = NDArray[np.float32]
"""RGB from 0 to 1, `(height, width, 3)`."""


@dataclass(frozen=True)
class Alignment:
    """The map of one frame's pixels onto another's."""

    scale: tuple[float, float]
    """Of x and of y."""
    shift: tuple[float, float]
    """In pixels."""

    def move(self, points: Points) -> Points:
        """Where points `(68, 2)` come to lie."""
        moved: Points = points * self.scale + self.shift
        return moved

    def warp(self, picture: Picture) -> Picture:
        """The image moved within its frame: bilinear, black where nothing comes from."""
        height, width = picture.shape[:2]
        rows = _warp_matrix(height, self.scale[1], self.shift[1])
        return _apply(rows, _warp_matrix(width, self.scale[0], self.shift[0]), picture)


def align_faces(source: Points, driving: Points) -> Alignment:
    """The map of a driving face onto the source's, both in pixels of frames of the same size.

    Raises:
        ValueError: points of another shape, or all on one line.
    """
    check_points(source)
    check_points(driving)
    extent, target = np.ptp(driving, axis=0), np.ptp(source, axis=0)
    if not (extent > 0).all() or not (target > 0).all():
        raise ValueError(f"expected faces with an extent; got {target} for the source, {extent} for the driving; check")
    scale = target / extent
    shift = source.mean(0) - scale * driving.mean(0)
    return Alignment((float(scale[0]), float(scale[1])), (float(shift[0]), float(shift[1])))


def best_frame(source: Points, driving: Sequence[Points | None]) -> int:
    """Number of the driving frame whose face is nearest to the source's, by the sum of |difference|.

    Raises:
        ValueError: no driving frame has a face.
    """
    check_points(source)
    gaps = [np.inf if points is None else float(np.abs(source - points).sum()) for points in driving]
    if not np.isfinite(gaps).any():
        raise ValueError(f"expected a face in at least one of {len(driving)} driving frames; got none; go unaligned")
    return int(np.argmin(gaps))


def resize(frame: NDArray[Any], height: int, width: int) -> Picture:
    """A uint8 frame or an image of 0 to 1 at another size, the aspect ratio not kept: bilinear, smoothed to shrink.

    Shrinking by a factor f smooths with a Gaussian of sigma (f - 1) / 2 first; beyond its border the image goes on
    mirrored about the middle of its last pixel. The numbers are those of scikit-image's `resize`.
    """
    if frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise ValueError(f"expected a frame (height, width, 3); got shape {frame.shape}; put the channels last")
    if height < 1 or width < 1:
        raise ValueError(f"expected a size of at least 1 x 1 pixels; got {height} x {width}; enlarge it")
    picture = frame.astype(np.float32)
    if frame.dtype == np.uint8:
        picture /= 255
    return _apply(_resize_matrix(frame.shape[0], height), _resize_matrix(frame.shape[1], width), picture)


def _apply(rows: Picture, columns: Picture, picture: Picture) -> Picture:
    """Mix rows and columns of an image by a matrix each."""
    tall = (rows @ picture.reshape(len(picture), -1)).reshape(len(rows), *picture.shape[1:])
    return np.ascontiguousarray(columns @ tall)


@lru_cache(maxsize=16)
def _resize_matrix(old: int, new: int) -> Picture:
    """Weights of `old` pixels in each of `new`, `(new, old)`."""
    places = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(places).astype(int)
    share = places - first
    weights = np.zeros((new, old))
    for neighbour, weight in ((first, 1 - share), (first + 1, share)):
        np.add.at(weights, (np.arange(new), _mirror(neighbour, old)), weight)
    return (weights @ _gaussian_matrix(old, max(0.0, (old / new - 1) / 2))).astype(np.float32)


def _gaussian_matrix(length: int, sigma: float) -> NDArray[np.float64]:
    """A Gaussian, cut off at four sigma, around each of `length` pixels."""
    radius = int(4 * sigma + 0.5)
    if radius == 0:
        return np.eye(length)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights = np.zeros((length, length))
    pixels = np.arange(length)
    for offset, weight in zip(offsets, kernel / kernel.sum(), strict=True):
        np.add.at(weights, (pixels, _mirror(pixels + offset, length)), weight)
    return weights


def _mirror(places: NDArray[np.int_], length: int) -> NDArray[np.int_]:
    """Numbers of the pixels that stand for places beyond the border."""
    period = max(1, 2 * (length - 1))
    folded = places % period
    mirrored: NDArray[np.int_] = np.minimum(folded, period - folded) if length > 1 else folded
    return mirrored


@lru_cache(maxsize=16)
def _warp_matrix(length: int, scale: float, shift: float) -> Picture:
    """Weights of `length` pixels in each pixel after x' = scale x + shift; nothing lies beyond the border."""
    places = (np.arange(length) - shift) / scale
    first = np.floor(places).astype(int)
    share = places - first
    weights = np.zeros((length, length), dtype=np.float32)
    for neighbour, weight in ((first, 1 - share), (first + 1, share)):
        inside = (neighbour >= 0) & (neighbour < length)
        weights[np.flatnonzero(inside), neighbour[inside]] = weight[inside]
    return weights
