"""Every swapped layer by itself: on the teacher's own input, held to what the teacher's layer makes of it.

    L = mean over layers of |a(x) - a_teacher(x)|^2 / |a_teacher(x)|^2,   x the input of the layer in the teacher's pass

No layer sees the errors of those before it, and no gradient goes through the model: a step takes one forward without
gradients, and the swapped layers there and back. What is left to learn together, how errors add up, is the business of
the steps after it.

    with LayerByLayer(student, backward) as lessons:
        predict(student.model, ...)
    lessons.loss      # a number; the gradients are in the student's weights
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..student import Student
from .capture import tensors_of


class LayerByLayer:
    """Within the block a forward of the student's model is the teacher's, and each swapped layer leaves its gradients.

    `backward(loss)` is called for every layer, with its share of the mean.
    """

    def __init__(self, student: Student, backward: Callable[[Tensor], None]) -> None:
        self._student, self._backward = student, backward
        self._modules = {layer.name: layer.module for layer in student.handle.layers}
        self._losses: dict[str, float] = {}
        self._hooks: list[Any] = []
        self._asking = False
        self._no_grad = torch.no_grad()

    def __enter__(self) -> "LayerByLayer":
        self._losses = {}
        for name, module in self._modules.items():
            self._hooks.append(module.register_forward_pre_hook(self._begin))
            self._hooks.append(module.register_forward_hook(self._ends(name), with_kwargs=True))
        self._no_grad.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._no_grad.__exit__(kind, error, trace)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @property
    def loss(self) -> float:
        """The mean over the layers; raises where one did not run."""
        missed = [name for name in self._modules if name not in self._losses]
        if missed:
            raise RuntimeError(f"{len(missed)} swapped layers did not run, such as {missed[0]}")
        return sum(self._losses.values()) / len(self._losses)

    def _begin(self, module: nn.Module, args: Any) -> None:
        if not self._asking:
            torch.set_grad_enabled(True)

    def _ends(self, name: str) -> Any:
        def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if self._asking:
                return None
            if name in self._losses:
                raise RuntimeError(f"{name} ran twice: enter this block anew for each forward")
            wanted = self._teachers(module, args, kwargs)
            loss = relative_error(output, wanted)
            self._losses[name] = float(loss.detach())
            self._backward(loss / len(self._modules))
            torch.set_grad_enabled(False)
            return wanted

        return end

    def _teachers(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._asking = True
        try:
            with self._student.teacher():
                return module(*args, **kwargs)
        finally:
            self._asking = False


def relative_error(student: Any, wanted: Any) -> Tensor:
    """Squared error over squares, of all tensors of an output together, in float32: a scalar."""
    pairs = list(zip(tensors_of(student), tensors_of(wanted), strict=True))
    error = sum((own.float() - other.float()).square().sum() for own, other in pairs)
    power = sum(other.float().square().sum() for _, other in pairs)
    return torch.as_tensor(error / power)
