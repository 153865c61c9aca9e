"""The most memory that a block of code held."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

import torch

from .latency import synchronize


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
