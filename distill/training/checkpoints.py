"""Checkpoints of a run: written whole or not at all, found again, the oldest removed.

    <run>/checkpoints/step-000500/{state.pt, config.json}

A checkpoint is written under another name and renamed when it is whole, so one that bears its name can be read. Tensors
and numbers only: it is read with `weights_only=True`.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch

from diffattn.files.weights import check_finite, load
from diffattn.files.writing import remove_empty, remove_own

from ..config import DistillConfig, from_dict

_NAME = re.compile(r"step-(\d{6,})")


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def find(run: Path) -> dict[int, Path]:
    """Step -> folder of every whole checkpoint of a run, from the first to the last."""
    if not (run / "checkpoints").is_dir():
        return {}
    found = {path: _NAME.fullmatch(path.name) for path in (run / "checkpoints").iterdir()}
    return dict(
        sorted(
            (int(match[1]), path)
            for path, match in found.items()
            if match and any((path / name).exists() for name in ("state.pt", "config.json"))
        )
    )


def write(run: Path, step: int, state: dict[str, Any], config: DistillConfig, keep: int) -> Path:
    """Write the state after `step` steps and remove all but the last `keep` checkpoints."""
    target = folder_of(run, step)
    partial = target.with_name(f".{target.name}.partial")
    _drop(partial)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        torch.save({**state, "step": step}, partial / "state.pt")
        (partial / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        _drop(target)
        partial.rename(target)
    except (OSError, RuntimeError) as error:  # torch tells a full disk by the latter
        _drop(partial)
        why = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"cannot write the checkpoint {target}: {why}; what was there before is whole, free space"
        ) from error
    except BaseException:
        _drop(partial)
        raise
    for path in list(find(run).values())[:-keep]:
        _drop(path)
    return target


def _drop(checkpoint: Path) -> None:
    """Remove the files of a checkpoint; its folder stays where anything else is in it."""
    remove_own(checkpoint, (r"state\.pt", r"config\.json"))
    remove_empty(checkpoint)


FIXED = (
    *("model", "part", "mechanism", "trainable", "lora_rank", "layers", "slopes"),
    *("optimizer", "seed", "batch_size"),
)
"""Fields of a config that a resumed run cannot change."""


def read(folder: Path, config: DistillConfig) -> dict[str, Any]:
    """The state of a checkpoint; raises `ValueError` where it is not whole, or of a run that trained something else."""
    former = read_config(folder)
    for name in FIXED:
        if getattr(former, name) != getattr(config, name):
            raise ValueError(
                f"{folder} is of a run with {name}={getattr(former, name)}, and this one has {getattr(config, name)}: "
                f"use that value, or another folder"
            )
    if bool(former.ema) != bool(config.ema):
        raise ValueError(
            f"{folder} is of a run with ema={former.ema}, and this one has {config.ema}: averaged weights cannot begin "
            f"or end on the way; use that value, or another folder"
        )
    return _read_state(folder)


def read_config(folder: Path) -> DistillConfig:
    """What `config.json` in the folder of a run or of a checkpoint says; `ValueError` where it is broken."""
    file = folder / "config.json"
    try:
        return from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{file} is not the config of a run ({why}); restore it, or train into another folder"
        ) from error


def _read_state(folder: Path) -> dict[str, Any]:
    file = folder / "state.pt"
    kinds = {"weights": dict, "average": list, "optimizer": dict, "step": int}
    try:
        state = load(file)
        wrong = not isinstance(state, dict) or [
            name for name, kind in kinds.items() if type(state.get(name)) is not kind
        ]
        if wrong:
            raise ValueError("it does not hold the state of a run")
        check_finite(((name, weight) for name, weight in state["weights"].items()), file)
    except (ValueError, AttributeError) as error:
        why = str(error).removesuffix("; download it again")
        raise ValueError(
            f"{folder} is not a whole checkpoint ({why}); remove it, and a resumed run goes on from the one before"
        ) from error
    return dict(state)
