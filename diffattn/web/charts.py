"""Charts as SVG in the page's own colours: speed against fidelity, losses over the steps."""

import math
import statistics
from collections.abc import Sequence

from ..comparison.results import BEST, Comparison
from .html import escaped

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 62, 20, 16, 52
LOSSES = ("total", "target", "prediction", "attention", "features", "layers")
"""Columns of a run's log that are drawn."""


class Axis:
    """From values to a stretch of the chart."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool = False) -> None:
        self._log = log
        low, high = self._of(min(values)), self._of(max(values))
        room = (high - low) * 0.08 or 0.5
        self._low, self._high, self._start, self._end = low - room, high + room, start, end

    def _of(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def __call__(self, value: float) -> float:
        share = (self._of(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    @property
    def ticks(self) -> list[float]:
        """Round numbers, some six at most."""
        if self._log:
            decades = range(math.floor(self._low), math.ceil(self._high) + 1)
            parts = (1, 2, 5) if len(decades) <= 3 else (1,)
            values = [part * 10.0**decade for decade in decades for part in parts]
            return [value for value in values if self._low <= math.log10(value) <= self._high]
        span = self._high - self._low
        steps = (part * 10.0**decade for decade in range(-9, 10) for part in (1, 2, 5))
        step = next(step for step in steps if span / step <= 6)
        return [number * step for number in range(math.ceil(self._low / step), math.floor(self._high / step) + 1)]


def frontier(comparison: Comparison, chosen: str) -> str:
    """A point for each setting but full attention, each of which can be chosen; the best ones on a line."""
    lines = comparison.lines[1:]
    if not lines:
        return ""
    points = [(line.speedup, min(statistics.median(line.psnr), BEST), line) for line in lines]
    x = Axis([1.0, *(point[0] for point in points)], LEFT, WIDTH - RIGHT)
    y = Axis([point[1] for point in points], HEIGHT - BOTTOM, TOP)
    best = sorted((point for point in points if point[2].frontier), key=lambda point: point[0])
    parts = [
        *_grid(x, y, "times faster than full attention, whole call", "PSNR to full attention's image, dB, median"),
        f'<path class="da-one" d="M{x(1):.1f} {TOP}V{HEIGHT - BOTTOM}"/>',
        f'<polyline class="da-best" points="{" ".join(f"{x(a):.1f},{y(b):.1f}" for a, b, _ in best)}"/>',
    ]
    for speedup, psnr, line in points:
        kind = "da-point" + (" da-on" if line.frontier else "") + (" da-chosen" if line.setting == chosen else "")
        words = f"{line.setting}: {speedup:.2f} times as fast, {psnr:.1f} dB" + (", on the frontier" * line.frontier)
        anchor, by = ("end", -10) if x(speedup) > WIDTH * 0.6 else ("start", 10)
        parts.append(
            f'<g class="{kind}" tabindex="0" role="button" data-setting="{escaped(line.setting)}" '
            f'aria-label="{escaped(words)}"><title>{escaped(words)}</title>'
            f'<circle class="da-target" cx="{x(speedup):.1f}" cy="{y(psnr):.1f}" r="14"/>'
            f'<circle cx="{x(speedup):.1f}" cy="{y(psnr):.1f}" r="6"/>'
            f'<text x="{x(speedup) + by:.1f}" y="{y(psnr) - 9:.1f}" text-anchor="{anchor}">{escaped(line.setting)}'
            "</text></g>"
        )
    return _chart(parts, "Speed and fidelity of every setting; the table below has the same figures")


def losses(rows: Sequence[dict[str, float]]) -> str:
    """Every loss of a run's log over its steps, on a logarithmic axis."""
    series = {
        name: [(row["step"], row[name]) for row in rows if name in row and 0 < row[name] < math.inf] for name in LOSSES
    }
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    every = [point for points in series.values() for point in points]
    x = Axis([point[0] for point in every], LEFT, WIDTH - RIGHT)
    y = Axis([point[1] for point in every], HEIGHT - BOTTOM, TOP, log=True)
    parts = _grid(x, y, "step", "mean squared error")
    for number, points in enumerate(series.values()):
        thin = points[:: max(1, len(points) // WIDTH)]
        drawn = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in [*thin, points[-1]])
        parts.append(f'<polyline class="da-series da-series-{number}" points="{drawn}"/>')
    keys = "".join(
        f'<span><i class="da-key-{number}"></i>{escaped(name)} {points[-1][1]:.3g}</span>'
        for number, (name, points) in enumerate(series.items())
    )
    told = ", ".join(f"{name} {points[-1][1]:.3g}" for name, points in series.items())
    return _chart(parts, f"Losses over the steps; at the last one: {told}") + f'<div class="da-legend">{keys}</div>'


def _grid(x: Axis, y: Axis, below: str, beside: str) -> list[str]:
    parts = []
    for value in x.ticks:
        parts.append(f'<path class="da-tick" d="M{x(value):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    for value in y.ticks:
        parts.append(f'<path class="da-tick" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{below}</text>')
    parts.append(f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{beside}</text>')
    return parts


def _chart(parts: Sequence[str], words: str) -> str:
    start = f'<svg class="da-chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="{escaped(words)}">'
    return f"{start}{''.join(parts)}</svg>"
