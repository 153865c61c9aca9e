"""What chosen attention layers put out during a forward.

    with Capture(model, names) as captured:
        model(...)
    captured.outputs  # one tensor a layer, in the order of `names`

A layer's output is what its module returns for the grid: after the output projection where the module has one, the
attention itself where it has none, as in Flux's single blocks (the tensor of CLEAR's loss). Modules that return image
and text apart give the image's. With `whole=True` all that a module returns is kept, text too.

The hooks listen inside the `with` block alone, so a block that gradient checkpointing computes again in the backward
pass is not counted twice; checkpoints must be non-reentrant, as in diffusers, for gradients to reach the tensors.
"""

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn


class Capture:
    """Collects the outputs of the attention modules `names` of `model`, in a `with` block; may be entered again."""

    def __init__(self, model: nn.Module, names: Iterable[str], whole: bool = False) -> None:
        self.names, self._whole = tuple(names), whole
        self._modules = [model.get_submodule(name) for name in self.names]
        self._found: dict[str, list[Tensor]] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> "Capture":
        if self._hooks:
            raise RuntimeError("this capture is open already: leave its `with` block first")
        self._found = {}
        for name, module in zip(self.names, self._modules, strict=True):
            self._hooks.append(module.register_forward_hook(self._listener(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _listener(self, name: str) -> Any:
        def listen(module: nn.Module, args: Any, output: Any) -> None:
            if name in self._found:
                raise RuntimeError(f"{name} ran twice in one capture: open one for each forward")
            tensors = tensors_of(output)
            self._found[name] = tensors if self._whole else tensors[:1]

        return listen

    @property
    def outputs(self) -> list[Tensor]:
        """One tensor a layer, or all of them, of the last `with` block; raises where a layer did not run."""
        missed = [name for name in self.names if name not in self._found]
        if missed:
            raise RuntimeError(f"{len(missed)} captured layers did not run, such as {missed[0]}")
        return [tensor for name in self.names for tensor in self._found[name]]


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of what a module returns: one, or several in a tuple."""
    parts = output if isinstance(output, (tuple, list)) else (output,)
    return [part for part in parts if isinstance(part, Tensor)]


def layers_at(names: Sequence[str], depths: Iterable[float]) -> tuple[str, ...]:
    """The layers at fractions of the depth, 0 the first and 1 the last; each once, in order.

    >>> layers_at(["a", "b", "c", "d", "e"], [0, 0.5, 1])
    ('a', 'c', 'e')
    """
    chosen = set()
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"a depth is a fraction from 0 (first layer) to 1 (last), got {depth!r}")
        chosen.add(round(depth * (len(names) - 1)))
    if not names or not chosen:
        raise ValueError(f"the attention loss has no layer: {len(names)} layers, {len(chosen)} depths")
    return tuple(names[index] for index in sorted(chosen))
