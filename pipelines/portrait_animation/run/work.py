"""The folder beside the output that holds what a run has done, until the video is written.

    <output>.work/
        settings.json        what the video depends on
        controls/            whole once it bears this name
            driving.npy      aligned driving frames, uint8 (frames, height, width, 3)
            local.npy        their eyes and mouth, likewise
            points.npy       faces in pixels of the driving frames, (frames, 68, 2); NaN where there is none
            source.npy       the source's face in its pixels, (68, 2); likewise
        state.safetensors    latents after the last step, the generator, the number of steps

The control images are written and read a few at a time, so that memory does not grow with the video.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffattn.files.writing import remove_own, written
from diffattn.media import work

from ..face.alignment import Picture
from ..face.detection import POINTS, Points

PICTURES = ("driving", "local")


@dataclass(frozen=True)
class StoredFrames:
    """Images in a file that are read when they are asked for."""

    file: Path
    """Of NumPy."""

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """(frames, height, width, 3), mapped anew: a map that stays would keep every page that was read in memory."""
        mapped: NDArray[np.uint8] = np.load(self.file, mmap_mode="r")
        return mapped

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, frames: Sequence[int]) -> Tensor:
        """Those with these numbers, (frames, 3, height, width) in -1..1, float32."""
        return torch.from_numpy(np.array(self.pixels[list(frames)])).permute(0, 3, 1, 2).float() / 127.5 - 1.0


@dataclass(frozen=True)
class Controls:
    """What came of the preparation."""

    driving: StoredFrames
    local: StoredFrames
    points: list[Points | None]
    """A face of each driving frame."""
    source: Points | None


class WorkFolder(work.WorkFolder):
    """That of one output."""

    own = (
        r"controls(\.partial)?/(driving|local|points|source)\.npy",
        r"state\.safetensors",
        r"(trial|video)\.\w+",
    )

    def write_controls(
        self, pictures: Iterable[tuple[Picture, Picture]], points: Sequence[Points | None], source: Points | None
    ) -> Controls:
        """Keep the control images of all frames, RGB from 0 to 1, as they come; whole or not at all."""
        partial = self.path / "controls.partial"
        remove_own(partial, (r".+\.npy",))
        partial.mkdir(exist_ok=True)
        nobody = np.full((POINTS, 2), np.nan)
        with (partial / "driving.npy").open("wb") as driving, (partial / "local.npy").open("wb") as local:
            for number, pair in enumerate(pictures):
                for file, picture in zip((driving, local), pair, strict=True):
                    if number == 0:
                        shape = (len(points), *picture.shape)
                        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(np.clip(np.round(255 * picture), 0, 255).astype(np.uint8).tobytes())
        np.save(partial / "points.npy", np.stack([nobody if face is None else face for face in points]))
        np.save(partial / "source.npy", nobody if source is None else source)
        os.replace(partial, self.controls)
        return self.read_controls()

    @property
    def controls(self) -> Path:
        """Where `write_controls` puts them."""
        return self.path / "controls"

    def read_controls(self) -> Controls:
        """What `write_controls` kept."""
        folder = self.controls
        pictures = [StoredFrames(folder / f"{name}.npy") for name in PICTURES]
        faces = [None if np.isnan(face).any() else face for face in np.load(folder / "points.npy")]
        source = np.load(folder / "source.npy")
        return Controls(pictures[0], pictures[1], faces, None if np.isnan(source).any() else source)

    def write_state(self, step: int, latents: Tensor, generator: torch.Generator) -> None:
        """Keep the latents after `step` steps."""
        tensors = {"latents": latents.detach().cpu().contiguous(), "generator": generator.get_state()}
        with written(self.path / "state.safetensors") as file:
            save_file(tensors, file, {"step": str(step)})

    def read_state(self, generator: torch.Generator) -> tuple[int, Tensor] | None:
        """The steps done and the latents after them, if any were kept; sets the generator as it was then."""
        path = self.path / "state.safetensors"
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            generator.set_state(file.get_tensor("generator"))
            return int(file.metadata()["step"]), file.get_tensor("latents")
