"""A record beside what a command made: its options, the releases it ran on and the files, in a JSON file.

    {"command": "generate", "options": {"model": "tiny", "seed": 0, ...},
     "made": {"files": ["image.png"], "height": 128, "width": 128},
     "versions": {"diffattn": "0.1.0", "torch": "2.13.0", ...}}

The options are those of the command line by their names, so that `--config` reads them, with what they came to: device,
dtype and threads. No path is in it but those that were typed.

The record of `a.png` is `a.json`; where that is the record of another file, such as `a.jpg`, it is `a.png.json`.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .tables import read_table
from .writing import write_json

PACKAGES = ("diffattn", "torch", "diffusers", "transformers")
"""Whose releases may change an image."""


def versions() -> dict[str, str]:
    """The releases that are installed here."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # a bare checkout has none of its own
            found[name] = version(name)
    return found


@dataclass(frozen=True, kw_only=True)
class Record:
    """What made some files."""

    command: str
    options: Mapping[str, Any]
    made: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)

    @classmethod
    def read(cls, path: Path) -> "Record":
        """From a file; `ValueError` where it holds something else."""
        return cls.from_table(read_table(path, "record"), path)

    @classmethod
    def from_table(cls, values: Mapping[str, Any], path: Path) -> "Record":
        """From a table that was read from `path`."""
        names = ("command", "options", "made", "versions")
        kinds = (str, dict, dict, dict)
        if set(values) != set(names) or not all(map(isinstance, map(values.get, names), kinds)):
            raise ValueError(
                f"expected the record of an image or video in {path}, a JSON file with {', '.join(names)}; got "
                "something else; name a file that diffattn wrote beside one"
            )
        return cls(**values)

    def differences(self) -> list[str]:
        """Releases that are others here, in words."""
        here = versions()
        return [
            f"{name} {own} and not {here.get(name, 'none')}"
            for name, own in self.versions.items()
            if own != here.get(name)
        ]


def is_record(values: Any) -> bool:
    """Whether a table is one of a record."""
    return isinstance(values, dict) and set(values) == {"command", "options", "made", "versions"}


def path_beside(output: Path, full: bool = False) -> Path:
    """Where the record of an image, a video or a folder of frames lies; `full`: with its ending in the name."""
    return output.with_name(f"{output.name if full else output.stem}.json")


def find_record(path: Path) -> Path:
    """The record that is meant: the JSON file itself, or that which names an image, a video, a folder or its frame."""
    if path.suffix.lower() == ".json":
        return path
    if not path.name:
        raise ValueError(f"expected an image, a video, or the JSON file beside one; got {str(path)!r}: name a file")
    for own in (path, path.parent):  # a frame's record is that of its folder
        places = [path_beside(own), path_beside(own, full=True)] if own.name else []
        others = sorted(own.parent.glob("*.json")) if own.name and own.parent.is_dir() else []
        found = next((place for place in (*places, *others) if own.name in _files_of(place)), None)
        if found is not None:
            return found
    beside = path_beside(path)
    if not beside.is_file():
        raise ValueError(f"expected a record beside {path}, {beside.name}; there is none; name a JSON file")
    files = ", ".join(map(str, Record.read(beside).made.get("files", ()))) or "nothing"
    raise ValueError(
        f"expected a record that names {path}; {beside.name} is that of {files}: name the JSON file itself"
    )


def _files_of(path: Path) -> tuple[str, ...]:
    """The files that a record names; nothing where there is no record."""
    try:
        files = Record.read(path).made.get("files", ()) if path.is_file() else ()
    except ValueError:
        return ()
    return tuple(name for name in files if isinstance(name, str)) if isinstance(files, list) else ()


def _place(path: Path, files: list[str]) -> Path:
    """Where the record of `files` goes: `path`, unless that is the record of others that are still there."""
    places = [path, *(path.with_name(f"{name}.json") for name in files[:1])]
    numbered = (path.with_name(f"{path.stem}-{number}.json") for number in itertools.count(2))
    for place in itertools.chain(places, numbered):
        named = _files_of(place)
        theirs = [name for name in named if (path.parent / name).exists() and name not in files]
        if (place == path or named or not place.exists()) and (not theirs or set(named) & set(files)):
            return place
    raise AssertionError


def check_record(path: Path, *, overwrite: bool = False) -> None:
    """Raise `ValueError` where a record would replace a file that is none."""
    if not path.exists() or (overwrite and path.is_file()):
        return
    if path.is_file():
        with contextlib.suppress(ValueError):
            Record.read(path)
            return
    raise ValueError(
        f"{path} is there and is no record of an image or video; that of --output would replace it: add --overwrite, "
        "or give another name"
    )


@contextlib.contextmanager
def recorded(path: Path, command: str, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Write what the block makes, and then the record of it.

    Gives a dict for what was made: `files` as paths, of which names are kept, and numbers.
    """
    made: dict[str, Any] = {}
    yield made
    made["files"] = [Path(file).name for file in made.get("files", ())]
    path = _place(path, made["files"])
    record = Record(command=command, options={name: plain(value) for name, value in options.items()}, made=made)
    write_json(path, {"command": command, "options": record.options, "made": made, "versions": record.versions})


def plain(value: Any) -> Any:
    """An option as JSON has it, and as options are read from a file."""
    if isinstance(value, Mapping):
        return {str(name): plain(own) for name, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(own) for own in value]
    if isinstance(value, (Path, Fraction)) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    return value
