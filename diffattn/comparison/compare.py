"""`compare`: every setting on every prompt, prompt by prompt, so that all meet the same state of the machine."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..files.resuming import claim
from ..files.writing import write_json, written
from ..measure import flicker, hardware, psnr_of_frames, ssim
from ..measure.draws import Draws, Prompt
from ..measure.progress import bar_options
from .drawing import draw
from .opening import file_of, read_image
from .results import BEST, Comparison, Row
from .setting import FULL, Setting

SETUP = "comparison.json"
Lpips = Callable[[np.ndarray, np.ndarray], float]


def compare(
    pipe: Any,
    prompts: Sequence[Prompt],
    settings: Sequence[str | Setting],
    *,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    lpips: Lpips | None = None,
    warmup: int = 2,
    progress: bool = True,
    **call: Any,
) -> Comparison:
    """Draw every prompt under every setting, and by full attention; the pipeline is left as it was.

    Args:
        prompts: texts, or arguments of the pipeline's call. Image i starts from the seed + i under all settings.
        settings: texts such as `"routing share=0.3 reuse=2"`, see `diffattn.comparison.setting`, or `Setting`s.
        folder: keeps every image and figure; a comparison that was stopped goes on there. Times of both parts count.
        lpips: a distance of two images (height, width, 3), `diffattn.measure.lpips.Lpips(weights)`.
        warmup: steps of a first, untimed run of every setting; 0: none.
        call: arguments of the pipeline's call, such as height, width, num_inference_steps.

    Raises `ValueError`, before anything is drawn, for settings that the pipeline cannot carry.
    """
    draws = Draws(pipe, prompts, seed, call)
    several = [Setting(FULL), *(Setting.parse(own) if isinstance(own, str) else own for own in settings)]
    several = list({own.name: own for own in several}.values())
    for setting in several:
        with setting.on(pipe):
            pass
    names = [own.name for own in several]
    setup = {
        **draws.describe(),
        "settings": names,
        "meanings": [own.meaning for own in several],
        "versions": {n: version(n) for n in ("diffattn", "diffusers", "torch")},
    }
    kept = _Kept(None if folder is None else Path(folder), setup)
    todo = [(number, own) for number in range(len(draws)) for own in several if kept.row(number, own.name) is None]
    if warmup:
        for own in {own.name: own for _, own in todo}.values():
            with own.on(pipe):
                draws.draw(0, num_inference_steps=warmup)
    for number, own in tqdm(todo, desc="images", **bar_options(progress)):
        _run(draws, number, own, kept, lpips)
    rows = [kept.row(number, name) for name in names for number in range(len(draws))]
    return Comparison(
        tuple(names), tuple(row for row in rows if row is not None), setup, hardware(pipe.device), kept.pixels
    )


def _run(draws: Draws, number: int, setting: Setting, kept: "_Kept", lpips: Lpips | None) -> None:
    """Draw one image and write down what it took."""
    drawn = draw(draws, number, setting)
    full = drawn.pixels if setting.mechanism is None else kept.pixels(number, FULL)
    frames, others = (x if x.ndim == 4 else x[None] for x in (drawn.pixels, full))
    each = [min(value, BEST) for value in psnr_of_frames(frames, others)]
    row = Row(
        setting.name,
        number,
        drawn.seconds,
        drawn.peak_bytes,
        drawn.computed,
        float(np.mean(each)),
        min(each),
        _mean_of(ssim, frames, others),
        flicker(frames, others) if len(frames) > 1 else None,
        None if lpips is None else _mean_of(lpips, frames, others),
    )
    kept.keep(row, drawn.pixels)


def _mean_of(distance: Callable[[Any, Any], float], frames: np.ndarray, others: np.ndarray) -> float | None:
    """Over the frames; None where the library for it is missing."""
    try:
        return float(np.mean([distance(one, other) for one, other in zip(frames, others, strict=True)]))
    except ImportError:
        return None


class _Kept:
    """Rows and images, in a folder where one is given."""

    def __init__(self, folder: Path | None, setup: Mapping[str, Any]) -> None:
        self._folder = folder
        self._rows: dict[tuple[int, str], Row] = {}
        self._images: dict[tuple[int, str], np.ndarray] = {}
        self._names = list(setup["settings"])
        if folder is not None:
            claim(folder, SETUP, setup, "comparison")

    def _file(self, number: int, name: str, ending: str) -> Path:
        assert self._folder is not None
        return file_of(self._folder, number, self._names.index(name), ending)

    def row(self, number: int, name: str) -> Row | None:
        """What was found of one image; None where it was not drawn."""
        key = number, name
        if key not in self._rows and self._folder is not None and self._file(*key, "json").exists():
            self._rows[key] = Row(**json.loads(self._file(*key, "json").read_text(encoding="utf-8")))
        return self._rows.get(key)

    def pixels(self, number: int, name: str) -> np.ndarray:
        """The image of a row that there is."""
        if (number, name) not in self._images:
            self._images[number, name] = read_image(self._file(number, name, "npy"))
        return self._images[number, name]

    def keep(self, row: Row, pixels: np.ndarray) -> None:
        """The image first: a row that is there has one."""
        key = row.prompt, row.setting
        if self._folder is None:
            self._images[key] = pixels
        else:
            with written(self._file(*key, "npy")) as path, path.open("wb") as file:
                np.save(file, pixels)
            write_json(self._file(*key, "json"), row.to_dict())
        self._rows[key] = row
