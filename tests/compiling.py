"""What the tests under `torch.compile` share: blocks compiled as diffusers does it, and graphs counted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Graphs:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.count += 1
        return graph


def compile_blocks(model: nn.Module, backend: Any) -> None:
    """As diffusers does, and likewise for SD3, which does not name its repeated blocks."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
    else:
        for block in model.transformer_blocks:
            block.compile(fullgraph=True, backend=backend)
