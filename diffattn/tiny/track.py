"""What moves in a video, frame by frame: its colour, shape and place, and whether it stays the same and moves smoothly.

For any video of one object on a plain background of the palette's colours, of any length; made for videos of
`diffattn.tiny.moving` and of models trained on them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from diffattn.tiny.finder import largest_blob, name_pixels
from diffattn.tiny.moving import MOTIONS, MOVING_SHAPES, RADIUS, SIDE
from diffattn.tiny.shapes import PALETTE, outline_distance

CLEAN_FIT = 0.7
"""Least overlap of an object with its shape's template, as intersection over union, in a clean frame."""

CLEAN_SHARE = 0.9
"""Least share of a clean frame's pixels off the background that belong to the one object."""

CLEAN_TINT = 30.0
"""Largest mean distance in RGB (0..255) between a clean frame's background and its colour in the palette."""

LEAST_TRAVEL = 2.0
"""Least distance in pixels between the ends of a motion."""

_NAMES = tuple(PALETTE)
_TONES = np.array(list(PALETTE.values()), dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """What one frame shows."""

    background: str
    """Name of the commonest colour."""
    colour: str
    """Name of the commonest colour of the largest blob off the background; "" where there is none."""
    shape: str
    """Shape whose template at the blob's place overlaps it most; "" where there is no blob."""
    centre: tuple[float, float]
    """x and y of the blob's middle in pixels, to a fraction of one; nan where there is no blob."""
    fit: float
    """Overlap with that template, intersection over union, 0..1."""
    clean: bool
    """The frame shows one object that fits its shape, and nothing else, on a plain background."""


def follow(video: np.ndarray) -> list[Sighting]:
    """Look at every frame of a video, uint8 RGB (frames, SIDE, SIDE, 3)."""
    if video.ndim != 4 or video.shape[1:] != (SIDE, SIDE, 3) or video.dtype != np.uint8:
        raise ValueError(
            f"expected a uint8 video of shape {('frames', SIDE, SIDE, 3)}; got {video.dtype} of shape {video.shape}; "
            "generate it at the native size and scale floats by 255"
        )
    return [sight(frame) for frame in video]


def sight(frame: np.ndarray) -> Sighting:
    """Find the object of one uint8 RGB frame (SIDE, SIDE, 3)."""
    names = name_pixels(frame, _TONES)
    background = int(np.bincount(names.ravel(), minlength=len(_NAMES)).argmax())
    blob = largest_blob(names != background)
    if not blob.any():
        return Sighting(
            background=_NAMES[background], colour="", shape="", centre=(np.nan, np.nan), fit=0.0, clean=False
        )
    colour = int(np.bincount(names[blob], minlength=len(_NAMES)).argmax())
    coverage = blend(frame, background, colour)
    here = widen(blob)
    centre = centroid(coverage * here)
    shape, fit = best_shape(coverage * here, centre)
    whole = blob.sum() >= CLEAN_SHARE * (names != background).sum()
    tint = np.linalg.norm(frame[~here] - _TONES[background], axis=-1).mean()
    return Sighting(
        background=_NAMES[background],
        colour=_NAMES[colour],
        shape=shape,
        centre=centre,
        fit=fit,
        clean=bool(whole and fit >= CLEAN_FIT and tint <= CLEAN_TINT),
    )


def blend(frame: np.ndarray, background: int, colour: int) -> np.ndarray:
    """How far each pixel lies on the way from the background's tone (0) to the object's (1), (rows, columns)."""
    way = _TONES[colour] - _TONES[background]
    share: np.ndarray = np.clip((frame - _TONES[background]) @ way / (way @ way), 0.0, 1.0)
    return share


def widen(mask: np.ndarray, pixels: int = 2) -> np.ndarray:
    """A mask grown by `pixels` each way, to take in the blended pixels of an edge."""
    padded, (rows, columns) = np.pad(mask, pixels), mask.shape
    offsets = range(2 * pixels + 1)
    grown: np.ndarray = np.any([padded[y : y + rows, x : x + columns] for y in offsets for x in offsets], axis=0)
    return grown


def centroid(weights: np.ndarray) -> tuple[float, float]:
    """x and y of the middle of an image of weights, in pixels."""
    pixels, total = np.arange(SIDE) + 0.5, weights.sum()
    return float(weights.sum(0) @ pixels / total), float(weights.sum(1) @ pixels / total)


def best_shape(coverage: np.ndarray, centre: tuple[float, float]) -> tuple[str, float]:
    """The shape whose template with its middle at `centre` overlaps `coverage` most, and that overlap."""
    overlaps = {}
    for shape in MOVING_SHAPES:
        off_x, off_y = middle_of(shape)
        drawn = template(shape, centre[0] - off_x, centre[1] - off_y)
        overlaps[shape] = float(np.minimum(coverage, drawn).sum() / np.maximum(coverage, drawn).sum())
    best = max(overlaps, key=overlaps.__getitem__)
    return best, overlaps[best]


def template(shape: str, x: float, y: float) -> np.ndarray:
    """Coverage 0..1 of each pixel by a shape of nominal size around (x, y), (SIDE, SIDE)."""
    pixels = np.arange(SIDE) + 0.5
    inside: np.ndarray = 0.5 - outline_distance(shape, pixels[None, :] - x, pixels[:, None] - y, RADIUS)
    return np.clip(inside, 0.0, 1.0)


@lru_cache
def middle_of(shape: str) -> tuple[float, float]:
    """Offset in pixels of a shape's centroid from the point that it is drawn around."""
    x, y = centroid(template(shape, SIDE / 2, SIDE / 2))
    return x - SIDE / 2, y - SIDE / 2


@dataclass(frozen=True, kw_only=True)
class Figures:
    """How well one object lasts through a video; shares of frames in 0..1, lengths in pixels."""

    colour_identity: float
    """Share of frames whose object has the colour of most."""
    shape_identity: float
    """Share of frames whose object has the shape of most."""
    identity: float
    """Share of frames whose object has the pair of colour and shape of most."""
    background_identity: float
    """Share of frames whose background has the colour of most."""
    clean: float
    """Share of frames that show exactly one well-shaped object on a plain background."""
    seam_acceleration: float
    """Mean |x(t+1) - 2 x(t) + x(t-1)| over the triples of frames that straddle a seam; nan without seams."""
    acceleration: float
    """The same over all other triples."""
    worst_acceleration: float
    """The largest of all triples, at a seam or not."""


def figures(sightings: Sequence[Sighting], seams: Sequence[int] = ()) -> Figures:
    """Sum a video up; `seams` are the numbers of the frames that begin a new clip.

    Frames without an object count as different, and triples with one are left out of the accelerations.
    """
    jumps, straddling = accelerations(sightings), np.zeros(max(0, len(sightings) - 2), dtype=bool)
    for seam in seams:
        if not 0 < seam < len(sightings):
            raise ValueError(f"expected seams from 1 to {len(sightings) - 1}, inside the video; got {seam}")
        straddling[max(0, seam - 2) : seam] = True
    return Figures(
        colour_identity=agreement([sighting.colour for sighting in sightings]),
        shape_identity=agreement([sighting.shape for sighting in sightings]),
        identity=agreement([(sighting.colour, sighting.shape) for sighting in sightings]),
        background_identity=agreement([sighting.background for sighting in sightings]),
        clean=sum(sighting.clean for sighting in sightings) / len(sightings),
        seam_acceleration=finite_mean(jumps[straddling]),
        acceleration=finite_mean(jumps[~straddling]),
        worst_acceleration=float(np.nanmax(jumps)) if np.isfinite(jumps).any() else float("nan"),
    )


def accelerations(sightings: Sequence[Sighting]) -> np.ndarray:
    """|x(t+1) - 2 x(t) + x(t-1)| in pixels around each inner frame, (frames - 2,); nan where an object is missing."""
    centres = np.array([sighting.centre for sighting in sightings])
    lengths: np.ndarray = np.linalg.norm(np.diff(centres, n=2, axis=0), axis=-1)
    return lengths


def agreement(values: Sequence[object]) -> float:
    """Share of `values` equal to the commonest of them; empty strings agree with nothing."""
    counts = Counter(value for value in values if value not in ("", ("", "")))
    return counts.most_common(1)[0][1] / len(values) if counts else 0.0


def majority(values: Sequence[str]) -> str:
    """The commonest of `values`."""
    return Counter(values).most_common(1)[0][0]


def finite_mean(values: np.ndarray) -> float:
    """Mean of the values that are numbers; nan if none is."""
    numbers = values[np.isfinite(values)]
    return float(numbers.mean()) if len(numbers) else float("nan")


def motion(sightings: Sequence[Sighting]) -> str | None:
    """The key of MOTIONS along whose axis the places spread; None for a motion that is short, slanted or unseen."""
    centres = np.array([sighting.centre for sighting in sightings if np.isfinite(sighting.centre).all()])
    if not len(centres):
        return None
    spread = np.ptp(centres, axis=0)
    along = int(spread.argmax())
    if spread[along] < LEAST_TRAVEL or spread[1 - along] > 0.5 * spread[along]:
        return None
    return next(name for name, axis in MOTIONS.items() if axis == along)
