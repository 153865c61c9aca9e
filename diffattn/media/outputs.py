"""Where results are to go, tried before the work starts: nothing is lost after it, and nothing is replaced unasked.

The checks make no folder and leave no file. They raise `ValueError` in one line that names the option.
"""

import io
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from ..files.writing import PART, final_name
from .pictures import LONGEST_SIDE
from .video import ENDINGS
from .video import LONGEST_SIDE as LONGEST_VIDEO_SIDE

VIDEO_ENDINGS = ENDINGS
"""Of video files."""

LARGEST_VIDEO = (2**31 - 1) // 8
"""FFmpeg encodes fewer than so many pixels, with a border of 128 in rows and columns."""

FRAME = re.compile(r"frame-(\d{4,})\.png")
"""Names of the images in a folder that stands for a video, numbered from 0."""


def check_file(
    path: Path, endings: Sequence[str] = (), *, overwrite: bool = False, own: bool = False, option: str = "--output"
) -> None:
    """Raise unless a file can be written to `path`.

    Args:
        path: need not exist, nor its folder.
        endings: of the name, in lower case; none given: any.
        overwrite: a file that is there may be replaced.
        own: what is there was made by the run that goes on now.
        option: that `path` was given by.
    """
    if _exists(path, option) and path.is_dir():
        raise ValueError(
            f"expected a file name for {option}; got {path}, which is a folder; name a file in it{_such(endings)}"
        )
    if endings and path.suffix.lower() not in endings:
        raise ValueError(
            f"expected a file name that ends in {', '.join(endings)} for {option}; got {path}; rename the output"
        )
    if _exists(path, option) and not (overwrite or own):
        raise ValueError(f"{path} is there, and {option} would replace it: add --overwrite, or give another name")
    _try_place(path.parent, path.name, option)


def check_folder(path: Path, *, option: str = "--output") -> None:
    """Raise unless files can be written to the folder `path`, which need not exist."""
    if _exists(path, option) and not path.is_dir():
        raise ValueError(f"expected a folder for {option}; got {path}, which is a file; give another name")
    _try_place(path, "file", option)


def check_frames(path: Path, count: int | None = None, *, overwrite: bool = False, option: str = "--output") -> None:
    """Raise unless the frames of a video can be written to the folder `path`.

    Frames of another video in it are refused unless `overwrite`; those below `count` are of the run that goes on now.
    """
    check_folder(path, option=option)
    former = [number for number in frames_in(path) if count is None or number >= count]
    if former and not overwrite:
        raise ValueError(
            f"{path} has {len(former)} frames of another video, and {option} would mix them up: add --overwrite, which "
            "removes them, or give another folder"
        )


def check_video_size(height: int, width: int) -> None:
    """Raise for a frame that H.264 cannot hold; odd sides are rounded up, as they are written."""
    rows, columns = height + height % 2, width + width % 2
    if max(rows, columns) > LONGEST_VIDEO_SIDE or (rows + 128) * (columns + 128) >= LARGEST_VIDEO:
        raise ValueError(
            f"expected frames of at most {LONGEST_VIDEO_SIDE} pixels a side, and {LARGEST_VIDEO:,} in all, for a video "
            f"file of H.264; got {height} x {width}; make it smaller, or write images"
        )


def check_picture_ending(path: Path, *, option: str = "--output") -> None:
    """Raise unless Pillow writes images by the ending of `path`; it reads more kinds than it writes."""
    kind = Image.registered_extensions().get(path.suffix.lower(), "")
    try:
        Image.new("RGB", (8, 8)).save(io.BytesIO(), kind)
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(
            f"{option} {path}: cannot write {path.suffix!r}; use .png, .jpg, .webp or, for videos, .mp4"
        ) from error


def check_picture_size(path: Path, height: int, width: int) -> None:
    """Raise for an image that the format of `path` cannot hold."""
    kind = Image.registered_extensions().get(path.suffix.lower(), "")
    most = LONGEST_SIDE.get(kind)
    if most is not None and max(height, width) > most:
        raise ValueError(f"expected sides of at most {most} pixels for {kind}; got {height} x {width}; write a .png")


def frames_in(folder: Path) -> list[int]:
    """The numbers of the frames in a folder."""
    if not folder.is_dir():
        return []
    found = (FRAME.fullmatch(file.name) for file in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def trim_frames(folder: Path, count: int) -> None:
    """Remove frames from `count` on, which are of a former video, and those that a killed run left half-written."""
    for file in list(folder.iterdir()):
        match = FRAME.fullmatch(final_name(file.name) or file.name)
        if match and (int(match[1]) >= count or file.name.startswith(".")):
            file.unlink(missing_ok=True)


def _exists(path: Path, option: str) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except OSError as error:
        raise ValueError(f"cannot write {path} for {option}: {error.strerror or error}; give another name") from error


def _try_place(folder: Path, name: str, option: str) -> None:
    """Make a file by the name that it would first be written by, in the nearest folder that is there."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if _exists(place, option))
    if not there.is_dir():
        raise ValueError(
            f"expected a folder to write to for {option}; got {folder}, and {there} is a file; give another name"
        )
    try:
        with tempfile.NamedTemporaryFile(prefix=f".{Path(name).stem}-", suffix=PART + Path(name).suffix, dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"expected a folder to write to for {option}; got {folder}, and {there} cannot be written: "
            f"{error.strerror or error}; give another one"
        ) from error


def _such(endings: Iterable[str]) -> str:
    first = next(iter(endings), None)
    return "" if first is None else f", such as out{first}"
