"""Frames of a video file or of a folder of images, one by one, and how to tell them from others."""

import functools
import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image

from ..options import Help, at_least, check_fields
from .pictures import find_pictures, read_picture
from .video import Pixels, probe, read_frames

logger = logging.getLogger("diffattn")

PANEL = "Input video"
FOLDER_RATE = Fraction(25)
"""Frames per second of a folder of images, unless it is told."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """The part of a video file, or of a folder of images of one size, that is used.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: no video, no images, or a rate for a video file, which has its own.
    """

    path: Path
    start: Annotated[int, at_least(0), Help("First frame used.", panel=PANEL)] = 0
    count: Annotated[int | None, at_least(1), Help("Most frames used. Default: all.", "--frames", panel=PANEL)] = None
    skip: Annotated[int, at_least(0), Help("Frames left out after each used; the rate falls.", panel=PANEL)] = 0
    fps: Annotated[Fraction | None, Help("Frame rate of a folder, such as 30000/1001. Default: 25.", panel=PANEL)] = (
        None
    )
    square: bool = False
    """Widen or narrow frames whose pixels are not square."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.path.is_dir():
            find_pictures([self.path])
            if self.fps is not None and self.fps <= 0:
                raise ValueError(f"expected --fps above 0; got {self.fps}; {FOLDER_RATE} is the default")
            return
        read_frames(self.path, self.start, self.count, self.skip)
        if self.fps is not None:
            raise ValueError(f"--fps is for a folder of frames; {self.path} has a rate of its own: leave --fps out")

    @property
    def rate(self) -> Fraction:
        """Of the frames used, a second."""
        whole = (self.fps or FOLDER_RATE) if self.path.is_dir() else probe(self.path).rate
        return whole / (self.skip + 1)

    @property
    def aspect(self) -> Fraction:
        """Width of a pixel of the frames as it is shown to its height."""
        return Fraction(1) if self.square else self._stored_aspect

    @property
    def _stored_aspect(self) -> Fraction:
        return Fraction(1) if self.path.is_dir() else probe(self.path).aspect

    @property
    def sound(self) -> Path | None:
        """The file that may have sound."""
        return None if self.path.is_dir() else self.path

    @property
    def begin(self) -> float:
        """Seconds before the first frame used."""
        return float(self.start / (self.rate * (self.skip + 1)))

    def frames(self) -> Iterator[Pixels]:
        """The frames used, uint8 RGB; raises `ValueError` where there is none, or one of another size."""
        if self.path.is_dir():
            stop = None if self.count is None else self.start + (self.count - 1) * (self.skip + 1) + 1
            files = itertools.islice(find_pictures([self.path]), self.start, stop, self.skip + 1)
            return self._alike(map(read_opaque, files))
        stored = self._alike(read_frames(self.path, self.start, self.count, self.skip))
        return map(functools.partial(_widened, aspect=self._stored_aspect), stored) if self.square else stored

    def _alike(self, frames: Iterable[Pixels]) -> Iterator[Pixels]:
        size = None
        for number, frame in enumerate(frames):
            size = size or frame.shape
            if frame.shape != size:
                raise ValueError(
                    f"expected frames of one size in {self.path}; got {frame.shape[:2]} for number {number} of those "
                    f"used after {size[:2]}; resize them"
                )
            yield frame
        if size is None:
            raise ValueError(f"expected a frame from --start {self.start} on in {self.path}; got none; begin earlier")

    def digest(self) -> str:
        """Tells other frames apart, by the bytes of their files."""
        return digest(*(find_pictures([self.path]) if self.path.is_dir() else [self.path]))


def _widened(frame: Pixels, aspect: Fraction) -> Pixels:
    if aspect == 1:
        return frame
    height, width = frame.shape[:2]
    return np.array(Image.fromarray(frame).resize((max(1, round(width * aspect)), height), Image.Resampling.BICUBIC))


def read_opaque(path: Path) -> Pixels:
    """An image file as uint8 RGB; what is transparent shows white, and the log says so."""
    picture = read_picture(path)
    if picture.alpha is None or (picture.alpha == 255).all():
        return picture.pixels
    logger.warning("%s: transparent in places; put on white", path)
    canvas = Image.new("RGB", picture.pixels.shape[1::-1], "white")
    canvas.paste(Image.fromarray(picture.pixels), mask=Image.fromarray(picture.alpha))
    return np.asarray(canvas)


def digest(*paths: Path) -> str:
    """SHA-256 of files, one after the other."""
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
