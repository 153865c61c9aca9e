"""Checkpoints of a run: written whole or not at all, found again, the oldest removed.

    <run>/checkpoints/step-000500/{state.pt, config.json}

A checkpoint is written under another name and renamed when it is whole, so one that bears its name can be read. Tensors
and numbers only: it is read with `weights_only=True`.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from .config import DistillConfig, from_dict

_NAME = re.compile(r"step-(\d{6,})")


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def find(run: Path) -> dict[int, Path]:
    """Step -> folder of every whole checkpoint of a run, from the first to the last."""
    if not (run / "checkpoints").is_dir():
        return {}
    found = {path: _NAME.fullmatch(path.name) for path in (run / "checkpoints").iterdir()}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def write(run: Path, step: int, state: dict[str, Any], config: DistillConfig, keep: int) -> Path:
    """Write the state after `step` steps and remove all but the last `keep` checkpoints."""
    target = folder_of(run, step)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        torch.save({**state, "step": step}, partial / "state.pt")
        (partial / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for path in list(find(run).values())[:-keep]:
        shutil.rmtree(path)
    return target


def read(folder: Path, config: DistillConfig) -> dict[str, Any]:
    """The state of a checkpoint; raises `ValueError` where it is of a run that trained something else."""
    former = from_dict(json.loads((folder / "config.json").read_text()))
    for name in ("model", "mechanism", "trainable", "lora_rank", "layers", "optimizer", "seed", "batch_size"):
        if getattr(former, name) != getattr(config, name):
            raise ValueError(
                f"{folder} is of a run with {name}={getattr(former, name)}, and this one has {getattr(config, name)}: "
                f"use that value, or another folder"
            )
    return dict(torch.load(folder / "state.pt", weights_only=True, map_location="cpu"))
