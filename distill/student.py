"""Teacher and student in one model: the frozen weights are held once.

The student is the swapped model. What is trained are the attention projections (as CLEAR does), a LoRA on them, or the
mechanism's own parameters alone. The teacher is the same model with the swap in a pause and the original projections in
place: while `student.teacher()` is open, every trained linear layer lends its parameters' places to the originals for
the time of its own forward. So a 12B model is held once, and its projections (15% of FLUX.1-dev) twice.

Parameters keep their names, so a state dict, an optimizer and `diffattn.save` see an ordinary model. The exchange is by
hooks on the linear layers, which fire inside those of `fully_shard` around their blocks.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffattn.kernels.choose import BACKENDS
from diffattn.mechanisms import Mechanism
from diffattn.swap.apply import Handle, commit
from diffattn.swap.model_swap import ModelSwap
from diffattn.swap.plan import plan_all
from diffattn.swap.settings.placement import LayerChoice, Placement

from .slopes import Slopes

Trainable = Literal["projections", "lora", "mechanism"]

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")
"""Linear layers of an attention module that see the image, by their names in diffusers."""


@dataclass(frozen=True)
class Student:
    """A swapped model with its trainable parts; `teacher()` makes it the teacher."""

    model: nn.Module
    handle: Handle
    trainable: Trainable
    parameters: dict[str, nn.Parameter]
    """What is trained, by name: the model's own names, or `<layer>.processor.<name>` for the mechanism's weights."""
    originals: "Originals"
    slopes: Slopes | None = None
    """What the projections lean by with the option that is drawn."""

    @contextlib.contextmanager
    def teacher(self) -> Iterator[None]:
        """The original model, without gradients, inside the block."""
        with self.untrained(), self.handle.paused():
            yield

    @contextlib.contextmanager
    def untrained(self) -> Iterator[None]:
        """The swap with the model's original weights, inside the block: what training started from.

        A mechanism's own weights stay as they are.
        """
        with torch.no_grad(), self.originals.in_place(), _without_lora(self.model), self._without_slopes():
            yield

    def _without_slopes(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.slopes is None else self.slopes.away()

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the trained parameters that are the model's own, for `diffattn.save(include=...)`."""
        return tuple(name for name in self.parameters if name in self.originals.names)

    def use(self, mechanism: Mechanism) -> None:
        """From now on the student's attention is this one of the `settings` that `make_student` was given."""
        for layer in self.handle.layers:
            layer.mechanism = mechanism
        if self.slopes is not None:
            self.slopes.at(mechanism)

    @contextlib.contextmanager
    def returning(self) -> Iterator[None]:
        """Whatever ends the block, the attention is then what it was before it."""
        former = self.handle.layers[0].mechanism
        try:
            yield
        finally:
            self.use(former)

    def restore(self) -> None:
        """The model with its original weights and attention, no LoRA and no hooks; its parameters stay frozen."""
        self.originals.give_back()
        if self.slopes is not None:
            self.slopes.remove()
        if self.trainable == "lora":
            self.model.unload_lora()  # type: ignore[operator]
        self.handle.restore()


def make_student(
    model: nn.Module,
    mechanism: Mechanism,
    *,
    trainable: Trainable = "projections",
    layers: LayerChoice = None,
    lora_rank: int = 16,
    backend: str = "auto",
    settings: Sequence[Mechanism] = (),
    leaning: Mapping[str, Sequence[Any]] | None = None,
) -> Student:
    """Swap `mechanism` in, freeze everything, and choose what is trained.

    `settings` are what `Student.use` may be given: other options of the mechanism, with the same weights. `leaning`
    gives each projection a slope too: the option that is drawn, and its values.

    Raises `ValueError` where nothing would be trained, the backend has no gradients on the model's device, or the
    settings have other layers or weights.
    """
    placement = Placement(layers=layers, backend=backend)
    swaps = plan_all(model, mechanism, placement)
    for setting in settings:
        _check_setting(setting, mechanism, plan_all(model, setting, placement), swaps)
    check_gradients(backend, next(model.parameters()).device.type)
    handle = commit(swaps, trained=True)
    try:
        model.requires_grad_(False)
        if trainable == "lora":
            _add_lora(model, handle, lora_rank)
        parameters = dict(_chosen(model, handle, trainable))
        if not parameters:
            raise ValueError(
                f"trainable={trainable!r} trains nothing: {handle.layers[0].mechanism} has no weights of its own; "
                f"train the projections or a LoRA"
            )
    except BaseException:
        handle.restore()
        raise
    own = [name for name in parameters if trainable == "projections" and ".processor." not in name]
    slopes = Slopes(model, own, leaning) if leaning else None
    if slopes is not None:
        slopes.at(mechanism)
        parameters |= slopes.parameters
    for parameter in parameters.values():
        parameter.requires_grad_()
    return Student(model, handle, trainable, parameters, Originals(model, own), slopes)


def _check_setting(setting: Mechanism, mechanism: Mechanism, planned: list[ModelSwap], own: list[ModelSwap]) -> None:
    """Raise where a setting would have other layers, weights or needs than the student's mechanism."""

    def facts(swaps: list[ModelSwap]) -> list[Any]:
        layers = [layer for swap in swaps for layer in swap.layers.values()]
        shapes = [layer.weights and {k: v.shape for k, v in layer.weights.named_parameters()} for layer in layers]
        return [[layer.name for layer in layers], shapes, [sorted(layer.schedule.needs) for layer in layers]]

    for what, one, other in zip(("layers", "weights", "needs"), facts(planned), facts(own), strict=True):
        if one != other:
            raise ValueError(
                f"{setting} has other {what} than {mechanism}, and one student cannot be both: draw options that leave "
                f"its {what} as they are"
            )


def check_gradients(backend: str, device: str) -> None:
    """Raise `ValueError` where a kernel that was chosen by name has no backward pass."""
    known = BACKENDS[backend].gradients if backend in BACKENDS else None
    if known is not None and device not in known:
        able = [name for name, row in BACKENDS.items() if row.gradients is None or device in row.gradients]
        raise ValueError(
            f"backend={backend!r} has no backward pass on {device}, so nothing could be trained through it: use auto, "
            f"or one of {', '.join(able)}"
        )


def projection_names(model: nn.Module, handle: Handle) -> list[str]:
    """The parameters that CLEAR trains: weight and bias of q, k, v and the picture's output of every swapped layer."""
    names = []
    for layer in handle.layers:
        for projection in PROJECTIONS:
            prefix = f"{layer.name}.{projection}"
            module = _submodule(model, prefix)
            if isinstance(module, nn.Linear):
                names += [f"{prefix}.{kind}" for kind, _ in module.named_parameters()]
    return names


def _chosen(model: nn.Module, handle: Handle, trainable: Trainable) -> Iterator[tuple[str, nn.Parameter]]:
    named = dict(model.named_parameters())
    if trainable == "projections":
        yield from ((name, named[name]) for name in projection_names(model, handle))
    elif trainable == "lora":
        yield from ((name, parameter) for name, parameter in named.items() if ".lora_" in name)
    elif trainable != "mechanism":
        raise ValueError(f"trainable must be projections, lora or mechanism, got {trainable!r}")
    for layer in handle.layers:
        if layer.weights is not None:
            for name, parameter in layer.weights.named_parameters():
                yield f"{layer.name}.processor.{name}", parameter


def _add_lora(model: Any, handle: Handle, rank: int) -> None:
    """A LoRA on the projections of the swapped layers, by peft."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError('training a LoRA needs peft: pip install "diffattn[train]"') from error
    if not hasattr(model, "add_adapter"):
        raise ValueError(f"diffusers has no LoRA for {type(model).__name__}: train its projections instead")
    layers = sorted({name.rpartition(".")[0] for name in projection_names(model, handle)})
    targets = "|".join(re.escape(name) for name in layers)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=f"({targets})"))


@contextlib.contextmanager
def _without_lora(model: nn.Module) -> Iterator[None]:
    """LoRA layers add nothing inside the block."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    former = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in zip(layers, former, strict=True):
            layer._disable_adapters = value


class Originals:
    """Copies of some parameters of linear layers, which can take their places for a forward."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.names, self._active = tuple(names), False
        self._modules: dict[nn.Module, dict[str, Tensor]] = {}
        for name in names:
            prefix, _, kind = name.rpartition(".")
            module = model.get_submodule(prefix)
            self._modules.setdefault(module, {})[kind] = getattr(module, kind).detach().clone()
        self._lent: dict[nn.Module, dict[str, Any]] = {}
        self._hooks = [module.register_forward_pre_hook(self._put) for module in self._modules]
        self._hooks += [module.register_forward_hook(self._take, always_call=True) for module in self._modules]

    @property
    def bytes(self) -> int:
        """What the copies hold."""
        return sum(copy.nbytes for copies in self._modules.values() for copy in copies.values())

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Forwards inside the block use the originals."""
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def _put(self, module: nn.Module, args: Any) -> None:
        if self._active:
            self._lent[module] = {kind: module._parameters[kind] for kind in self._modules[module]}
            for kind, copy in self._modules[module].items():
                whole = copy.full_tensor() if hasattr(copy, "full_tensor") else copy
                module._parameters[kind] = nn.Parameter(whole, requires_grad=False)

    def _take(self, module: nn.Module, args: Any, output: Any) -> None:
        for kind, parameter in self._lent.pop(module, {}).items():
            module._parameters[kind] = parameter

    def copy_again(self) -> None:
        """Take the copies anew from the parameters, which must not have been trained yet: sharding lays them out."""
        for module, copies in self._modules.items():
            for kind in copies:
                copies[kind] = getattr(module, kind).detach().clone()

    @torch.no_grad()
    def give_back(self) -> None:
        """Write the originals into the parameters for good, and stop listening."""
        for module, copies in self._modules.items():
            for kind, copy in copies.items():
                getattr(module, kind).copy_(copy)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
