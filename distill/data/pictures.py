"""Images with captions: in a folder, or in the shards of a webdataset, which may hold videos too (`clips.py`).

A folder holds NAME.jpg, .png or the like (`PICTURE_ENDINGS` of `diffattn.media.pictures`) at any depth. The caption
lies in NAME.json (`prompt`, `caption` or `text`), in NAME.txt, or in a metadata.jsonl or metadata.json whose entries
have a `file_name` relative to it; the first of these that says something counts. A shard is a .tar with NAME.png and
NAME.json or NAME.txt side by side.
"""

import io
import json
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffattn.files.writing import write_json, written
from diffattn.media.pictures import PICTURE_ENDINGS as ENDINGS
from diffattn.media.pictures import read_picture

logger = logging.getLogger("diffattn")

T = TypeVar("T")

CAPTION_KEYS = ("prompt", "caption", "text")
METADATA = ("metadata.jsonl", "metadata.json")
CLIP_ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".gif")
"""Of what counts as a video in a folder."""


@dataclass(frozen=True)
class Captioned:
    """An image or a clip in a folder, with its caption."""

    name: str
    """Path below the folder, with slashes and without the ending."""
    path: Path
    caption: str


@dataclass(frozen=True)
class Packed:
    """An image or a video in a shard, with its caption."""

    name: str
    """SHARD/NAME."""
    ending: str
    data: bytes
    """The picture's file; `load_picture(io.BytesIO(data), size)` reads it."""
    caption: str


@dataclass(frozen=True)
class Counts:
    """What became of the images or clips that one process worked on."""

    done: int = 0
    skipped: int = 0
    """Whole before the call."""
    corrupt: int = 0
    """Unreadable, or too short; each was named in a warning."""


def find_pictures(folder: str | os.PathLike[str], *, told: bool = True) -> list[Captioned]:
    """All images of a folder by name; raises `ValueError` where there are none, or any without a caption.

    The images themselves are not opened. Videos are left out; `told`: with a warning.
    """
    root = Path(folder)
    files = list_files(root)
    pictures = pictures_in(files)
    videos = [file for file in files if os.path.splitext(file)[1].lower() in CLIP_ENDINGS]
    if not pictures:
        what = f"{len(videos)} videos only; say how many frames a clip has" if videos else "none"
        raise ValueError(
            f"expected images ({', '.join(ENDINGS)}) in {root}, got {what}; give the folder that holds them"
        )
    if videos and told:
        logger.warning("videos are left out where no number of frames is given: %s", named(videos))
    return with_captions(root, files, pictures, "image")


def with_captions(root: Path, files: Sequence[str], found: Mapping[str, str], what: str) -> list[Captioned]:
    """Images or clips of a folder, files by name, with their captions; raises `ValueError` where any has none."""
    known, listed = set(files), _listed_captions(root, [*files, *found.values()])
    captions = {name: _caption_beside(root, name, known) or listed.get(file, "") for name, file in found.items()}
    absent = [found[name] for name, caption in captions.items() if not caption]
    if absent:
        raise ValueError(
            f"expected a caption for every {what} of {root}, got none for {named(absent)}; write it to NAME.txt, to "
            f'NAME.json as {{"prompt": ...}}, or to {METADATA[0]}'
        )
    return [Captioned(name, root / found[name], caption) for name, caption in captions.items()]


def check_output(folder: str | os.PathLike[str]) -> None:
    """Raise `ValueError` where no files can be written to a folder, which need not be there yet; nothing is made."""
    place = Path(folder)
    if not str(folder):
        raise ValueError("expected a folder for the output; got an empty name; give one")
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"expected a folder for the output; {place} is a file; give another name")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"expected a folder that can be written to; {place} cannot; give another one")


def list_files(folder: Path) -> list[str]:
    """Paths of the files below a folder, relative and sorted.

    Hidden ones are left out: among them are the unfinished files of a process that was killed.
    """
    if not folder.is_dir():
        raise ValueError(f"expected a folder, got {folder}, which is none; check the path")
    found: list[str] = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(place).relative_to(folder)
        found += [(below / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(found)


def pictures_in(files: Iterable[str]) -> dict[str, str]:
    """Names of the images among some files, with the file of each."""
    pictures: dict[str, str] = {}
    for file in files:
        name, ending = os.path.splitext(file)
        if ending.lower() not in ENDINGS:
            continue
        if name in pictures:
            raise ValueError(f"{pictures[name]} and {file} would share one caption and one cache; rename one of them")
        pictures[name] = file
    return pictures


def load_picture(source: str | os.PathLike[str] | BinaryIO, size: tuple[int, int]) -> Tensor:
    """An image, resized to cover `size` (height, width) and cropped at its centre: float32 (3, h, w) in [-1, 1].

    It is read as `read_picture` of `diffattn.media.pictures` does, and what is clear becomes white. Raises `ValueError`
    with its name where it can't be read.
    """
    height, width = size
    try:
        picture = Image.fromarray(read_picture(source).on_white)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} is not a whole image ({error}); replace or remove it") from error
    fitted = ImageOps.fit(picture, (width, height), method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float().div(127.5).sub(1).contiguous()


def share(items: Sequence[T], rank: int, world: int) -> Sequence[T]:
    """The part of process `rank` among `world`."""
    _check_place(rank, world)
    return items[rank::world]


def _check_place(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"expected a rank from 0 to world - 1, got rank {rank} of {world}; count processes from 0")


def own_place(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(rank, world) of this process, as torchrun and `accelerate launch` say it by RANK and WORLD_SIZE; else (0, 1).

    >>> own_place({"RANK": "1", "WORLD_SIZE": "4"})
    (1, 4)
    """
    said = [environment.get(name) for name in ("RANK", "WORLD_SIZE")]
    if said == [None, None]:
        return 0, 1
    try:
        rank, world = (int(value or "") for value in said)
        if not 0 <= rank < world:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"expected RANK from 0 to WORLD_SIZE - 1 in the environment, got RANK={said[0]} WORLD_SIZE={said[1]}; set "
            f"both, or neither for a single process"
        ) from None
    return rank, world


def named(names: Sequence[str], most: int = 3) -> str:
    """How many, and the first few.

    >>> named(["a", "b", "c", "d", "e"])
    '5 (a, b, c, ...)'
    """
    return f"{len(names)} ({', '.join([*names[:most], *(['...'] if len(names) > most else [])])})"


def find_shards(patterns: Iterable[str]) -> list[Path]:
    """The files that paths with ranges such as `data-{000..009}.tar` name; raises `ValueError` where any is missing."""
    paths = [Path(path) for pattern in patterns for path in _expanded(pattern)]
    absent = [str(path) for path in paths if not path.is_file()]
    if absent or not paths:
        raise ValueError(f"expected shards like data-{{000..009}}.tar, each a file, got none for {named(absent)}")
    return paths


def _expanded(pattern: str) -> list[str]:
    """The texts of a pattern with ranges; numbers have as many digits as the first."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    before, after = pattern[: found.start()], _expanded(pattern[found.end() :])
    numbers = range(int(found[1]), int(found[2]) + 1)
    return [f"{before}{number:0{len(found[1])}d}{rest}" for number in numbers for rest in after]


def read_shards(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Packed]:
    """The images of some shards, in order.

    A corrupt image is left out with a warning, and their number is said at the end. Raises `ValueError` for a shard
    that is not whole, an image without a caption, and where every image is corrupt.
    """
    total = corrupt = 0
    for packed in _packed(paths):
        total += 1
        try:
            read_picture(io.BytesIO(packed.data))
        except ValueError as error:
            corrupt += 1
            logger.warning("corrupt image: %s in a shard (%s)", packed.name, error)
            continue
        yield packed
    if corrupt == total:
        raise ValueError(f"expected images in the shards, got {corrupt} corrupt ones only; write the shards again")
    if corrupt:
        logger.warning("%d of the %d images in the shards are corrupt and left out", corrupt, total)


def unpack_shards(
    paths: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    endings: Sequence[str] = ENDINGS,
    rank: int = 0,
    world: int = 1,
) -> Counts:
    """Write the images of some shards to a folder, as SHARD/NAME.png and .json; what is there already is skipped.

    They are not opened: what reads them next names the corrupt ones.

    Args:
        endings: of what is unpacked; `CLIP_ENDINGS` for videos.
        rank: of `world` processes on one folder, each begins with another shard and goes through all of them, so that
            each finds the whole folder when it is done.
    """
    _check_place(rank, world)
    first = rank * len(paths) // world
    done = skipped = 0
    for packed in _packed([*paths[first:], *paths[:first]], endings):
        picture, caption = (Path(folder) / f"{packed.name}{ending}" for ending in (packed.ending, ".json"))
        if _is_there(packed, picture, caption):
            skipped += 1
            continue
        with written(picture) as temporary:
            temporary.write_bytes(packed.data)
        write_json(caption, {"prompt": packed.caption})
        done += 1
    return Counts(done, skipped)


def _is_there(packed: Packed, picture: Path, caption: Path) -> bool:
    """Is it the same image with the same caption that lies there?"""
    try:
        return picture.read_bytes() == packed.data and json.loads(caption.read_bytes()) == {"prompt": packed.caption}
    except (OSError, ValueError):
        return False


def _packed(paths: Iterable[str | os.PathLike[str]], endings: Sequence[str] = ENDINGS) -> Iterator[Packed]:
    shards = [Path(path) for path in paths]
    if len({shard.stem for shard in shards}) < max(1, len(shards)):
        raise ValueError(f"expected .tar shards, each of another name, got {[str(shard) for shard in shards]}")
    for shard in shards:
        yield from (_pack(shard, sample, endings) for sample in _samples(shard))


def _samples(shard: Path) -> Iterator[dict[str, Any]]:
    """The samples of a shard: contents by ending, and `__key__`."""
    try:
        from webdataset.tariterators import group_by_keys, tar_file_expander
    except ImportError as error:
        raise ImportError('shards need webdataset: pip install "diffattn[train]"') from error
    try:
        # Opened here: webdataset takes a path for an URL, which may be a command to run, and leaves the file open.
        with shard.open("rb") as stream:
            yield from group_by_keys(tar_file_expander([{"url": str(shard), "stream": stream}]))
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"shard {shard} is not whole ({error}); download or write it again") from error


def _pack(shard: Path, sample: dict[str, Any], endings: Sequence[str]) -> Packed:
    key = sample["__key__"]
    name = f"{shard.stem}/{key}"
    if key.startswith("/") or ".." in PurePosixPath(key).parts:
        raise ValueError(f"expected names below the shard's own, got {key!r} in {shard}; write the shard again")
    ending = next((ending for ending in endings if ending[1:] in sample), None)
    caption = _caption_of(_parse_json(sample.get("json", b"null"), name)) or _text(sample.get("txt", b""), name)
    if ending is None or not caption:
        what = "an image" if endings == ENDINGS else "a video"
        got = sorted(name for name in sample if not name.startswith("__"))
        raise ValueError(
            f"expected {what} and a caption (json or txt) for {name}, got {', '.join(got)} only; files of one name "
            f"must lie next to each other in the shard"
        )
    return Packed(name, ending, sample[ending[1:]], caption)


def _caption_beside(root: Path, name: str, files: set[str]) -> str:
    """The caption in NAME.json or NAME.txt; empty where there is none."""
    caption = ""
    if f"{name}.json" in files:
        caption = _caption_of(_json(root / f"{name}.json"))
    if not caption and f"{name}.txt" in files:
        path = root / f"{name}.txt"
        caption = _text(path.read_bytes(), path)
    return caption


def _listed_captions(root: Path, files: Sequence[str]) -> dict[str, str]:
    """The captions in the metadata files, by image file."""
    captions: dict[str, str] = {}
    for file in map(PurePosixPath, files):
        if file.name in METADATA:
            for entry in _entries(root / file):
                captions[(file.parent / entry["file_name"]).as_posix()] = _caption_of(entry)
    absent = sorted(captions.keys() - set(files))
    if absent:
        logger.warning("metadata in %s describe files that are not there: %s", root, named(absent))
    return captions


def _entries(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        # Not splitlines(), which also splits at characters that may stand inside a JSON string.
        lines = _text(path.read_bytes(), path).split("\n")
        entries = [_parse_json(line, path) for line in lines if line.strip()]
    else:
        entries = _json(path)
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("file_name"), str) for entry in entries
    ):
        raise ValueError(f'expected entries like {{"file_name": "1.png", "text": ...}} in {path}, got others')
    return entries


def _caption_of(entry: Any) -> str:
    """The first caption of an entry that is not blank; empty where there is none."""
    values = [entry.get(key) for key in CAPTION_KEYS] if isinstance(entry, dict) else []
    return next((value.strip() for value in values if isinstance(value, str) and value.strip()), "")


def _json(path: Path) -> Any:
    return _parse_json(path.read_bytes(), path)


def _parse_json(data: str | bytes, source: object) -> Any:
    try:
        return json.loads(data if isinstance(data, str) else data.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{source} is not JSON ({error}); write it again") from error


def _text(data: bytes, source: object) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text ({error}); convert it") from error
