"""Slopes of a student's projections: what they lean by with the option that is drawn (`diffattn.adapters.slopes`).

A hook on every trained linear layer adds t (S x + s) to its output, which is what W + t S gives. The slopes lie outside
the model, as a mechanism's own weights do.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffattn.adapters.slopes import SUFFIX, check_leaning, place
from diffattn.mechanisms import Mechanism


class Slopes:
    """Zero at first; `at(mechanism)` says for which setting they are added from then on."""

    def __init__(self, model: nn.Module, names: Sequence[str], drawn: Mapping[str, Sequence[Any]]) -> None:
        """`names`: the parameters that lean. Raises `ValueError` where what is drawn is no single number."""
        check_leaning(drawn)
        self._drawn, self._place, self._active = drawn, 0.0, True
        named = dict(model.named_parameters())
        self.by_name = {name: nn.Parameter(torch.zeros_like(named[name])) for name in names}
        self._modules: dict[nn.Module, dict[str, nn.Parameter]] = {}
        for name, slope in self.by_name.items():
            prefix, _, kind = name.rpartition(".")
            self._modules.setdefault(model.get_submodule(prefix), {})[kind] = slope
        self._hooks = [module.register_forward_hook(self._add) for module in self._modules]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By the names that a file has."""
        return {name + SUFFIX: slope for name, slope in self.by_name.items()}

    def at(self, mechanism: Mechanism) -> None:
        """From now on those of this setting."""
        self._place = place(mechanism, self._drawn)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Nothing is added inside the block."""
        former, self._active = self._active, False
        try:
            yield
        finally:
            self._active = former

    def _add(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not self._active:
            return None
        own = self._modules[module]
        bias = own.get("bias")
        return output + self._place * nn.functional.linear(args[0], own["weight"], bias)

    def remove(self) -> None:
        """Listen no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
