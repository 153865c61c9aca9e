"""What a comparison found: for each setting and prompt time, memory, what was computed, and how near it came."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BEST = 120.0
"""PSNR of equal images."""


@dataclass(frozen=True)
class Row:
    """One setting on one prompt."""

    setting: str
    prompt: int
    seconds: float
    peak_bytes: int | None
    computed: float
    """Share of the attention that was computed."""
    psnr: float
    """In dB, to full attention's image; of a video the mean over the frames."""
    worst_frame: float
    ssim: float | None
    flicker: float | None
    """Of videos."""
    lpips: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


@dataclass(frozen=True)
class Line:
    """One setting over all prompts."""

    setting: str
    seconds: tuple[float, ...]
    speedup: float
    """Median of full attention's seconds over this one's."""
    computed: float
    psnr: tuple[float, ...]
    ssim: float | None
    flicker: float | None
    lpips: float | None
    peak_bytes: int | None
    frontier: bool
    """Is no other setting both faster and nearer?"""


@dataclass(frozen=True)
class Comparison:
    """All rows; the first setting is full attention."""

    settings: tuple[str, ...]
    rows: tuple[Row, ...]
    setup: Mapping[str, Any]
    machine: Mapping[str, Any]
    pixels: Callable[[int, str], np.ndarray] = field(repr=False, compare=False)
    """(prompt, setting) -> its image, or video."""

    def of(self, setting: str) -> list[Row]:
        """The rows of one setting, prompt by prompt."""
        return [row for row in self.rows if row.setting == setting]

    @property
    def lines(self) -> list[Line]:
        """A line for each setting, in order."""
        full = statistics.median(row.seconds for row in self.of(self.settings[0]))
        places = {
            name: (
                statistics.median(row.seconds for row in self.of(name)),
                statistics.median(row.psnr for row in self.of(name)),
            )
            for name in self.settings
        }
        return [self._line(name, full, places) for name in self.settings]

    def _line(self, name: str, full: float, places: Mapping[str, tuple[float, float]]) -> Line:
        rows, (seconds, near) = self.of(name), places[name]
        beaten = any(
            other != name and s <= seconds and p >= near and (s, p) != (seconds, near)
            for other, (s, p) in places.items()
        )
        return Line(
            name,
            tuple(row.seconds for row in rows),
            full / seconds,
            statistics.mean(row.computed for row in rows),
            tuple(row.psnr for row in rows),
            _median([row.ssim for row in rows]),
            _median([row.flicker for row in rows]),
            _median([row.lpips for row in rows]),
            max((row.peak_bytes for row in rows if row.peak_bytes is not None), default=None),
            not beaten,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the machine that the times are of."""
        lines = [{**vars(line), "median_psnr": statistics.median(line.psnr)} for line in self.lines]
        return {
            "setup": dict(self.setup),
            "machine": dict(self.machine),
            "settings": lines,
            "rows": [row.to_dict() for row in self.rows],
        }


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.median(known) if known else None
