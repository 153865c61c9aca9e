"""What a calibration has measured so far, in a folder, so that one that was stopped goes on."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..files.resuming import claim
from ..files.writing import write_json, written
from .probing import Errors

SETUP, TRIED = "calibration.json", "tried.json"


class Store:
    """The folder of one calibration; without one, all is kept in memory alone."""

    def __init__(self, folder: Path | None, setup: Mapping[str, Any]) -> None:
        self._folder = folder
        self._runs: dict[int, tuple[Errors, np.ndarray]] = {}
        self._tried: dict[str, list[float]] = {}
        if folder is None:
            return
        claim(folder, SETUP, setup, "calibration")
        if (folder / TRIED).exists():
            self._tried = json.loads((folder / TRIED).read_text(encoding="utf-8"))

    def run(self, number: int) -> tuple[Errors, np.ndarray] | None:
        """Errors and image of a prompt; None where it was not run."""
        file = None if self._folder is None else self._folder / f"prompt-{number:03d}.npz"
        if number not in self._runs and file is not None and file.exists():
            with np.load(file, allow_pickle=False) as held:
                errors = Errors(held["own"], held["stale"], held["sigmas"].tolist())
                self._runs[number] = errors, held["image"]
        return self._runs.get(number)

    def keep_run(self, number: int, errors: Errors, image: np.ndarray) -> None:
        """Of one prompt."""
        self._runs[number] = errors, image
        if self._folder is not None:
            with written(self._folder / f"prompt-{number:03d}.npz") as path, path.open("wb") as file:
                np.savez(file, own=errors.own, stale=errors.stale, sigmas=np.array(errors.sigmas), image=image)

    def tried(self, plan: Mapping[str, Any]) -> list[float] | None:
        """PSNR of every prompt under a plan; None where it was not tried."""
        return self._tried.get(_key(plan))

    def keep_tried(self, plan: Mapping[str, Any], psnr: list[float]) -> None:
        """Of one plan."""
        self._tried[_key(plan)] = psnr
        if self._folder is not None:
            write_json(self._folder / TRIED, self._tried)


def _key(plan: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
