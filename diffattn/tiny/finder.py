"""Whether an image shows what its caption promises: the right colour at the right place on the right background."""

from dataclasses import dataclass

import numpy as np

from diffattn.tiny.shapes import CENTRES, PALETTE, PLACES, SIDE, Scene, stripe_tone

AREA_PIXELS = (100, 2000)
"""Smallest and largest area of an object's blob, in pixels."""

TOLERANCE_PIXELS = 16.0
"""Largest distance of the blob's centroid from the middle of the promised place, in pixels, along each axis."""

_NAMES = tuple(PALETTE)
_TONES = np.array([*PALETTE.values(), *(stripe_tone(name) for name in _NAMES)], dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What `find` saw, and whether each promise of the caption was kept."""

    background: str
    """Name of the commonest colour."""
    area: int
    """Pixels in the largest blob of the promised colour."""
    centroid: tuple[float, float]
    """Row and column of that blob's middle in pixels; nan if there is no blob."""
    background_kept: bool
    object_kept: bool
    """The blob has a fitting area and is 65 percent or more of all that is not background."""
    place_kept: bool

    @property
    def kept(self) -> bool:
        """True when background, object and place are all as promised."""
        return self.background_kept and self.object_kept and self.place_kept


def find(picture: np.ndarray, scene: Scene) -> Finding:
    """Look for `scene`'s object in a uint8 RGB image of shape (SIDE, SIDE, 3).

    Every pixel takes the name of its nearest palette colour (a stripe counts as its background's colour). The
    commonest name is the background; the object is the largest 4-connected blob of the promised colour.
    """
    if picture.shape != (SIDE, SIDE, 3) or picture.dtype != np.uint8:
        raise ValueError(
            f"expected a uint8 image of shape {(SIDE, SIDE, 3)}; got {picture.dtype} of shape {picture.shape}; "
            "generate it at the native size and convert it with numpy.asarray"
        )
    names = name_pixels(picture)
    background = int(np.bincount(names.ravel(), minlength=len(_NAMES)).argmax())
    blob = largest_blob(names == _NAMES.index(scene.colour))
    area, other = int(blob.sum()), int((names != background).sum())
    rows, columns = np.nonzero(blob)
    centroid = (float(rows.mean() + 0.5), float(columns.mean() + 0.5)) if area else (np.nan, np.nan)
    wanted = [CENTRES[cell] for cell in PLACES[scene.place]]
    return Finding(
        background=_NAMES[background],
        area=area,
        centroid=centroid,
        background_kept=_NAMES[background] == scene.background,
        object_kept=AREA_PIXELS[0] <= area <= AREA_PIXELS[1] and area > 0.65 * other,
        place_kept=all(abs(got - want) <= TOLERANCE_PIXELS for got, want in zip(centroid, wanted, strict=True)),
    )


def name_pixels(picture: np.ndarray, tones: np.ndarray = _TONES) -> np.ndarray:
    """Index into the palette's names of each pixel's nearest tone in RGB, int of shape (rows, columns).

    `tones` holds one RGB row for each name of the palette, once or several times over.
    """
    apart = (tones**2).sum(-1) - 2.0 * picture.astype(np.float64) @ tones.T  # |p - t|^2 less |p|^2
    names: np.ndarray = apart.argmin(-1) % len(_NAMES)
    return names


def largest_blob(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected part of a boolean mask; all False if the mask is empty.

    Parts are grown one after the other, each from the first pixel not yet in a part.
    """
    left, largest = mask.copy(), np.zeros_like(mask)
    while left.sum() > largest.sum():
        part = grow(left, int(left.argmax()))
        left &= ~part
        if part.sum() > largest.sum():
            largest = part
    return largest


def grow(mask: np.ndarray, start: int) -> np.ndarray:
    """The 4-connected part of a boolean mask that holds the pixel of flat index `start`."""
    rows, columns = mask.shape
    open_pixels, stack = mask.ravel().copy(), [start]
    part = np.zeros_like(open_pixels)
    open_pixels[start] = False
    while stack:
        pixel = stack.pop()
        part[pixel] = True
        row, column = divmod(pixel, columns)
        above, below = pixel - columns if row else -1, pixel + columns if row < rows - 1 else -1
        left, right = pixel - 1 if column else -1, pixel + 1 if column < columns - 1 else -1
        for near in (above, below, left, right):
            if near >= 0 and open_pixels[near]:
                open_pixels[near] = False
                stack.append(near)
    return part.reshape(mask.shape)
