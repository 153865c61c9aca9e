"""Faces in frames: the interface of what finds them, which face counts, and what holds in frames without one.

Points are iBUG's 68, `(68, 2)`, x and y in pixels of the frame they were found in: jaw 0-16, brows 17-26, nose 27-35,
eyes 36-41 and 42-47, outer lips 48-59, inner lips 60-67; left is the left of the image.
Layout: Sagonas et al., 300 Faces in-the-Wild Challenge, 2013.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

POINTS = 68

Pixels = NDArray[np.uint8]
Points = NDArray[np.float64]

_LINES = ((0, 17), (17, 22), (22, 27), (27, 31), (31, 36))
_RINGS = ((36, 42), (42, 48), (48, 60), (60, 68))


class LandmarkFinder(Protocol):
    """Finds the faces of frames; `DlibLandmarks`, `MediapipeLandmarks`, `LandmarkFile`, or the user's own."""

    def landmarks(self, frames: Iterable[Pixels]) -> list[Points | None]:
        """For each uint8 RGB frame the points of its faces, `(faces, 68, 2)`, or None where there is no face."""
        ...


class LandmarkFile:
    """Points from a file, for frames that they were found in before.

    `.npy` holds `(frames, 68, 2)`, or `(frames, faces, 68, 2)`; faces with NaN are missing. `.json` holds a list
    with an entry for each frame: null, the 68 pairs of a face, or a list of faces.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            entries = _READERS[self.path.suffix.lower()](self.path)
            self.found = [_faces(entry) for entry in entries]
        except FileNotFoundError:
            raise
        except KeyError as error:
            raise ValueError(f"expected points in a .npy or .json file; got {path}; convert it") from error
        except (ValueError, TypeError, EOFError) as error:
            raise ValueError(
                f"expected {POINTS} pairs of x and y, or none, for each frame in {path}; got: {error}; make it anew"
            ) from error

    def landmarks(self, frames: Iterable[Pixels]) -> list[Points | None]:
        """What the file says; it must have as many entries as there are frames."""
        count = sum(1 for _ in frames)
        if count != len(self.found):
            raise ValueError(
                f"expected points for {count} frames in {self.path}; got {len(self.found)}; read the frames they are of"
            )
        return list(self.found)


def _faces(entry: Any) -> Points | None:
    """Faces of one entry, `(faces, 68, 2)`; None without any."""
    if entry is None or len(entry) == 0:
        return None
    points = np.asarray(entry, dtype=np.float64)
    points = points[None] if points.ndim == 2 else points
    if points.ndim != 3 or points.shape[1:] != (POINTS, 2):
        raise ValueError(f"points of shape {points.shape}")
    points = points[np.isfinite(points).all((1, 2))]
    return points if len(points) else None


_READERS = {
    ".npy": lambda path: list(np.load(path, allow_pickle=False)),
    ".json": lambda path: list(json.loads(path.read_text(encoding="utf-8"))),
}


def choose_face(found: Sequence[Points | None], face: int | Literal["largest"] = "largest") -> list[Points | None]:
    """One face of each frame, `(68, 2)`: the one with the largest bounding box, or number `face` from the left.

    A frame with too few faces counts as one without. Frames are looked at one by one: of two faces about equally large
    "largest" may take now one and now the other; take a number.
    """
    if face != "largest" and (not isinstance(face, int) or isinstance(face, bool) or face < 0):
        raise ValueError(f"expected 'largest' or the number of a face, from 0 on; got {face!r}; count from the left")
    return [None if points is None else _pick(points, face) for points in found]


def _pick(points: Points, face: int | Literal["largest"]) -> Points | None:
    if face == "largest":
        largest: Points = points[np.ptp(points, axis=1).prod(-1).argmax()]
        return largest
    order = points[:, :, 0].mean(1).argsort()
    return points[order[face]] if face < len(points) else None


def fill_missing(points: Sequence[Points | None], missing: Literal["hold", "blank"] = "hold") -> list[Points | None]:
    """What stands for frames without a face: "hold" the last face before, or the first one after; "blank" for none.

    Raises:
        ValueError: "hold" and no face in any frame.
    """
    if missing not in ("hold", "blank"):
        raise ValueError(f"expected missing 'hold' or 'blank'; got {missing!r}; pick one")
    if missing == "blank":
        return list(points)
    last = next((known for known in points if known is not None), None)
    if last is None:
        raise ValueError(
            f"expected a face in at least one of {len(points)} frames; got none; crop nearer, or use 'blank'"
        )
    filled: list[Points | None] = []
    for known in points:
        last = last if known is None else known
        filled.append(last)
    return filled


def check_points(points: Points) -> None:
    """Raise where `points` are not those of one face."""
    if points.shape != (POINTS, 2) or not np.isfinite(points).all():
        raise ValueError(
            f"expected finite points of one face, {(POINTS, 2)}; got shape {points.shape}; use choose_face first"
        )


def scale_points(points: Points, old: tuple[int, int], new: tuple[int, int]) -> Points:
    """Points in a frame of `old` (height, width) resized to `new`: x' = x new / old, without half pixels."""
    scaled: Points = points * (new[1] / old[1], new[0] / old[0])
    return scaled


def draw_landmarks(frame: Pixels, points: Points) -> Pixels:
    """A frame with the contours and points of a face on it, to look at."""
    check_points(points)
    image = Image.fromarray(frame)
    draw, size = ImageDraw.Draw(image), max(1, min(frame.shape[:2]) // 256)
    pixels = [(round(x), round(y)) for x, y in points]
    for first, last in _LINES + _RINGS:
        line = pixels[first:last]
        draw.line(line + line[:1] * ((first, last) in _RINGS), fill="yellow", width=size)
    for x, y in pixels:
        draw.ellipse((x - size, y - size, x + size, y + size), fill="red")
    return np.asarray(image)
