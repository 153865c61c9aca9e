"""Per-frame tensors of a clip, in memory or in files, read and written a few frames at a time.

A clip's latents are kept under names: "hint", "x.0", "x0.1", .. Whoever works through a clip block by block needs
memory for one block, and after an interruption goes on from what is in the folder.
"""

import json
import math
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffattn.files.writing import write_json

WIDTH = 4
"""Bytes of a number."""


class ClipStore(Protocol):
    """Tensors `(frames, *shape)` under names, float32 on the CPU."""

    def read(self, name: str, begin: int, end: int) -> Tensor:
        """Frames begin .. end - 1 of an entry, in memory of their own.

        Raises:
            ValueError: no such entry, or frames of it that were not written.
        """
        ...

    def write(self, name: str, begin: int, frames: Tensor) -> None:
        """Put frames into an entry from `begin` on; the first write makes it.

        Raises:
            ValueError: frames of another shape than the entry's.
        """
        ...

    def drop(self, name: str) -> None:
        """Forget an entry; one that is not there is none the less forgotten."""
        ...


class MemoryStore:
    """Entries in memory."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[int, Tensor]] = {}

    def read(self, name: str, begin: int, end: int) -> Tensor:
        """See `ClipStore`."""
        entry = self._entries.get(name, {})
        if end <= begin or any(frame not in entry for frame in range(begin, end)):
            raise _missing(name, begin, end, f"an entry of {len(entry)}")
        return torch.stack([entry[frame] for frame in range(begin, end)])

    def write(self, name: str, begin: int, frames: Tensor) -> None:
        """See `ClipStore`."""
        entry = self._entries.get(name, {})
        shape = next((frame.shape for frame in entry.values()), frames.shape[1:])
        _check_shape(name, tuple(shape), frames)
        for number, frame in enumerate(frames.detach().to("cpu", torch.float32), begin):
            entry[number] = frame.clone()
        self._entries[name] = entry

    def drop(self, name: str) -> None:
        """See `ClipStore`."""
        self._entries.pop(name, None)


class FolderStore:
    """Each entry a file of raw numbers, frame after frame, and one that says their shape.

    Plain reads and writes: pages of a mapped file would count as the process's memory. Another instance on the same
    folder finds what is there.
    """

    def __init__(self, folder: Path) -> None:
        """The folder is made with the first entry."""
        self.folder = Path(folder)

    def read(self, name: str, begin: int, end: int) -> Tensor:
        """See `ClipStore`."""
        shape = self._shape(name)
        if shape is None or end <= begin:
            raise _missing(name, begin, end, "no such entry" if shape is None else "none")
        numbers = math.prod(shape)
        with self._file(name).open("rb") as file:
            file.seek(begin * numbers * WIDTH)
            values = np.fromfile(file, dtype=np.float32, count=(end - begin) * numbers)
        if len(values) < (end - begin) * numbers:
            raise _missing(name, begin, end, f"{len(values) // numbers} of these")
        return torch.from_numpy(values).reshape(end - begin, *shape)

    def write(self, name: str, begin: int, frames: Tensor) -> None:
        """See `ClipStore`."""
        shape = self._shape(name)
        _check_shape(name, tuple(frames.shape[1:]) if shape is None else shape, frames)
        values = frames.detach().to("cpu", torch.float32).contiguous().numpy()
        if shape is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file(name).write_bytes(b"")
            write_json(self._note(name), list(frames.shape[1:]))
        with self._file(name).open("r+b") as file:
            file.seek(begin * values[0].nbytes)
            values.tofile(file)

    def drop(self, name: str) -> None:
        """See `ClipStore`."""
        self._note(name).unlink(missing_ok=True)
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.f32"

    def _note(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _shape(self, name: str) -> tuple[int, ...] | None:
        note = self._note(name)
        return tuple(json.loads(note.read_text(encoding="utf-8"))) if note.is_file() else None


def _check_shape(name: str, shape: tuple[int, ...], frames: Tensor) -> None:
    if tuple(frames.shape[1:]) != shape or len(frames) == 0:
        raise ValueError(
            f"expected frames of {shape} for {name!r}, as those before; got {tuple(frames.shape)}; drop the entry first"
        )


def _missing(name: str, begin: int, end: int, got: str) -> ValueError:
    return ValueError(f"expected frames {begin} to {end} of {name!r}; got {got}; write them first")
