"""Sizes that the networks take, and frames padded to them.

A latent cell is 8 x 8 pixels. The network takes latents whose height is 2 more than a multiple of 8 and whose width is
a multiple of 8. The released code pads with white, always to 1280 x 720 at least; reflection up to the next legal size
costs less and does not brighten the borders.

Source of the `official_` rules: the code released with STAR, Xie et al., 2025, https://arxiv.org/abs/2501.02976.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .networks.unet import legal_size
from .settings import CELL

OFFICIAL_HEIGHT, OFFICIAL_WIDTH = 720, 1280
"""Least size of the released code, in pixels."""
OFFICIAL_PIXELS = 1280 * 2048
"""Most pixels of a frame by `official_target`."""


@dataclass(frozen=True)
class Padding:
    """Pixels added on each side of a frame.

    >>> Padding(left=1, right=2, top=3, bottom=4).crop(torch.zeros(1, 3, 10, 10)).shape
    torch.Size([1, 3, 3, 7])
    """

    left: int
    right: int
    top: int
    bottom: int

    def __post_init__(self) -> None:
        if min(self.left, self.right, self.top, self.bottom) < 0:
            raise ValueError(f"expected sides of at least 0 pixels; got {self}; crop frames instead")

    def crop(self, pictures: Tensor) -> Tensor:
        """A view of padded images `(.., rows, columns)` without the padding.

        Raises:
            ValueError: images that are no larger than the padding.
        """
        rows, columns = pictures.shape[-2] - self.top - self.bottom, pictures.shape[-1] - self.left - self.right
        if min(rows, columns) < 1:
            raise ValueError(f"expected images padded by {self}; got the shape {tuple(pictures.shape)}; pad them first")
        return pictures[..., self.top : self.top + rows, self.left : self.left + columns]


def tight_padding(height: int, width: int, downsamplings: int = 3) -> Padding:
    """To the smallest legal size, half on each side; an odd pixel goes to the right or the bottom.

    >>> tight_padding(240, 426)
    Padding(left=11, right=11, top=16, bottom=16)

    Args:
        height, width: of the frames at the size of the result, in pixels.
        downsamplings: of the network; each doubles what the latents' size must be a multiple of.
    """
    _check_size(height, width)
    rows, columns = legal_size(math.ceil(height / CELL), math.ceil(width / CELL), downsamplings)
    (top, bottom), (left, right) = _halves(CELL * rows - height), _halves(CELL * columns - width)
    return Padding(left, right, top, bottom)


def official_padding(height: int, width: int) -> Padding:
    """To 1280 x 720 in the middle; along a side that is longer, at the end.

    A height above 720 becomes the next 64 k + 16 and a width above 1280 the next 64 k, 64 pixels more where it is that
    already.

    >>> official_padding(1080, 1920)
    Padding(left=0, right=64, top=0, bottom=24)
    """
    _check_size(height, width)
    top, bottom = _official_side(height, OFFICIAL_HEIGHT)
    left, right = _official_side(width, OFFICIAL_WIDTH)
    return Padding(left, right, top, bottom)


def pad(frames: Tensor, padding: Padding, *, official: bool = False) -> Tensor:
    """Padded frames `(.., rows, columns)`, by reflection without the edge pixel repeated.

    Where a side is shorter than its padding the reflection goes to and fro; a side of one pixel is repeated.

    Args:
        official: pad with 1, which is white in [-1, 1] and in [0, 1].
    """
    if official:
        return F.pad(frames, (padding.left, padding.right, padding.top, padding.bottom), value=1.0)
    rows = _reflected(frames.shape[-2], padding.top, padding.bottom)
    columns = _reflected(frames.shape[-1], padding.left, padding.right)
    return frames.index_select(-2, rows.to(frames.device)).index_select(-1, columns.to(frames.device))


def official_target(height: int, width: int, upscale: float) -> tuple[int, int]:
    """(height, width) of the result by a rule of the released code that its command does not use.

    The scale is raised to 720 rows, or else lowered to 1280 x 2048 pixels; sides are rounded down to even numbers.

    >>> official_target(720, 1280, 4), official_target(100, 200, 2)
    ((1214, 2158), (720, 1440))
    """
    _check_size(height, width)
    if not upscale > 0:
        raise ValueError(f"expected an upscale above 0; got {upscale}; 4 is usual")
    scale = float(upscale)
    if height * scale < OFFICIAL_HEIGHT:
        scale = OFFICIAL_HEIGHT / height
    elif height * width * scale**2 > OFFICIAL_PIXELS:
        scale = math.sqrt(OFFICIAL_PIXELS / (height * width))
    return int(scale * height // 2 * 2), int(scale * width // 2 * 2)


def _official_side(length: int, least: int) -> tuple[int, int]:
    """Pixels before and after a side of `length`."""
    if length <= least:
        return _halves(least - length)
    return 0, 64 - (length - least) % 64


def _halves(total: int) -> tuple[int, int]:
    return total // 2, total - total // 2


def _reflected(length: int, before: int, after: int) -> Tensor:
    """Numbers of the pixels that a padded side shows."""
    if length == 1:
        return torch.zeros(before + 1 + after, dtype=torch.long)
    period = 2 * (length - 1)
    place = torch.arange(-before, length + after) % period
    return torch.minimum(place, period - place)


def _check_size(height: int, width: int) -> None:
    if min(height, width) < 1:
        raise ValueError(f"expected frames of at least 1 x 1 pixels; got {height} x {width}; check how they were read")
