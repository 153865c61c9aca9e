"""The folder beside an output that holds what a run has done, until the output is written.

Only what a run made is ever removed, file by file: a folder that holds other things is refused, or keeps them.
"""

import contextlib
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from .files import others_in, remove_empty, remove_own, remove_temporary, write_json

logger = logging.getLogger("diffattn")

SETTINGS, OUTPUT = "settings.json", "output.json"
CONTENTS, MADE = "contents", "made_folder"
"""Entries of the settings: digests of files, whose names do not count, and whether the run made the folder."""


class WorkFolder:
    """That of one output, `<output>.work`, with the run's settings in `settings.json`."""

    own: tuple[str, ...] = ()
    """Regular expressions of the files that the run makes in it, see `diffattn.files.others_in`."""

    def __init__(self, output: Path, path: Path | None = None) -> None:
        """`path`: another folder than `<output>.work`."""
        self.output, self.path = output, path or output.with_name(f"{output.name}.work")
        self._made: list[Path] = []

    def open(self, settings: dict[str, Any], resume: bool) -> None:
        """Make the folder, or go on with one of the same settings.

        Raises:
            ValueError: a folder is there without `resume`, none with it, it is of other settings, or it holds what no
                run made.
        """
        file = self.path / SETTINGS
        if resume:
            self._compare(settings)
            remove_temporary(self.output)
            return
        if file.is_file():
            raise ValueError(f"{self.path} is of a run that did not end: add --resume, or remove the folder")
        self.check_others()
        self.clear()
        self.make()
        write_json(file, {**settings, MADE: bool(self._made)})

    def clear(self) -> None:
        """Remove what a run left that was killed, before another begins."""
        made = self._made_before()
        remove_own(self.path, self._own)
        if made:
            remove_empty(self.path)

    def make(self) -> None:
        """Make the folder, unless it is there; `remove` takes away what this made."""
        if not self.path.exists():
            self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True)

    def check_others(self) -> None:
        """Raise `ValueError` where the folder holds what no run made."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"expected a folder for the run's work; got {self.path}, which is a file; move it away")
        other = next(others_in(self.path, self._own), None)
        if other is not None:
            raise ValueError(
                f"{self.path} holds things that are not of a run, such as {other.relative_to(self.path)}: move them "
                "away, or give another name"
            )

    def note_output(self) -> None:
        """That the output is written; a run that goes on after this may write it again."""
        if self.output.is_file():
            write_json(self.path / OUTPUT, _facts(self.output))

    @property
    def wrote_output(self) -> bool:
        """Whether the file that is there now is the one that this run wrote."""
        note = self.path / OUTPUT
        if not (note.is_file() and self.output.is_file()):
            return False
        return bool(json.loads(note.read_text(encoding="utf-8")) == _facts(self.output))

    def remove(self) -> None:
        """What the run made; the folder stays, with a line in the log, where anything else is in it."""
        made = self._made or ([self.path] if self._made_before() else [])
        remove_own(self.path, self._own)
        for folder in made:
            remove_empty(folder)
        other = next((path for path in others_in(self.path, self._own) if path != self.output), None)
        if other is not None:
            logger.warning("left %s: it holds things that are not of the run, such as %s", self.path, other.name)

    @property
    def _own(self) -> tuple[str, ...]:
        return (SETTINGS.replace(".", r"\."), OUTPUT.replace(".", r"\."), *self.own)

    def _made_before(self) -> bool:
        """Whether a run made the folder that goes on now."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return bool(json.loads((self.path / SETTINGS).read_text(encoding="utf-8")).get(MADE, True))
        return False

    def _compare(self, settings: dict[str, Any]) -> None:
        file = self.path / SETTINGS
        if not file.is_file():
            raise ValueError(f"--resume: there is no run in {self.path}; leave --resume out")
        try:
            former = json.loads(file.read_text(encoding="utf-8"))
            contents = dict(former.get(CONTENTS, {}))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"cannot read {file}: {error}; remove the folder, and leave --resume out") from error
        for name, value in settings.get(CONTENTS, {}).items():
            if contents.get(name) != value:
                raise ValueError(
                    f"{self.path} is of a run with another {name}, whose content has changed since: bring it back, or "
                    "remove the folder"
                )
        for name, value in settings.items():
            if name != CONTENTS and former.get(name) != value:
                raise ValueError(
                    f"{self.path} is of a run with {name}={former.get(name)}, and this one has {value}: use that, or "
                    "remove the folder"
                )


def digest_folder(folder: Path) -> str:
    """SHA-256 of a folder's files and their names, hidden ones apart: a copy of it has the same."""
    whole = hashlib.sha256()
    names = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    for name in sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)):
        with (folder / name).open("rb") as file:
            whole.update(name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _facts(output: Path) -> list[int]:
    return [output.stat().st_size, output.stat().st_mtime_ns]
