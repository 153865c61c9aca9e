"""Where results go: names tried before the work, files written after it."""

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files.writing import written
from ..measure.draws import makes_video
from ..media.outputs import (
    VIDEO_ENDINGS,
    check_file,
    check_folder,
    check_frames,
    check_picture_ending,
    check_picture_size,
    check_video_size,
    trim_frames,
)
from ..media.video import VideoWriter

logger = logging.getLogger("diffattn")

Frames = list[Image.Image]
"""One result: an image, or the frames of a video."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the results go, tried before the work."""

    output: Path
    count: int = 1
    """Images or videos: several are numbered."""
    compare: bool = False
    """Also those by the model's own attention, with `-full` in their names."""
    overwrite: bool = False
    """May videos that are there be replaced? Images are."""
    typed: bool = True
    """Was the name asked for? Another one, of an image, becomes a folder's where there is a video."""

    @property
    def full(self) -> Path:
        """For those by the model's own attention."""
        return self.output.with_stem(f"{self.output.stem}-full")

    @property
    def strips(self) -> Path:
        """For the frames of both, below each other."""
        return self.output.with_name(f"{self.output.stem}-strips.png")

    @property
    def paths(self) -> list[Path]:
        """All names, without what `save` changes in them."""
        return [
            path
            for output in ([self.output, self.full] if self.compare else [self.output])
            for path in numbered(output, self.count)
        ]

    def check(self) -> None:
        """Raise for names that are wrong for images and videos alike."""
        if self.output.name in ("", ".."):
            raise ValueError(f"expected a name for --output; got {self.output}, a folder that is there; name one in it")
        if self.output.suffix and self.output.suffix.lower() not in VIDEO_ENDINGS:
            check_picture_ending(self.output)
        for path in self.paths:
            check_folder(path.parent)
            if path.suffix and path.exists():
                check_file(path, overwrite=self.overwrite or path.suffix.lower() not in VIDEO_ENDINGS)

    def check_kind(self, pipe: Any, height: int | None, width: int | None) -> None:
        """Raise for names, and sizes, that are wrong for what the pipeline makes; None is a size of its own."""
        sides = height or 1, width or 1
        if makes_video(pipe) and self.compare:
            check_file(self.strips, overwrite=True)
        for path in self.paths:
            is_video = path.suffix.lower() in VIDEO_ENDINGS
            if makes_video(pipe) and path.suffix and not is_video and self.typed:
                raise ValueError(
                    f"{type(pipe).__name__} makes videos, and --output {path} is the name of an image: end it in .mp4, "
                    "or leave the ending out for a folder of frames"
                )
            if makes_video(pipe) and is_video and can_encode():
                check_file(path, overwrite=self.overwrite)
                check_video_size(*sides)
            elif makes_video(pipe):
                check_frames(path.with_suffix(""), overwrite=self.overwrite)
            elif is_video:
                raise ValueError(
                    f"{type(pipe).__name__} makes images, and --output {path} is the name of a video: end it in .png"
                )
            else:
                check_file(named_picture(path), overwrite=True)
                check_picture_size(path, *sides)

    def save_strips(self, drawn: Image.Image | None) -> list[str]:
        """Write the strips, where there are any; a line that says so."""
        if drawn is None:
            return []
        with written(self.strips) as temporary:
            drawn.save(temporary)
        return [f"wrote {self.strips}"]


def can_encode() -> bool:
    """Whether PyAV is installed."""
    return importlib.util.find_spec("av") is not None


def named_picture(path: Path) -> Path:
    """The name with the ending of an image, where it has none or that of a video."""
    return path.with_suffix(".png") if path.suffix.lower() in ("", *VIDEO_ENDINGS) else path


def numbered(output: Path, count: int) -> list[Path]:
    """The name of each of `count` results."""
    return [output] if count == 1 else [output.with_stem(f"{output.stem}-{i}") for i in range(count)]


def save(results: Sequence[Frames], output: Path, fps: int = 8) -> list[Path]:
    """Write every result to `output`, numbered where there are several; videos as .mp4, or as a folder of frames.

    Frames become a folder where `output` has another ending, or where PyAV (extra `video`) is not installed, said in
    the log.
    """
    paths = numbered(output, len(results))
    return [save_one(frames, path, fps) for frames, path in zip(results, paths, strict=True)]


def save_one(frames: Frames, path: Path, fps: int) -> Path:
    """Write an image, a video, or a folder of frames; returns what was written.

    One frame under the name of a video becomes an image, for it is not known to be a video.
    """
    if len(frames) == 1:
        path = named_picture(path)
        with written(path) as temporary:
            frames[0].save(temporary)
        return path
    if path.suffix.lower() in VIDEO_ENDINGS and can_encode():
        with VideoWriter(path, fps) as video:
            for frame in frames:
                video.write(np.asarray(frame.convert("RGB")))
        return path
    if path.suffix.lower() in VIDEO_ENDINGS:
        logger.warning('writing a folder of frames: for %s, pip install "diffattn[video]"', path.suffix)
    folder = path.with_suffix("")
    for number, frame in enumerate(frames):
        with written(folder / f"frame-{number:04d}.png") as temporary:
            frame.save(temporary)
    trim_frames(folder, len(frames))
    return folder
