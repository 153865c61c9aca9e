"""Weights from files that may come from anywhere: safetensors, or pickles of tensors and nothing else; strictly."""

import json
import os
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

NAMES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
)
"""Files that diffusers keeps a model's weights in, the safest first."""

Weights = dict[str, Tensor]


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """The tensors of a file, or of the weights in a diffusers model's folder.

    A safetensors file is mapped, not read; a pickle is read with `weights_only=True`, so no code in it runs. A dict
    under the key "state_dict" is unwrapped. Raises `ValueError` for files that hold anything but named tensors.
    """
    path = Path(path)
    if path.is_dir():
        return read_weights(_weights_of(path))
    if not path.is_file():
        raise ValueError(f"expected a file of weights; {path} does not exist")
    if path.name.endswith(".index.json"):
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        return {key: tensor for name in names for key, tensor in read_weights(path.parent / name).items()}
    try:
        found: Any = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        kind = "safetensors file" if path.suffix == ".safetensors" else "file of weights alone"
        why = (str(error).splitlines() or ["it is empty"])[0]
        raise ValueError(f"{path} is not a whole {kind}: {why}; download it again") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"expected named tensors in {path}; got other things too; is it a model's checkpoint?")
    return dict(found)


def _weights_of(folder: Path) -> Path:
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"expected weights in {folder}: one of {', '.join(NAMES)}; found none")


def _unpickle(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def load_strictly(model: nn.Module, weights: Mapping[str, Tensor], source: object, *, assign: bool = False) -> None:
    """Give `model` the weights that are exactly its own.

    Args:
        model: it is changed only if everything fits.
        weights: by the names of `model.state_dict()`.
        source: where they come from, for errors.
        assign: take the tensors themselves instead of copying into the model's, as a model on the meta device needs.

    Raises `ValueError` that names every weight that is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    check_keys(own.keys() - weights.keys(), weights.keys() - own.keys(), source)
    others = [
        f"{key} is {tuple(weights[key].shape)}, expected {tuple(tensor.shape)}"
        for key, tensor in own.items()
        if weights[key].shape != tensor.shape
    ]
    if others:
        raise ValueError(f"the weights of {source} are not those of its configuration: {'; '.join(others)}")
    model.load_state_dict(weights, assign=assign)


def check_keys(missing: Collection[str], unexpected: Collection[str], source: object) -> None:
    """Raise `ValueError` that names the weights a checkpoint lacks or has too many."""
    parts = [
        f"{len(keys)} {what}: {', '.join(sorted(keys))}"
        for what, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    if parts:
        raise ValueError(f"the weights of {source} are not those of its configuration: {'; '.join(parts)}")
