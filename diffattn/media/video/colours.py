"""A decoded frame as it is shown: 8-bit RGB of BT.709 or sRGB, the right way up.

Numbers are those of ITU-T H.273. Levels are rounded exactly, ones of more than 8 bits too. What names no matrix is
taken for BT.709 from high definition on, else for BT.601, as players do. Primaries of standard definition and the
curves near to that of BT.709 are taken for BT.709's. Wider gamuts and high dynamic range are converted, see `gamut`;
what has no conversion here is refused.
"""

import logging
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import gamut
from .opening import Pixels, pyav

logger = logging.getLogger("diffattn")

BT709, UNSPECIFIED, LIMITED = 1, 2, 1
"""Colours of high definition, none named, and luma from 16 to 235."""

MATRICES = {0, 1, 2, 4, 5, 6, 7, 9}
"""RGB, BT.709, none named, FCC, BT.601 twice, SMPTE 240M, BT.2020 with its luma not constant."""
PRIMARIES = {1, 2, 5, 6, 7, 22}
"""BT.709, none named, BT.601 for 625 and 525 lines, SMPTE 240M, EBU 3213."""
CURVES = {1, 2, 4, 5, 6, 7, 11, 12, 13, 14, 15}
"""Those with about the gamma of a screen: BT.709, none named, 2.2, 2.8, BT.601, SMPTE 240M, xvYCC, BT.1361, sRGB, and
BT.2020's for 10 and 12 bits."""

_EXACT = 0x2000 | 0x4000 | 0x40000 | 0x80000
READ, WRITE = 4 | _EXACT, 32 | _EXACT
"""Flags of swscale: chroma bicubic when read and the mean of four pixels when written; all of it used and made,
accurate rounding, the same on every CPU."""


class Shown:
    """Turns the decoded frames of one file into pixels; what is odd about them is told once."""

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self._told: set[str] = set()
        # one for all frames: each would set up tables of its own
        self._reformatter = pyav().video.reformatter.VideoReformatter()

    def __call__(self, frame: Any) -> Pixels:
        """uint8 RGB `(height, width, 3)`; raises `ValueError` for colours without a conversion."""
        if frame.interlaced_frame:
            self._tell("interlaced: the two fields of a frame are left woven, so what moves has combs; deinterlace it")
        curve, primaries = int(frame.color_trc), int(frame.color_primaries)
        if curve in gamut.HIGH_RANGE and primaries == UNSPECIFIED:
            primaries = gamut.BT2020
        self._check(int(frame.colorspace), primaries, curve)
        if curve in gamut.HIGH_RANGE or primaries not in PRIMARIES:
            self._tell(f"{gamut.describe(primaries, curve)} converted to BT.709")
            pixels = gamut.to_bt709(_planes(frame), primaries, curve)
        else:
            pixels = self._to_rgb(frame)
        return np.ascontiguousarray(_upright(self._opaque(frame, pixels), frame))

    def _tell(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            logger.warning("%s: %s", self.path, what)

    def _check(self, matrix: int, primaries: int, curve: int) -> None:
        known = PRIMARIES | gamut.TO_BT709.keys()
        if matrix in MATRICES and primaries in known and curve in CURVES | gamut.HIGH_RANGE:
            return
        raise ValueError(
            f"expected colours of BT.601, BT.709, BT.2020 or P3 in {self.path}; got matrix {matrix}, primaries "
            f"{primaries} and transfer {curve} of ITU-T H.273; convert it to BT.709 first"
        )

    def _to_rgb(self, frame: Any) -> Pixels:
        given = {"format": "rgb24", "src_colorspace": _matrix(frame), "interpolation": READ, "threads": 1}
        pixels: Pixels = self._reformatter.reformat(frame, **given).to_ndarray()
        return pixels

    def _opaque(self, frame: Any, pixels: Pixels) -> Pixels:
        """On white, as images are."""
        if not any(component.is_alpha for component in frame.format.components):
            return pixels
        alpha = frame.reformat(format="rgba", interpolation=READ).to_ndarray()[..., 3:].astype(np.uint16)
        if (alpha == 255).all():
            return pixels
        self._tell("transparent in places; put on white")
        return ((pixels * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _planes(frame: Any) -> NDArray[np.uint16]:
    """RGB in 1/256 of a level."""
    planes: NDArray[np.uint16] = frame.to_ndarray(format="gbrp16le", src_colorspace=_matrix(frame), interpolation=READ)
    return planes


def _matrix(frame: Any) -> int | None:
    """What swscale is told; None for what the frame says."""
    high = frame.width >= 1280 or frame.height > 576
    return BT709 if frame.colorspace == UNSPECIFIED and high and not frame.format.is_rgb else None


def _upright(pixels: Pixels, frame: Any) -> Pixels:
    """By the display matrix (a, b, c, d): a point at (x, y) is shown at (a x + c y, b x + d y), y down."""
    a, b, c, d = _display_matrix(frame) or (1, 0, 0, 1)
    if abs(a) + abs(d) < abs(b) + abs(c):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _display_matrix(frame: Any) -> tuple[int, int, int, int] | None:
    try:
        data = bytes(frame.side_data.get("DISPLAYMATRIX") or b"")
    except ValueError:  # PyAV does not know the type of a neighbour
        return None
    if len(data) < 36:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", data[:36])
    return a, b, c, d
