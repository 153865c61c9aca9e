"""The folder beside an output that holds what a run has done, until the output is written.

Only what a run made is ever removed, file by file: a folder that holds other things is refused, or keeps them.
"""

import contextlib
import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

from ..files.records import path_beside
from ..files.writing import others_in, remove_empty, remove_own, remove_temporary, write_json
from .outputs import check_folder

logger = logging.getLogger("diffattn")

SETTINGS, OUTPUT = "settings.json", "output.json"
CONTENTS, MADE = "contents", "made_folder"
"""Entries of the settings: digests of files, whose names do not count, and whether the run made the folder."""
MARK = {"diffattn": "work of a run"}
"""Entry of the settings that no other file has: without it, nothing in the folder counts as a run's."""


class WorkFolder:
    """That of one output, `<output>.work`, with the run's settings in `settings.json`."""

    own: tuple[str, ...] = ()
    """Regular expressions of the files that the run makes in it, see `diffattn.files.writing.others_in`."""

    def __init__(self, output: Path, path: Path | None = None) -> None:
        """`path`: another folder than `<output>.work`. Raises `ValueError` for an output without a name."""
        if not output.name:
            raise ValueError(f"expected the name of a file or folder for --output; got {output}; give it a name")
        self.output, self.path = output, path or output.with_name(f"{output.name}.work")
        self._made: list[Path] = []
        self._begun = False

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
        if self.is_of_run and not self._begun:
            raise ValueError(f"{self.path} is of a run that did not end: add --resume, or remove the folder")
        self.make()
        write_json(file, {**settings, **self._mark})

    def clear(self) -> None:
        """Remove what a run left that was killed, before another begins."""
        self._remove([self.path] if self._made_before() else [])

    def make(self) -> None:
        """Make the folder, unless it is there, and mark it as a run's; `remove` takes away what this made."""
        if self._begun:
            return
        if not self.is_of_run:
            self.check_others()
            self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / SETTINGS, self._mark)
        self._begun = True

    def check_others(self) -> None:
        """Raise `ValueError` where the folder can't be made, or holds what no run made."""
        self.check_place()
        other = next(others_in(self.path, self._own), None)
        if other is not None:
            raise ValueError(
                f"{self.path} holds things that are not of a run, such as {other.relative_to(self.path)}: move them "
                "away, or give another name"
            )

    def check_place(self) -> None:
        """Raise `ValueError` where there can't be a folder of this name, or where it and the output are in the way."""
        check_folder(self.path, option="the run's work (--work)")
        work, output = self.path.resolve(), self.output.resolve()
        written = (output, path_beside(output))
        inside = [path.relative_to(work).parts[0] for path in written if work in path.parents]
        patterns = [pattern.split("/")[0] for pattern in (re.escape(SETTINGS), re.escape(OUTPUT), *self.own)]
        taken = any(re.fullmatch(pattern, name) for name in inside for pattern in patterns)
        if work == output or output in work.parents or taken:
            raise ValueError(
                f"expected a folder for the run's work apart from --output {self.output}; got {self.path}; "
                "give --work another name"
            )

    @property
    def is_of_run(self) -> bool:
        """Whether the folder bears the mark of a run: only then are files in it a run's."""
        settings = self._settings()
        return all(settings.get(name) == value for name, value in MARK.items())

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
        self._remove(self._made or ([self.path] if self._made_before() else []))
        written = (self.output, path_beside(self.output))
        other = next((path for path in others_in(self.path, self._own) if path not in written), None)
        if other is not None:
            logger.warning("left %s: it holds things that are not of the run, such as %s", self.path, other.name)

    def _remove(self, made: list[Path]) -> None:
        """A run's files, the mark last, and the folders in `made` where nothing else is in them."""
        if self.is_of_run:
            remove_own(self.path, self._own[1:])
            (self.path / SETTINGS).unlink(missing_ok=True)
        self._begun = False
        for folder in made:
            remove_empty(folder)

    @property
    def _own(self) -> tuple[str, ...]:
        """Patterns of a run's files, the settings first; without its mark there are none."""
        return (re.escape(SETTINGS), re.escape(OUTPUT), *self.own) if self.is_of_run else ()

    @property
    def _mark(self) -> dict[str, Any]:
        return {**MARK, MADE: bool(self._made)}

    def _made_before(self) -> bool:
        """Whether a run made the folder that goes on now."""
        return self.is_of_run and bool(self._settings().get(MADE))

    def _settings(self) -> dict[str, Any]:
        """What the settings say; nothing where they can't be read."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            settings = json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))
            return settings if isinstance(settings, dict) else {}
        return {}

    def _compare(self, settings: dict[str, Any]) -> None:
        file = self.path / SETTINGS
        if not file.is_file():
            raise ValueError(f"--resume: there is no run in {self.path}; leave --resume out")
        try:
            former = json.loads(file.read_text(encoding="utf-8"))
            contents = dict(former.get(CONTENTS, {}))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"cannot read {file}: {error}; remove the folder, and leave --resume out") from error
        if not self.is_of_run:
            raise ValueError(f"--resume: {file} is not of a run; leave --resume out, and give --work another name")
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
