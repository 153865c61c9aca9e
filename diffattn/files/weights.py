"""Weights from files that may come from anywhere: safetensors, or pickles of tensors and nothing else; strictly."""

import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

NAMES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
)
"""Files that diffusers keeps a model's weights in, the safest first."""

REAL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What weights are."""
COUNTS = (torch.int64, torch.int32, torch.bool)
"""What a model may hold beside them: positions, numbers of batches."""

Weights = dict[str, Tensor]


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """The tensors of a file, or of the weights in a diffusers model's folder.

    A safetensors file is mapped, not read; a pickle is read with `weights_only=True`, so no code in it runs. A dict
    under the key "state_dict" is unwrapped. Raises `ValueError` for files that are not whole, and for those that
    hold anything but named tensors of `REAL` numbers and `COUNTS`.
    """
    path = Path(path)
    if path.is_dir():
        return read_weights(_weights_of(path))
    if not path.is_file():
        raise ValueError(f"expected a file of weights; {path} does not exist")
    if path.name.endswith(".index.json"):
        return {key: tensor for name in shards(path) for key, tensor in read_weights(path.parent / name).items()}
    found = load(path)
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    return named_tensors(found, path)


def load(path: Path) -> Any:
    """What a safetensors file holds, or a pickle of tensors and plain values; `ValueError` where it is not whole."""
    kind = "safetensors file" if path.suffix == ".safetensors" else "file of weights alone"
    try:
        return load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except Exception as error:  # of any class, where a pickle's bytes are wrong
        why = (str(error).splitlines() or ["it is empty"])[0]
        raise ValueError(f"{path} is not a whole {kind}: {why}; download it again") from error


def named_tensors(found: Any, source: object) -> Weights:
    """`found` as weights; raises `ValueError` for other things, and numbers that no weights are."""
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"expected named tensors in {source}; got other things too; is it a model's checkpoint?")
    check_numbers({str(name): tensor.dtype for name, tensor in found.items()}, source, (*REAL, *COUNTS))
    return dict(found)


def check_numbers(dtypes: Mapping[str, Any], source: object, allowed: Collection[Any] = REAL) -> None:
    """Raise `ValueError` for tensors of other numbers than `allowed`: integers of 8 bits, complex numbers."""
    others = [name for name, dtype in dtypes.items() if dtype not in allowed]
    if others:
        raise ValueError(
            f"expected weights of float16, bfloat16, float32 or float64 in {source}; got {dtypes[others[0]]} in "
            f"{_first(others)}; take the file before it was quantized or converted"
        )


def check_finite(weights: Iterable[tuple[str, Tensor]], source: object) -> None:
    """Raise `ValueError` where any of the weights is NaN or infinite; one after the other, none is kept."""
    broken = [name for name, tensor in weights if _has_numbers(tensor) and not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"expected finite weights in {source}; got NaN or infinity in {_first(broken)}; make it anew")


def _has_numbers(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not tensor.is_meta


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights in another precision; what is no weights stays, to be refused."""
    return tensor.to(dtype) if tensor.dtype in REAL else tensor


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def shards(index: Path) -> list[str]:
    """Names of the files that an index names, all of them beside it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        beside = all(Path(name).name == name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not a whole index of weights ({error!r}); download it again") from error
    if not names or not beside:
        raise ValueError(f"expected names of files beside it in {index}; got {names}; download it again")
    return names


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

    Raises `ValueError` that names every weight that is missing, unexpected or of another shape, and one that is of
    another kind of numbers, NaN or infinite.
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
    kinds = [key for key, tensor in own.items() if tensor.is_floating_point() != weights[key].is_floating_point()]
    if kinds:
        raise ValueError(
            f"expected {own[kinds[0]].dtype} for {_first(kinds)} in {source}; got {weights[kinds[0]].dtype}"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))  # buffers may hold masks of infinity
    check_finite(((key, weights[key]) for key in own if key in parameters), source)
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
