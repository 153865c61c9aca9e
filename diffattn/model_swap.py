"""The swapped layers of one model: their processors, the hooks that feed them, and the way back."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from . import intercept
from .families import Family, arguments, find_layers, owner_of
from .layer import Features, State, SwappedLayer
from .mechanisms.base import Mechanism

logger = logging.getLogger("diffattn")

_ATTRIBUTE = "_diffattn"


class ModelSwap:
    """The swapped layers of one model, and what it takes to undo the swap."""

    def __init__(self, model: nn.Module, family: Family, mechanism: Mechanism) -> None:
        self.model = model
        self.family = family
        self.mechanism = mechanism
        """That of all layers, or of the first ones after `join`."""
        self.state = State()
        self.layers: dict[str, SwappedLayer] = {}
        self.kept: dict[str, str] = {}
        """Attention layers left alone, and why."""
        self.replaced_parameters: frozenset[str] = frozenset()
        """The model's parameters that hold an adapter's values."""
        self._classes: dict[tuple[type, int], type] = {}
        self._hooks: list[Any] = []
        self._theta: float | None = None
        self._seen: set[str] = set()
        self._replaced: frozenset[str] = frozenset()
        self._proven = False
        self._on_undo: list[Callable[[], None]] = []

    @property
    def mechanisms(self) -> list[Mechanism]:
        """Those of the layers, each once."""
        return list({id(layer.mechanism): layer.mechanism for layer in self.layers.values()}.values())

    def join(self, other: "ModelSwap") -> None:
        """Take the layers of another swap of the same model, which is not in place either."""
        for layer in other.layers.values():
            layer.state = self.state
        self.layers |= other.layers
        self.kept = {name: self.kept[name] for name in self.kept.keys() & other.kept.keys()}
        self.state.needs |= other.state.needs

    def on_undo(self, action: Callable[[], None]) -> None:
        """Run `action` when the swap is undone."""
        self._on_undo.append(action)

    def install(self) -> None:
        """Replace an earlier swap, make the processors, hang the readers on the model; the layers stay as they are."""
        former = current(self.model)
        if former is not None:
            former.undo()
        for layer in self.layers.values():
            layer.processor = self._wrap(layer)
        self._install_hooks()
        self._scale_rope()
        setattr(self.model, _ATTRIBUTE, self)

    def put_in_place(self) -> None:
        """Set the processors."""
        for layer in self.layers.values():
            layer.module.processor = layer.processor
            self._seen.add(layer.name)

    def _wrap(self, layer: SwappedLayer) -> Any:
        """A copy of the layer's own processor with another class: one class per base, mechanism and swap."""
        base = type(layer.original)
        key = base, id(layer.mechanism)
        if key not in self._classes:
            prefix = type(layer.mechanism).__name__.removesuffix("Attention")
            self._classes[key] = intercept.processor_class(base, prefix, {"mechanism": layer.mechanism})
        cls = self._classes[key]
        processor: Any = object.__new__(cls)
        processor.__dict__.update(layer.original.__dict__)
        processor.layer = layer
        return processor

    def _install_hooks(self) -> None:
        modules = dict(self.model.named_modules())
        entries = find_layers(self.family, self.layers)
        for owner, reader in {
            (owner_of(entries[name], name), layer.reader): None for name, layer in self.layers.items()
        }:
            self._add_hook(modules[owner], reader)
        for latent in {layer.latent for layer in self.layers.values()} - {None}:
            self._add_hook(self.model, latent)
        for name, layer in self.layers.items():
            if "features" in layer.mechanism.needs:
                self._add_hook(modules[name.rpartition(".")[0]], Features(layer))
        self._add_hook(self.model, self._before_forward)
        self._hooks.append(self.model.register_forward_hook(self._after_forward))

    def _add_hook(self, module: nn.Module, hook: Any) -> None:
        self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _scale_rope(self) -> None:
        factor = getattr(self.mechanism, "ntk_factor", 1.0)
        if factor != 1.0:
            rope = self._rope()
            self._theta = rope.theta
            rope.theta = rope.theta * factor

    def _rope(self) -> Any:
        assert self.family.rope is not None
        return self.model.get_submodule(self.family.rope)

    @torch.compiler.disable
    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.state.reads_timestep:
            self.state.update(arguments(module, args, kwargs)[self.family.timestep])
        self._warn_of_replaced()

    def _warn_of_replaced(self) -> None:
        in_place = {name for name, layer in self.layers.items() if layer.module.processor is layer.processor}
        self._seen |= in_place
        replaced = frozenset(self._seen - in_place)
        if replaced and replaced != self._replaced:
            processors = (intercept.without_swap(self.layers[name].module.processor) for name in replaced)
            names = sorted({type(processor).__name__ for processor in processors})
            logger.warning(
                "%d of %d swapped layers were replaced by %s: call diffattn.apply again",
                len(replaced),
                len(self.layers),
                ", ".join(names),
            )
        self._replaced = replaced

    @torch.compiler.disable
    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The probe: after the first forward every swapped layer in place must have come by its exit."""
        if self._proven or not self._seen:
            return
        missed = [name for name in sorted(self._seen - self._replaced) if not self.layers[name].reached]
        if missed and may_skip(self.model):
            return  # a later forward decides
        if len(missed) == len(self._seen):
            raise RuntimeError(
                f"the model ran, but none of its {len(missed)} swapped layers came to an attention call (first: "
                f"{missed[0]}): this release of diffusers calls attention in another way; call diffattn.restore"
            )
        if missed:
            logger.warning("%d swapped layers were not used in this forward: %s", len(missed), ", ".join(missed[:3]))
        self._proven = True

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The model's own attention, and rotary base, inside the block; the swap stays in place."""
        self.state.paused = True
        rope = None if self._theta is None else self._rope()
        scaled = None if rope is None else rope.theta
        if rope is not None:
            rope.theta = self._theta
        try:
            yield
        finally:
            self.state.paused = False
            if rope is not None:
                rope.theta = scaled

    def in_place(self, name: str) -> bool:
        """Does the layer still carry our processor?"""
        return self.layers[name].module.processor is self.layers[name].processor

    def undo(self) -> None:
        """Give the layers that still carry our processor their own back, and take the hooks away."""
        for name, layer in self.layers.items():
            if self.in_place(name):
                layer.original.__dict__.update(intercept.settings_of(layer.processor))
                layer.module.processor = layer.original
            elif type(layer.module.processor) in self._classes.values():
                # diffusers built it anew by its class
                layer.module.processor = intercept.without_swap(layer.module.processor)
            elif name in self._seen:
                logger.warning("%s carries %s now: left as it is", name, type(layer.module.processor).__name__)
            # diffusers may hold it, to set it again later: from then on it is the model's own attention
            layer.processor.layer = None
        for hook in self._hooks:
            hook.remove()
        for action in reversed(self._on_undo):
            action()
        if self._theta is not None:
            self._rope().theta = self._theta
        for cls in self._classes.values():
            intercept.release(cls)
        if self.model.__dict__.get(_ATTRIBUTE) is self:
            delattr(self.model, _ATTRIBUTE)


def current(model: nn.Module) -> ModelSwap | None:
    """The swap in place on a model."""
    return getattr(model, _ATTRIBUTE, None)


def may_skip(model: nn.Module) -> bool:
    """Does a cache of diffusers hang on the model, which skips whole layers in some forwards?"""
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    return any(hook._is_stateful for registry in registries if registry for hook in registry.hooks.values())
