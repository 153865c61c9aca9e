"""Open a comparison that `diffattn compare` wrote: compare.json, and the images in its folder of runs."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .results import Comparison, Row

RESULT, RUNS = "compare.json", "runs"


def file_of(runs: Path, prompt: int, setting: int, ending: str) -> Path:
    """Where an image (`npy`), or its figures (`json`), lie: by the numbers of its prompt and of its setting."""
    return runs / f"prompt-{prompt:03d}-setting-{setting:02d}.{ending}"


def read_image(path: Path) -> np.ndarray:
    """The pixels of a file of `file_of`; raises `ValueError` for another file."""
    try:
        pixels = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"expected an image of a comparison in {path}; {error}; compare anew") from error
    return np.asarray(pixels)


def open_comparison(folder: str | os.PathLike[str]) -> Comparison:
    """The comparison in a folder that `diffattn compare --output` wrote; its images are read when they are asked for.

    Raises `ValueError` for a folder without a whole compare.json.
    """
    path = Path(folder) / RESULT
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        setup, rows = found["setup"], tuple(Row(**row) for row in found["rows"])
        names = tuple(setup["settings"])
        comparison = Comparison(names, rows, setup, found["machine"], _pixels(Path(folder) / RUNS, names))
        comparison.lines  # noqa: B018  needs a row of every setting
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise ValueError(f"expected a comparison in {path}; cannot read it ({error}); compare anew") from error
    return comparison


def _pixels(runs: Path, names: tuple[str, ...]) -> Callable[[int, str], np.ndarray]:
    return lambda prompt, setting: read_image(file_of(runs, prompt, names.index(setting), "npy"))
