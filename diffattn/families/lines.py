"""Reader of audio: tokens on a line in time, which is a grid of one row."""

from typing import Any

from torch import nn

from .layout import Arguments, Layers, Layout, MaskKind, Read


def line(axis: int, before: int | str = 0, patch: str | None = None) -> Read:
    """`hidden_states` with the time on an axis, in patches of as many steps as the config names under `patch`.

    The last patch may be filled up. Other tokens lie before: a number of them, or one that the config names.
    """

    def read(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
        config: Any = module.config
        others = config[before] if isinstance(before, str) else before
        step = config[patch] if patch else 1
        return (Layout(1, -(-call["hidden_states"].shape[axis] // step), before=others),)

    return read


def along_time(pattern: str, read: Read, mask: MaskKind = "keys", masked_by: str | None = None) -> tuple[Layers, ...]:
    return (Layers(pattern, "spatial", read, mask=mask, masked_by=masked_by, line=True),)
