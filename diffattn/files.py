"""Write files whole or not at all."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path`, with its ending; renamed to `path` at the end, removed where the block raises.

    Folders that are missing are made.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
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
