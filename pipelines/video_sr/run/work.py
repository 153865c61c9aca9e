"""The folder beside the output that holds what a run has done, until the video is written.

<output>.work/
    settings.json    what the video depends on
    latents/         of all frames, see `FolderStore`
    state.json       how many steps are done; there is none before the clip is encoded
    video.mp4        what has been decoded is written to a temporary name beside it
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from diffattn.files.writing import write_json
from diffattn.media import work

from ..clips.store import FolderStore


class WorkFolder(work.WorkFolder):
    """That of one output."""

    own = (r"latents/[\w.]+\.(f32|json)", r"state\.json", r"(trial|video)\.\w+")

    def __init__(self, output: Path) -> None:
        super().__init__(output)
        self.latents = self.path / "latents"
        self.video = self.path / f"video{output.suffix}"

    @property
    def size(self) -> int:
        """Bytes in it."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    @property
    def steps(self) -> int | None:
        """How many are done; None where the clip is not encoded yet."""
        file = self.path / "state.json"
        return int(json.loads(file.read_text(encoding="utf-8"))["steps"]) if file.is_file() else None

    def note(self, steps: int) -> None:
        """That so many steps are done."""
        write_json(self.path / "state.json", {"steps": steps})


class WatchedStore(FolderStore):
    """A `FolderStore` that refuses numbers that are not finite, and tells of each frame that a step finishes."""

    def __init__(self, folder: Path, finished: Iterator[Any]) -> None:
        """`finished` is gone on with once for each frame."""
        super().__init__(folder)
        self._finished = finished

    def write(self, name: str, begin: int, frames: Tensor) -> None:
        """See `ClipStore`; raises `RuntimeError` for what is not finite."""
        if not frames.isfinite().all():
            raise RuntimeError(
                f"expected finite latents; got others for {name!r} from frame {begin} on; take --dtype bfloat16 or "
                "float32"
            )
        super().write(name, begin, frames)
        if name.startswith("x."):
            for _ in itertools.islice(self._finished, len(frames)):
                pass
