"""Folders in which work goes on after it was stopped: each belongs to what began it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .writing import write_json


def claim(folder: Path, name: str, setup: Mapping[str, Any], what: str) -> None:
    """Begin work in an empty folder, or go on where file `name` says the same `setup`; `what` it is, for errors.

    Raises `ValueError` for a folder with other things, or of other arguments; nothing is changed then.
    """
    file, given = folder / name, json.loads(json.dumps(dict(setup)))  # as it is read back
    if file.exists():
        former = json.loads(file.read_text(encoding="utf-8"))
        other = [key for key in sorted({*former, *given}) if former.get(key) != given.get(key)]
        if other:
            raise ValueError(
                f"{folder} holds a {what} with other {', '.join(other)}: give another folder, or the same arguments"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds other things: give an empty folder, or that of a {what}")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, given)
