"""What of a model's forward the losses look at: its prediction, attention layers, the blocks that these are in."""

import fnmatch
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..config import DistillConfig
from ..student import Student
from .capture import Capture, layers_at


@dataclass(frozen=True)
class Said:
    """What a model says to a batch; tensors begin with the batch's axis."""

    prediction: Any
    """None where nothing was asked."""
    attention: tuple[Tensor, ...] = ()
    """Outputs of attention layers."""
    features: tuple[Tensor, ...] = ()
    """Outputs of blocks."""


def listeners(config: DistillConfig, student: Student) -> tuple[Capture, Capture]:
    """What listens to attention layers, and to the blocks that they are in; to none where the loss has no weight."""
    layers = attention_layers(config, student) if config.loss.attention or config.loss.features else ()
    blocks = tuple(dict.fromkeys(name.rpartition(".")[0] for name in layers))
    return (
        Capture(student.model, layers if config.loss.attention else ()),
        Capture(student.model, blocks if config.loss.features else (), whole=True),
    )


def attention_layers(config: DistillConfig, student: Student) -> tuple[str, ...]:
    """The layers of the attention loss: those at the config's depths among the swapped ones that its glob matches."""
    names = [layer.name for layer in student.handle.layers]
    matching = fnmatch.filter(names, config.attention_layers)
    if not matching:
        raise ValueError(
            f"attention_layers={config.attention_layers!r} matches none of {len(names)} swapped layers, such as "
            f"{names[0]}"
        )
    return layers_at(matching, config.attention_depths)
