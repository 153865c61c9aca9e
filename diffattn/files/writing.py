"""Write files whole or not at all."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PART = ".diffattn-part"
"""In the temporary names of `written`, and in no other: what a killed run left is told from others' hidden files."""


@contextlib.contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path`, with its ending; renamed to `path` at the end, removed where the block raises.

    Folders that are missing are made.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=f"{PART}{target.suffix}", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def check_new_folder(path: str | os.PathLike[str]) -> Path:
    """The path; raises `ValueError` where something is there."""
    if Path(path).exists():
        raise ValueError(f"expected the name of a new folder; {path} is there; remove it or give another name")
    return Path(path)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `path`; renamed to `path` at the end, removed where the block raises.

    Folders that are missing are made. Raises `ValueError` where something is there.
    """
    target = check_new_folder(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(target.parent.stat().st_mode & 0o777)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


_TEMPORARY = re.compile(r"\.(?P<stem>.+)-[a-z0-9_]{8}" + re.escape(PART) + r"(?P<ending>\.[^.]*)?")


def final_name(name: str) -> str | None:
    """The name that a file of `written` would have got, by its temporary one; None for other names."""
    match = _TEMPORARY.fullmatch(name)
    return None if match is None else match["stem"] + (match["ending"] or "")


def remove_temporary(path: Path) -> None:
    """Remove what `written(path)` left where the process was killed."""
    if path.parent.is_dir():
        for file in list(path.parent.iterdir()):
            if final_name(file.name) == path.name:
                file.unlink(missing_ok=True)


def others_in(folder: Path, own: Sequence[str]) -> Iterator[Path]:
    """What lies in `folder`, or in a folder of the run's in it, and is not the run's own.

    Args:
        folder: need not be there.
        own: regular expressions of the run's files, relative to the folder, part by part: `latents/.+\\.f32`. Their
            folders count as the run's, and so do half-written files of these names that `written` left.
    """
    for path in _reached(folder, own):
        if not (_is_own_file(path, folder, own) or _is_own_folder(path, folder, own)):
            yield path


def remove_own(folder: Path, own: Sequence[str]) -> None:
    """Remove a run's files in `folder`, one by one, and their folders where nothing else is in them.

    The folder itself stays, and links are not followed. `own`: as for `others_in`.
    """
    for path in sorted(_reached(folder, own), key=lambda path: len(path.parts), reverse=True):
        if _is_own_file(path, folder, own):
            path.unlink(missing_ok=True)
        elif _is_own_folder(path, folder, own):
            remove_empty(path)


def remove_empty(folder: Path) -> None:
    """Remove a folder in which nothing is; any other stays."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def _reached(folder: Path, own: Sequence[str]) -> Iterator[Path]:
    """Everything in a folder and in those of its folders that are a run's."""
    for place, folders, files in os.walk(folder):
        yield from (Path(place) / name for name in (*sorted(folders), *sorted(files)))
        folders[:] = [name for name in folders if _is_own_folder(Path(place) / name, folder, own)]


def _is_own_file(path: Path, folder: Path, own: Sequence[str]) -> bool:
    if path.is_dir() and not path.is_symlink():
        return False
    *parents, name = path.relative_to(folder).parts
    return any(_fits((*parents, final_name(name) or name), pattern.split("/")) for pattern in own)


def _is_own_folder(path: Path, folder: Path, own: Sequence[str]) -> bool:
    parts = path.relative_to(folder).parts
    is_folder = path.is_dir() and not path.is_symlink()
    return is_folder and any(_fits(parts, pattern.split("/")[:-1][: len(parts)]) for pattern in own)


def _fits(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    return len(parts) == len(patterns) and all(map(re.fullmatch, patterns, parts))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8 text."""
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | os.PathLike[str], values: Any) -> Path:
    """Write indented JSON; NaN and infinity, which JSON lacks, raise `ValueError`."""
    return write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")
