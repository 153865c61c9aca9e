"""The folder beside an output that holds what a run has done, until the output is written."""

import json
import shutil
from pathlib import Path
from typing import Any

from .files import write_json


class WorkFolder:
    """That of one output, `<output>.work`, with the run's settings in `settings.json`."""

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(f"{output.name}.work")

    def open(self, settings: dict[str, Any], resume: bool) -> None:
        """Make the folder, or go on with one of the same settings.

        Raises:
            ValueError: a folder is there without `resume`, none with it, or it is of other settings.
        """
        file = self.path / "settings.json"
        if not resume:
            if self.path.exists():
                raise ValueError(f"{self.path} is of a run that did not end: add --resume, or remove the folder")
            write_json(file, settings)
            return
        if not file.is_file():
            raise ValueError(f"--resume: there is no run in {self.path}; leave --resume out")
        former = json.loads(file.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if former.get(name) != value:
                raise ValueError(
                    f"{self.path} is of a run with {name}={former.get(name)}, and this one has {value}: use that, or "
                    "remove the folder"
                )

    def remove(self) -> None:
        """All of it."""
        shutil.rmtree(self.path, ignore_errors=True)
