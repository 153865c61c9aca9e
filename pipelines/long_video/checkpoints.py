"""Checkpoints of a run: what every rank has after a step, read again by any number of ranks.

    <work>/checkpoints/step-000005/
        frames-000000-000160.safetensors    one rank's latents and scheduler history, frames on the first axis
        frames-000160-000320.safetensors
        manifest.json                       step, config, the files, the scheduler's numbers

The ranks write into a folder of another name, and the first renames it when all are done: one that bears its name is
whole.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffattn.files.writing import remove_empty, remove_own, write_json, written
from diffattn.parallel.operations.shares import FramePlan

from .config import LongVideoConfig

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{6,})")
_FILE = re.compile(r"frames-(\d{6,})-(\d{6,})\.safetensors")


@dataclass
class State:
    """A run after `step` steps."""

    step: int
    latents: Tensor
    """(frames, channels, height, width) of this rank, float32."""
    tensors: dict[str, Tensor]
    """The scheduler's history, in the shape of the latents."""
    numbers: dict[str, Any]
    """The rest of the scheduler's state."""


class Checkpoints:
    """Those of one run; every rank has such an object, with the same folder, which all can reach."""

    def __init__(self, work: Path, config: LongVideoConfig, plan: FramePlan, every: int, keep: int = 2) -> None:
        """`every`: steps between two checkpoints; 0 for none."""
        self.folder, self.config, self.plan, self.every, self.keep = work / "checkpoints", config, plan, every, keep

    def due(self, step: int, steps: int) -> bool:
        """Whether one is to be written after `step` of `steps` steps."""
        return self.every > 0 and (step % self.every == 0 or step == steps)

    def write(self, state: State) -> None:
        """Write this rank's part; all ranks call it. The oldest go, but for the last `keep`."""
        target = self.folder / f"step-{state.step:06d}"
        partial = target.with_name(f".{target.name}.partial")
        own = self.plan.own
        if self.plan.rank == 0:
            drop(partial)
            partial.mkdir(parents=True, exist_ok=True)
        self.plan.gather_objects(None)
        tensors = {"latents": state.latents, **state.tensors}
        with written(partial / f"frames-{own.start:06d}-{own.stop:06d}.safetensors") as file:
            save_file({name: tensor.detach().contiguous().cpu().clone() for name, tensor in tensors.items()}, file)
        names = self.plan.gather_objects(f"frames-{own.start:06d}-{own.stop:06d}.safetensors")
        if self.plan.rank == 0:
            manifest = {"step": state.step, "config": self.config.to_dict(), "files": names, "numbers": state.numbers}
            write_json(partial / MANIFEST, manifest)
            drop(target)
            partial.rename(target)
            for folder in list(found_in(self.folder).values())[: -self.keep]:
                drop(folder)

    def read(self, folder: Path, device: torch.device) -> State:
        """This rank's frames of a checkpoint, whoever wrote them."""
        manifest = self.check(folder)
        parts: dict[str, list[Tensor]] = {}
        for name in sorted(manifest["files"]):
            first, end = map(int, _FILE.fullmatch(name).groups())  # type: ignore[union-attr]
            wanted = range(max(first, self.plan.own.start), min(end, self.plan.own.stop))
            if wanted:
                with safe_open(folder / name, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118 - no dict
                        part = file.get_slice(key)[wanted.start - first : wanted.stop - first]
                        parts.setdefault(key, []).append(part)
        tensors = {name: torch.cat(found).to(device) for name, found in parts.items()}
        return State(manifest["step"], tensors.pop("latents"), tensors, manifest["numbers"])

    def check(self, folder: Path) -> dict[str, Any]:
        """The manifest; raises `ValueError` where the checkpoint is of another video, or lacks a file."""
        try:
            manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            lacking = [name for name in ("step", "config", "files", "numbers") if name not in manifest]
            if lacking:
                raise ValueError(f"it lacks {', '.join(lacking)}")
            if not all(isinstance(name, str) and _FILE.fullmatch(name) for name in manifest["files"]):
                raise ValueError("its files are not named as those of a checkpoint")
            former = LongVideoConfig.from_dict(manifest["config"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"cannot read {folder / MANIFEST}: {error}; remove {folder}") from error
        different = self.config.same_video(former)
        if different:
            name = different[0]
            raise ValueError(
                f"{folder} is of a run with {name}={getattr(former, name)}, and this one has "
                f"{getattr(self.config, name)}: use that value, or another --work folder"
            )
        if self.config.mode == "official" and len(manifest["files"]) != self.plan.ranks:
            raise ValueError(
                f"{folder} is of {len(manifest['files'])} ranks, and in mode 'official' the number of ranks, here "
                f"{self.plan.ranks}, changes the video; start as many"
            )
        missing = [name for name in manifest["files"] if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}: bring the files of all ranks there")
        return manifest


def drop(checkpoint: Path) -> None:
    """Remove the files of a checkpoint, the manifest first: without it there is none."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    remove_own(checkpoint, (_FILE.pattern, re.escape(MANIFEST)))
    remove_empty(checkpoint)


def found_in(folder: Path) -> dict[int, Path]:
    """Step -> folder of every whole checkpoint, from the first to the last."""
    if not folder.is_dir():
        return {}
    found = {path: _NAME.fullmatch(path.name) for path in folder.iterdir() if (path / MANIFEST).is_file()}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))
