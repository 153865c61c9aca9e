"""Time, in rounds: every round runs every function once, so that a machine that slows down, slows them all.

Ratios of medians of such rounds are the only speedups worth printing.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

from .progress import bar_options

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Seconds of every round of one function."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of all rounds."""
        return statistics.median(self.seconds)

    @property
    def min(self) -> float:
        """Of the fastest round."""
        return min(self.seconds)

    @property
    def max(self) -> float:
        """Of the slowest round."""
        return max(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile, interpolated between the rounds."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    @property
    def iqr(self) -> float:
        """Distance of the quartiles."""
        return self.quartiles[1] - self.quartiles[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, in seconds."""
        first, third = self.quartiles
        return {
            "median_s": self.median,
            "min_s": self.min,
            "max_s": self.max,
            "quartiles_s": [first, third],
            "rounds_s": list(self.seconds),
        }


def latency(
    functions: Mapping[K, Callable[[], Any]],
    rounds: int = 7,
    warmup: int = 1,
    *,
    device: str | torch.device = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    progress: bool = False,
) -> dict[K, Timing]:
    """Time every function once per round, round by round, after `warmup` untimed rounds.

    On CUDA each time ends when the device has finished. `progress` shows a bar on a terminal. Raises `ValueError` for
    less than one round.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be at least 1 and warmup at least 0, got {rounds} and {warmup}")
    seconds: dict[K, list[float]] = {name: [] for name in functions}
    for index in tqdm(range(warmup + rounds), desc="rounds", **bar_options(progress)):
        for name, function in functions.items():
            synchronize(device)
            start = clock()
            function()
            synchronize(device)
            stop = clock()
            if index >= warmup:
                seconds[name].append(stop - start)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def synchronize(device: str | torch.device) -> None:
    """Wait until the device has finished; a no-op on the CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
