"""Where a forward begins and ends: hooks on the modules whose arguments tell a grid."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..families import Family, Read
from .calls.frames import Call, Frame, Reading, Ref, Scope, find, pop, push


@dataclass
class Entrance:
    """A module whose forward tells some scopes their grids."""

    ref: Ref[nn.Module]
    family: Family | None
    """Of a whole model; None: a level of a UNet, or another part."""
    reads: dict[Scope, Read] = field(default_factory=dict)


class SwapOfModel(Protocol):
    """What the hooks ask of a `ModelSwap`."""

    root: Scope

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], family: Family) -> Call:
        """A forward of a whole model begins."""

    def end(self, module: nn.Module, call: Call) -> None:
        """It is over."""


class Door:
    """The forward hooks on an entrance."""

    def __init__(self, swap: SwapOfModel, module: nn.Module, entrance: Entrance) -> None:
        self._swap = swap
        self._family = entrance.family
        self._reads = dict(entrance.reads)
        self._handles = [
            module.register_forward_pre_hook(self.enter, with_kwargs=True),
            module.register_forward_hook(self.leave, always_call=True),
        ]

    @torch.compiler.disable
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The module's forward begins."""
        readings: dict[Scope, Any] = {s: Reading(read, module, args, kwargs) for s, read in self._reads.items()}
        if self._family is None:
            inside = find(self._swap.root)
            # called by itself it knows no step
            call = Call() if inside is None else inside.call
        else:
            readings[self._swap.root] = None
            call = self._swap.begin(module, args, kwargs, self._family)
        push(Frame(self, call, readings))

    @torch.compiler.disable
    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The module's forward is over, or raised an error."""
        frame = pop(self)
        if frame is not None and self._family is not None and output is not None:
            self._swap.end(module, frame.call)

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


class KeepsFeatures(Protocol):
    """What the hook asks of a `SwappedLayer`."""

    def keep_features(self, block_input: Tensor | None) -> None:
        """Note the input of the block around the layer; None when the block is over."""


class Features:
    """Hooks on a block, or on a layer itself, that hand its input to the layer, and take it away when it is over."""

    def __init__(self, layer: KeepsFeatures, block: nn.Module) -> None:
        self._layer = layer
        self._handles = [
            block.register_forward_pre_hook(self.enter, with_kwargs=True),
            block.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The block's forward begins."""
        self._layer.keep_features(args[0] if args else kwargs["hidden_states"])

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """It is over."""
        self._layer.keep_features(None)

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


def may_skip(model: nn.Module) -> bool:
    """Does a hook of diffusers skip layers of the model in some forwards: of a cache, or of layer-skip guidance?"""
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    hooks = (hook for registry in registries if registry for hook in registry.hooks.values())
    return any(hook._is_stateful or type(hook).__name__.endswith("SkipHook") for hook in hooks)
