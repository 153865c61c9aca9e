"""What lies in the folders that the page may show: comparisons, runs of distillation, clips.

Only what is found here is opened: a visitor chooses by a name of this list, and no path comes from the page.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..comparison.opening import RESULT
from ..distill.training.log import LOG
from ..media.clip import Clip
from ..media.outputs import FRAME, VIDEO_ENDINGS

MOST_FRAMES, MOST_SIDE = 120, 512
"""Of a clip on the page: more frames are thinned out, larger ones are made smaller."""
MOST_FOLDERS = 5000
"""That are looked through, over all named ones."""
SHEETS = "sheets"
CLIPS = (*VIDEO_ENDINGS, ".webm", ".gif")


class Folders:
    """The named folders, looked through anew at every question."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = tuple(folder.resolve() for folder in folders)

    def comparisons(self) -> dict[str, Path]:
        """Name -> folder that `diffattn compare` wrote."""
        return self._named(place for place, names in self._walk() if RESULT in names)

    def runs(self) -> dict[str, Path]:
        """Name -> folder of a run of `diffattn distill`."""
        return self._named(place for place, names in self._walk() if LOG in names)

    def clips(self) -> dict[str, Path]:
        """Name -> video file, GIF, or folder of numbered frames."""
        return self._named(self._clips())

    def _clips(self) -> Iterator[Path]:
        for place, names in self._walk():
            yield from (place / name for name in names if Path(name).suffix.lower() in CLIPS)
            if any(map(FRAME.fullmatch, names)):
                yield place

    def _walk(self) -> Iterator[tuple[Path, list[str]]]:
        """Every folder below the named ones with its files; hidden ones and links that lead out are left alone."""
        count = 0
        for folder in self.folders:
            for place, inner, names in os.walk(folder):
                inner[:] = sorted(name for name in inner if not name.startswith("."))
                count += 1
                if count > MOST_FOLDERS:
                    return
                kept = sorted(name for name in names if not name.startswith("."))
                yield Path(place), [name for name in kept if within(Path(place) / name, folder)]

    def _named(self, paths: Iterator[Path]) -> dict[str, Path]:
        found = {}
        for path in paths:
            folder = next(one for one in self.folders if path.is_relative_to(one))
            found[str(Path(folder.name) / path.relative_to(folder))] = path
        return found


def within(path: Path, folder: Path) -> bool:
    """Does it lie in the folder, links followed?"""
    return path.resolve().is_relative_to(folder)


def sheets(run: Path) -> dict[str, Path]:
    """Name -> sheet of images of a run, in the order of the steps."""
    found = sorted((run / SHEETS).glob("step-*.png")) if (run / SHEETS).is_dir() else []
    found += [run / "sheet.png"] if (run / "sheet.png").is_file() else []
    return {path.stem: path for path in found if within(path, run)}


@dataclass(frozen=True)
class Frames:
    """Frames of a clip as the page shows them."""

    images: list[Image.Image]
    rate: float
    """Of the images, a second."""
    told: str
    """What was left out or made smaller; empty where nothing was."""


def frames_of(path: Path) -> Frames:
    """Read a clip; raises `ValueError` for a file that is none."""
    clip = Clip(path=path)
    kept: list[Image.Image] = []
    stride, size = 1, (0, 0)
    for number, pixels in enumerate(clip.frames()):
        if number % stride:
            continue
        frame = Image.fromarray(np.asarray(pixels))
        size = frame.size
        frame.thumbnail((MOST_SIDE, MOST_SIDE))
        kept.append(frame)
        if len(kept) > MOST_FRAMES:
            kept, stride = kept[::2], 2 * stride
    told = [f"every {stride}th frame is shown" if stride > 2 else "every second frame is shown"] if stride > 1 else []
    told += [f"{size[0]} x {size[1]} pixels are shown smaller"] if size != kept[0].size else []
    return Frames(kept, float(clip.rate / stride), "; ".join(told))
