"""What a file was made from, in a few letters: so that what is there is kept for its content, not for its name."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from diffattn.options import shown

SAMPLED = 16
"""Values of each weight that are looked at."""


def of(*parts: Any) -> str:
    """The fingerprint of bytes, texts, numbers, and lists or dicts of these."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=shown).encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:32]


def of_parts(parts: Iterable[Any]) -> str | None:
    """That of some parts of a pipeline, by their classes, configs and weights in their present precision.

    Of each weight a few values are read, not all. None where weights are not in memory (offloaded one by one).
    """
    found: list[Any] = []
    for part in parts:
        found += [type(part).__name__, _config(part)]
        if isinstance(part, nn.Module):
            tensors = {name: tensor.detach() for name, tensor in part.state_dict(keep_vars=True).items()}
            if any(tensor.is_meta for tensor in tensors.values()):
                return None
            found += [[name, list(tensor.shape), _values(tensor)] for name, tensor in sorted(tensors.items())]
        elif callable(getattr(part, "get_vocab", None)):
            found.append(sorted(part.get_vocab().items()))
    return of(found)


def _config(part: Any) -> Any:
    """The settings of a scheduler, VAE or the like, without the place and release that they come from."""
    config: Any = getattr(part, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config) if isinstance(config, dict) else {}
    left_out = ("transformers_version", "dtype", "torch_dtype")
    return {str(name): value for name, value in values.items() if name[:1] != "_" and name not in left_out}


def _values(tensor: torch.Tensor) -> list[float]:
    flat = tensor.reshape(-1)
    places = torch.linspace(0, max(0, len(flat) - 1), min(SAMPLED, len(flat)), dtype=torch.float64).long()
    return [float(value) for value in flat[places.to(flat.device)].float().cpu()]
