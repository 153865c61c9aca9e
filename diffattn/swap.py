"""Swap the attention of a model or pipeline, and put it back.

`apply` looks the model's family up, wraps the processors of the chosen layers (`diffattn.intercept`), and hangs torch
forward pre-hooks on the model that read the token grid and the step. Weights, modules and other models are not
touched. Everything is checked before anything is changed; `restore` undoes it bit for bit.
"""

import fnmatch
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn

from . import config, intercept
from .families import Family, Layers, Read, arguments, family_of, find_layers, owner_of
from .layer import Features, GridReader, LatentReader, State, SwappedLayer
from .mechanisms.base import Mechanism
from .steps import StepCounter

logger = logging.getLogger("diffattn")

COMPONENTS = ("unet", "transformer", "transformer_2")
"""Parts of a pipeline that `apply` takes unless told otherwise."""

LayerChoice = str | Iterable[str] | Callable[[str], bool] | None
StepChoice = slice | Callable[[int], bool] | None

_ATTRIBUTE = "_diffattn"


class ModelSwap:
    """The swapped layers of one model, and what it takes to undo the swap."""

    def __init__(self, model: nn.Module, family: Family, mechanism: Mechanism) -> None:
        self.model = model
        self.family = family
        self.mechanism = mechanism
        self.state = State()
        self.layers: dict[str, SwappedLayer] = {}
        self.kept: dict[str, str] = {}
        """Attention layers left alone, and why."""
        self.replaced_parameters: frozenset[str] = frozenset()
        """The model's parameters that hold an adapter's values."""
        self._classes: dict[type, type] = {}
        self._hooks: list[Any] = []
        self._theta: float | None = None
        self._seen: set[str] = set()
        self._replaced: frozenset[str] = frozenset()
        self._proven = False
        self._on_undo: list[Callable[[], None]] = []

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
        """A copy of the layer's own processor with another class: one class per base and swap."""
        base = type(layer.original)
        if base not in self._classes:
            prefix = type(self.mechanism).__name__.removesuffix("Attention")
            self._classes[base] = intercept.processor_class(base, prefix, {"mechanism": self.mechanism})
        cls = self._classes[base]
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
        if "features" in self.mechanism.needs:
            for name, layer in self.layers.items():
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
        if self.state.steps is not None:
            self.state.update(arguments(module, args, kwargs)[self.family.timestep])
        self._warn_of_replaced()

    def _warn_of_replaced(self) -> None:
        in_place = {name for name, layer in self.layers.items() if layer.module.processor is layer.processor}
        self._seen |= in_place
        replaced = frozenset(self._seen - in_place)
        if replaced and replaced != self._replaced:
            names = sorted({type(self.layers[name].module.processor).__name__ for name in replaced})
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
        if len(missed) == len(self._seen):
            raise RuntimeError(
                f"the model ran, but none of its {len(missed)} swapped layers came to an attention call (first: "
                f"{missed[0]}): this release of diffusers calls attention in another way; call diffattn.restore"
            )
        if missed:
            logger.warning("%d swapped layers were not used in this forward: %s", len(missed), ", ".join(missed[:3]))
        self._proven = True

    def in_place(self, name: str) -> bool:
        """Does the layer still carry our processor?"""
        return self.layers[name].module.processor is self.layers[name].processor

    def undo(self) -> None:
        """Give the layers that still carry our processor their own back, and take the hooks away."""
        for name, layer in self.layers.items():
            if self.in_place(name):
                for setting in ("_attention_backend", "_parallel_config"):
                    if setting in layer.processor.__dict__:
                        setattr(layer.original, setting, layer.processor.__dict__[setting])
                layer.module.processor = layer.original
            elif name in self._seen:
                logger.warning("%s carries %s now: left as it is", name, type(layer.module.processor).__name__)
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


class Handle:
    """What `apply` returns: restores what it swapped, by `restore()` or at the end of a `with` block."""

    def __init__(self, swaps: list[ModelSwap]) -> None:
        self._swaps = swaps

    @property
    def layers(self) -> list[SwappedLayer]:
        """The swapped layers of all models."""
        return [layer for swap in self._swaps for layer in swap.layers.values()]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The mechanism's own trainable weights, for an optimizer."""
        for layer in self.layers:
            if layer.weights is not None:
                yield from layer.weights.parameters()

    def restore(self) -> None:
        """Put the models' own attention back; raises `ValueError` where it is back already or was swapped anew."""
        stale = [swap for swap in self._swaps if current(swap.model) is not swap]
        if stale:
            raise ValueError(
                f"this handle's swap of {type(stale[0].model).__name__} is no longer in place: nothing to restore"
            )
        for swap in self._swaps:
            swap.undo()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exception: object) -> None:
        for swap in self._swaps:
            if current(swap.model) is swap:
                swap.undo()

    def __repr__(self) -> str:
        parts = [f"{len(s.layers)} layers of {type(s.model).__name__}" for s in self._swaps]
        return f"<Handle {self._swaps[0].mechanism}: {', '.join(parts)}>"


def apply(
    target: Any,
    mechanism: Mechanism | str,
    *,
    layers: LayerChoice = None,
    steps: StepChoice = None,
    backend: str = "auto",
    components: Iterable[str] | None = None,
    min_tokens: int = 0,
    **options: Any,
) -> Handle:
    """Swap the attention of `target` for `mechanism`; a second call replaces the first.

    Args:
        target: a `DiffusionPipeline`, a `ModularPipeline` or a model.
        mechanism: a config like `ClearAttention(radius=16)`, or its short name with the config's fields as `options`.
        layers: glob or globs on dotted layer names (`"single_transformer_blocks.*"`), or a predicate. None: every
            layer that the mechanism is meant for. Cross-attention to text is never swapped.
        steps: a slice of the denoising steps, or a predicate on a step's number; the others stay dense.
        backend: kernel by name, see `diffattn.kernels`; "auto" chooses and logs its choice.
        components: names of the pipeline's parts to swap. None: unet, transformer and transformer_2.
        min_tokens: leave the model's own attention in calls with fewer tokens.

    Raises `ValueError`, with nothing changed, for unknown names and options, families that are not known, globs that
    match nothing, and mechanisms that the model cannot carry.
    """
    mechanism = resolve(mechanism, **options)
    return commit(plan_all(target, mechanism, layers, steps, backend, components, min_tokens))


@functools.cache  # once per mechanism
def _say_untrained(name: str) -> None:
    logger.warning(
        "%s takes the place of the attention that the model was trained with: expect other pictures; load weights "
        "trained for it by diffattn.load, or keep the first steps dense by steps=slice(4, None)",
        name,
    )


def attn_processors(
    model: nn.Module,
    mechanism: Mechanism | str,
    *,
    layers: LayerChoice = None,
    backend: str = "auto",
    min_tokens: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Processors for `model.set_attn_processor`, with the keys of `model.attn_processors`.

    It hangs the reader of the grid on the model; setting the processors makes the swap. Layers that are not swapped
    keep their own. `restore(model)` undoes both. Arguments and errors as in `apply`.
    """
    own = getattr(model, "attn_processors", None)
    if own is None:
        raise ValueError(f"{type(model).__name__} has no set_attn_processor in diffusers: use diffattn.apply")
    swap = plan(model, resolve(mechanism, **options), layers=layers, backend=backend, min_tokens=min_tokens)
    swap.install()
    return {**model.attn_processors, **{f"{name}.processor": layer.processor for name, layer in swap.layers.items()}}  # type: ignore[dict-item]


def restore(target: Any) -> None:
    """Undo `apply` on a pipeline or model, bit for bit; raises `ValueError` where nothing is swapped.

    Layers whose processor something else has replaced since are left alone and named in a warning.
    """
    swaps = swaps_of(target)
    if not swaps:
        raise ValueError(f"nothing to restore: no attention of this {type(target).__name__} is swapped")
    for swap in swaps:
        swap.undo()


def current(model: nn.Module) -> ModelSwap | None:
    """The swap in place on a model."""
    return getattr(model, _ATTRIBUTE, None)


def swaps_of(target: Any) -> list[ModelSwap]:
    """The swaps in place on a model, or on any part of a pipeline."""
    parts = [target] if isinstance(target, nn.Module) else getattr(target, "components", {}).values()
    found = [current(_unwrap(part)) for part in parts if isinstance(part, nn.Module)]
    return [swap for swap in found if swap is not None]


def resolve(mechanism: Mechanism | str, **options: Any) -> Mechanism:
    """A mechanism from its config or its short name and options."""
    if isinstance(mechanism, str):
        return config.create(mechanism, **options)
    if not isinstance(mechanism, Mechanism):
        raise TypeError(
            f"mechanism must be a short name or a config such as ClearAttention(radius=16), got {mechanism!r}"
        )
    if options:
        raise ValueError(f"options {sorted(options)} go with a short name; {type(mechanism).__name__} carries its own")
    return mechanism


def models_of(target: Any, components: Iterable[str] | None = None) -> list[nn.Module]:
    """The models of a pipeline that `apply` takes, or the model itself."""
    if isinstance(target, nn.Module):
        if components is not None:
            raise ValueError(
                f"components= names parts of a pipeline, but the target is the model {type(target).__name__}"
            )
        return [_unwrap(target)]
    parts = getattr(target, "components", None)
    if not isinstance(parts, dict):
        raise TypeError(f"expected a diffusers pipeline or model, got {type(target).__name__}")
    chosen = [name for name in COMPONENTS if parts.get(name) is not None] if components is None else list(components)
    for name in chosen:
        if not isinstance(parts.get(name), nn.Module):
            models = sorted(key for key, part in parts.items() if isinstance(part, nn.Module))
            raise ValueError(f"{type(target).__name__} has no model {name!r}; its models: {', '.join(models)}")
    if not chosen:
        raise ValueError(f"{type(target).__name__} has none of {', '.join(COMPONENTS)}; name its model by components=")
    return [_unwrap(parts[name]) for name in chosen]


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile(model)`."""
    return getattr(model, "_orig_mod", model)


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Dotted name -> every module that computes by a processor."""
    return {name: module for name, module in model.named_modules() if callable(getattr(module, "processor", None))}


def own_processor(module: nn.Module) -> Any:
    """A layer's processor, or the one under ours."""
    processor: Any = module.processor
    return processor.layer.original if isinstance(getattr(processor, "layer", None), SwappedLayer) else processor


def plan_all(
    target: Any,
    mechanism: Mechanism,
    layers: LayerChoice = None,
    steps: StepChoice = None,
    backend: str = "auto",
    components: Iterable[str] | None = None,
    min_tokens: int = 0,
) -> list[ModelSwap]:
    """`plan` for every model of `target`, with a common step counter; changes nothing."""
    models = models_of(target, components)
    if steps is not None and isinstance(target, nn.Module):
        raise ValueError("steps= counts the steps of a pipeline; pass the pipeline, not its model")
    counter = None if isinstance(target, nn.Module) else StepCounter(target)
    chosen = step_predicate(steps)
    swaps = [plan(model, mechanism, layers=layers, backend=backend, min_tokens=min_tokens) for model in models]
    for swap in swaps:
        swap.state.steps, swap.state.chosen = counter, chosen
    return swaps


def commit(swaps: list[ModelSwap], trained: bool = False) -> Handle:
    """Put planned swaps in place; `trained` where weights made for the mechanism come along."""
    for swap in swaps:
        if not (trained or swap.mechanism.exact):
            _say_untrained(swap.mechanism.type)
        swap.install()
        swap.put_in_place()
        logger.info("%s on %d layers of %s", swap.mechanism, len(swap.layers), type(swap.model).__name__)
    return Handle(swaps)


def plan(model: nn.Module, mechanism: Mechanism, *, layers: LayerChoice, backend: str, min_tokens: int) -> ModelSwap:
    """Decide which layers are swapped, raising for whatever cannot be; changes nothing."""
    family = family_of(model)
    mechanism.check_backend(backend)
    if getattr(mechanism, "ntk_factor", 1.0) != 1.0 and family.rope is None:
        raise ValueError(f"ntk_factor scales a rotary embedding read at every call, which {family.name} does not have")
    swap = ModelSwap(model, family, mechanism)
    swap.state.needs_progress = "progress" in mechanism.needs
    modules = attention_modules(model)
    entries = find_layers(family, [name for name in modules if not _in_cross_block(model, name)])
    chosen = _choose(entries, layers)
    latent = LatentReader(family.latent) if family.latent else None
    readers: dict[tuple[str, Read], GridReader] = {}
    for name, module in modules.items():
        reason = _reason_to_keep(name, module, entries, chosen, mechanism, explicit=layers is not None)
        if reason is not None:
            swap.kept[name] = reason
            continue
        entry, owner = entries[name], owner_of(entries[name], name)
        swap.layers[name] = SwappedLayer(
            name=name,
            module=module,
            kind=entry.kind,
            mechanism=mechanism,
            backend=backend,
            reader=readers.setdefault((owner, entry.read), GridReader(entry.read)),
            state=swap.state,
            index=len(swap.layers),
            original=own_processor(module),
            min_tokens=min_tokens,
            latent=latent,
            weights=_weights(mechanism, module),
        )
    if not swap.layers:
        reasons = "; ".join(sorted(set(swap.kept.values()))) or "it has no attention layers"
        raise ValueError(f"no layer of {type(model).__name__} can carry {mechanism}: {reasons}")
    return swap


def _in_cross_block(model: nn.Module, name: str) -> bool:
    """Is the layer in a UNet block that attends to text alone, twice?"""
    return bool(vars(model.get_submodule(name.rpartition(".")[0])).get("only_cross_attention", False))


def _reason_to_keep(
    name: str, module: nn.Module, entries: dict[str, Layers], chosen: set[str], mechanism: Mechanism, explicit: bool
) -> str | None:
    if name not in entries:
        return "not a self-attention over the grid"
    if name not in chosen:
        return "left out by layers="
    if not explicit and entries[name].kind not in mechanism.kinds:
        return f"{entries[name].kind} attention: {mechanism.type} takes it only by layers="
    processor = own_processor(module)
    if not intercept.has_exit(processor):
        return f"{type(processor).__name__} computes no softmax attention by a call that can be swapped"
    return None


def _choose(names: Iterable[str], layers: LayerChoice) -> set[str]:
    """The layers that a glob, globs or a predicate pick."""
    names = list(names)
    if layers is None:
        return set(names)
    if callable(layers):
        chosen = {name for name in names if layers(name)}
    else:
        globs = [layers] if isinstance(layers, str) else list(layers)
        unmatched = [glob for glob in globs if not fnmatch.filter(names, glob)]
        if unmatched:
            raise ValueError(
                f"layers={unmatched[0]!r} matches none of {len(names)} layers, such as {', '.join(names[:3])}"
            )
        chosen = {name for glob in globs for name in fnmatch.filter(names, glob)}
    if not chosen:
        raise ValueError(f"layers= picks none of {len(names)} layers, such as {', '.join(names[:3])}")
    return chosen


def _weights(mechanism: Mechanism, module: nn.Module) -> nn.Module | None:
    heads, inner_dim = cast(int, module.heads), cast(int, module.inner_dim)
    return mechanism.weights(heads, inner_dim // heads)


def step_predicate(steps: StepChoice) -> Callable[[int, int], bool] | None:
    """`steps=` as a predicate on the step and the number of steps."""
    if steps is None:
        return None
    if isinstance(steps, slice):
        return lambda step, total: step in range(*steps.indices(total))
    if callable(steps):
        return lambda step, total: bool(steps(step))
    raise TypeError(f"steps must be a slice or a predicate on the step number, got {steps!r}")
