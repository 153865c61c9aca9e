"""Clips with captions: the first frames of video files, of GIFs, and of folders of images.

A folder holds NAME.mp4 or the like (`ENDINGS`) at any depth, or NAME/ with a clip's frames as images in natural order
and no captions among them. The caption lies beside it: in NAME.json, NAME.txt or a metadata file, as that of an image
(`pictures.py`). Frames are read as everywhere in the library, see `diffattn.media.clip`: a folder has 25 of them a
second.
"""

import itertools
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffattn.media.clip import Clip, digest
from diffattn.media.pictures import PICTURE_ENDINGS, find_pictures
from diffattn.options import Must, at_least, check_fields

from .pictures import CLIP_ENDINGS as ENDINGS
from .pictures import Captioned, list_files, named, pictures_in, with_captions

logger = logging.getLogger("diffattn")

CAPTIONS = (".json", ".jsonl", ".txt")
SAME_RATE = Fraction(99, 100)
"""A video's rate counts as one that is asked for from this share of it on: 23.976 as 24."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Which frames of a video are its clip: the first, and from there every `stride`-th, or `fps` of a second."""

    frames: Annotated[int, Must("2 or more, an image is a clip of one: leave it out", lambda frames: frames > 1)]
    stride: Annotated[int, at_least(1)] = 1
    fps: Annotated[Fraction | None, Must("a positive int or Fraction", lambda fps: fps > 0)] = None
    """Frames a second, which the video must have at least; None: as many as it has."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.fps is not None and self.stride != 1:
            raise ValueError(
                f"expected a stride or a rate (fps), got stride={self.stride} and fps={self.fps}; drop one"
            )

    @property
    def facts(self) -> dict[str, Any]:
        """What a cache of such clips says of them."""
        return {"frames": self.frames, "stride": self.stride, "fps": None if self.fps is None else str(self.fps)}

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Cut | None":
        """That of a cache's facts; None for one of images."""
        if facts.get("frames", 1) == 1:
            return None
        return cls(frames=facts["frames"], stride=facts["stride"], fps=facts["fps"])

    def step(self, rate: Fraction) -> Fraction:
        """Frames of a video of `rate` a second from one frame of the clip to the next."""
        if self.fps is None:
            return Fraction(self.stride)
        if rate < SAME_RATE * self.fps:
            raise ValueError(f"it has {float(rate):.4g} frames a second, expected {float(self.fps):.4g} or more")
        return max(Fraction(1), rate / self.fps)


def find_clips(folder: str | os.PathLike[str], *, told: bool = True) -> list[Captioned]:
    """All clips of a folder by name; raises `ValueError` where there are none, or any without a caption.

    They are not opened. Images that are no frames of a clip are left out; `told`: with a warning.
    """
    root = Path(folder)
    files = list_files(root)
    clips = clips_in(files)
    loose = [file for file in pictures_in(files).values() if str(PurePosixPath(file).parent) not in clips.values()]
    if not clips:
        what = f"{len(loose)} images only; leave the number of frames out to cache these" if loose else "none"
        raise ValueError(
            f"expected videos ({', '.join(ENDINGS)}) or folders of frames, with their captions beside them, in {root}, "
            f"got {what}"
        )
    if loose and told:
        logger.warning("images are left out of a cache of clips: %s", named(loose))
    return with_captions(root, files, clips, "clip")


def clips_in(files: Iterable[str]) -> dict[str, str]:
    """Names of the clips among some files, with the file or folder of each."""
    folders: dict[str, set[str]] = {}
    clips: dict[str, str] = {}
    for file in files:
        name, ending = os.path.splitext(file)
        folders.setdefault(str(PurePosixPath(file).parent), set()).add(ending.lower())
        if ending.lower() in ENDINGS:
            _enter(clips, name, file)
    for folder, endings in sorted(folders.items()):
        if folder != "." and endings & set(PICTURE_ENDINGS) and not endings & {*CAPTIONS, *ENDINGS}:
            _enter(clips, folder, folder)
    return dict(sorted(clips.items()))


def _enter(clips: dict[str, str], name: str, file: str) -> None:
    if name in clips:
        raise ValueError(f"{clips[name]} and {file} would share one caption and one cache; rename one of them")
    clips[name] = file


def load_clip(path: Path, size: tuple[int, int], cut: Cut) -> Tensor:
    """A clip, every frame resized to cover `size` (height, width) and cropped at its centre: float32 (3, f, h, w).

    Values are in [-1, 1]. Pixels that are not square are made so. Raises `ValueError` with the clip's name where it
    can't be read or is too short.
    """
    height, width = size
    frames = np.empty((cut.frames, height, width, 3), dtype=np.uint8)
    count = 0
    try:
        for frame in _frames(path, cut):
            fitted = ImageOps.fit(Image.fromarray(frame), (width, height), method=Image.Resampling.LANCZOS)
            frames[count] = np.asarray(fitted)
            count += 1
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole clip ({error}); replace or remove it") from error
    if count < cut.frames:
        raise ValueError(f"{path} is too short: it has {count} of {cut.frames} frames; replace or remove it")
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float().div_(127.5).sub_(1)


def digest_of(path: Path) -> str:
    """Tells a clip from others, by the bytes of its files; it need not be whole."""
    return digest(*(find_pictures([path]) if path.is_dir() else [path]))


def _frames(path: Path, cut: Cut) -> Iterable[np.ndarray]:
    """The frames of a clip one by one, as far as there are."""
    step = cut.step(Clip(path=path).rate)
    if step.denominator == 1:
        return Clip(path=path, count=cut.frames, skip=int(step) - 1, square=True).frames()
    wanted = {math.floor(number * step) for number in range(cut.frames)}
    shown = Clip(path=path, count=max(wanted) + 1, square=True).frames()
    return itertools.compress(shown, (number in wanted for number in itertools.count()))
