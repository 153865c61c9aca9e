"""Measure: time, memory, picture quality, cost, and the machine they were measured on.

    PSNR(a, b) = 10 log10(1 / mean((a - b)^2)),   a and b in 0-1

Times are taken in rounds: every round runs every function once, so that a machine that slows down, slows them all.
Ratios of medians of such rounds are the only speed-ups worth printing.
"""

import contextlib
import ctypes
import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm.auto import tqdm

from .grid import TokenGrid
from .mechanisms.base import Mechanism
from .mechanisms.softmax import SoftmaxAttention

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Seconds of every round of one function."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def min(self) -> float:
        return min(self.seconds)

    @property
    def max(self) -> float:
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

    On CUDA each time ends when the device has finished. `progress` shows a bar.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be at least 1 and warmup at least 0, got {rounds} and {warmup}")
    seconds: dict[K, list[float]] = {name: [] for name in functions}
    for index in tqdm(range(warmup + rounds), desc="rounds", disable=not progress, leave=False):
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


class PeakMemory:
    """What `peak_memory` found: `bytes` above the start, None where this system does not tell."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_memory(device: str | torch.device = "cpu") -> Iterator[PeakMemory]:
    """The most memory that the block held at once, beyond what was held before it.

    On CUDA these are the allocator's bytes. On the CPU it is the peak of the process's resident memory, which Linux can
    reset: all threads count, and memory that the C library kept from earlier work is handed back first, but what it
    still keeps is reused unseen, so small blocks (below about 1 MB) read too low. None elsewhere.
    """
    result = PeakMemory()
    if torch.device(device).type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield result
        synchronize(device)
        result.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    start = _reset_resident_peak()
    yield result
    if start is not None:
        result.bytes = max(_status("VmHWM") - start, 0)


def _reset_resident_peak() -> int | None:
    """Resident bytes now, after resetting the peak; None where that is not possible."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, AttributeError):
        return None


def _status(key: str) -> int:
    """A memory entry of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def as_pixels(picture: Any) -> np.ndarray:
    """A picture (Pillow, array or tensor; 8-bit or 0-1 floats) as float64 in 0-1."""
    if isinstance(picture, torch.Tensor):
        picture = picture.detach().cpu().double().numpy() if picture.is_floating_point() else picture.cpu().numpy()
    pixels = np.asarray(picture)
    return pixels / 255.0 if pixels.dtype == np.uint8 else pixels.astype(np.float64)


def psnr(a: Any, b: Any) -> float:
    """Peak signal-to-noise ratio of two pictures in dB; infinite where they are equal."""
    first, second = as_pixels(a), as_pixels(b)
    if first.shape != second.shape:
        raise ValueError(f"psnr compares pictures of one shape, got {first.shape} and {second.shape}")
    error = float(np.mean((first - second) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(a: Any, b: Any) -> float:
    """Structural similarity of two pictures (height, width, channels), 1 where they are equal.

    Needs the extra `metrics`.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ImportError('ssim needs torchmetrics: pip install "diffattn[metrics]"') from error
    pixels = [as_pixels(picture) for picture in (a, b)]
    if pixels[0].shape != pixels[1].shape or pixels[0].ndim != 3:
        shapes = " and ".join(str(picture.shape) for picture in pixels)
        raise ValueError(f"ssim compares pictures of one shape (height, width, channels), got {shapes}")
    first, second = (torch.from_numpy(picture).permute(2, 0, 1)[None] for picture in pixels)
    return float(structural_similarity_index_measure(first, second, data_range=1.0))


Call = tuple[Mechanism, TokenGrid, int, int]
"""One attention call: mechanism, grid, heads, head dimension."""


def attention_share(calls: Iterable[Call]) -> float:
    """Floating-point operations of these calls over those of exact attention in their place."""
    cheap = exact = 0
    for mechanism, grid, heads, head_dim in calls:
        cheap += mechanism.flops(grid, heads, head_dim)
        exact += SoftmaxAttention().flops(grid, heads, head_dim)
    if not exact:
        raise ValueError("attention_share needs at least one attention call")
    return cheap / exact


def hardware(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What a reader of a timing must know of the machine: processor, threads, versions, load."""
    on_cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else _processor(),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def hardware_line(machine: Mapping[str, Any]) -> str:
    """`hardware()` in one line."""
    load = machine["load_average"]
    busy = "" if load is None else f", load average {load[0]:.1f}"
    return f"{machine['device']}, {machine['threads']} of {machine['cores']} threads, torch {machine['torch']}{busy}"


def _processor() -> str:
    """The processor's own name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
