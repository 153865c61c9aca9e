"""What a swap would do, decided and checked before anything is changed."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import config
from ..families import Layers, Read, family_of, find_layers, owner_of, row_of
from ..mechanisms.base import Mechanism
from ..options import check_fields, read
from . import intercept
from .calls.frames import Ref, Scope
from .calls.steps import Runs, single_models
from .entrance import Entrance
from .layer import SwappedLayer
from .model_swap import ModelSwap
from .settings.placement import ComponentChoice, LayerChoice, Placement
from .settings.recipe import ModelRecipe, Recipe
from .settings.schedule import Schedule
from .unsupported import check_processor, check_supported, check_told, reason_on_a_line, reason_without_hidden

COMPONENTS = ("unet", "transformer", "transformer_2", "transformer_ref", "unconditional_transformer")
"""Parts of a pipeline that `apply` takes unless told otherwise."""

STAGES = ("prior", "prior_prior", "decoder")
"""Parts that it takes of a pipeline without those, where their classes have a row."""

EVERY = "*"
Mechanisms = Mechanism | Schedule | Recipe | Mapping[str, Mechanism | Schedule]
"""One for all layers, one for each glob on dotted layer names, or a recipe, which names every layer."""


def resolve_all(mechanism: Mechanisms | str, layers: LayerChoice, **options: Any) -> Mechanisms:
    """As `resolve`, for a mapping of globs as well, whose configs carry everything."""
    if not isinstance(mechanism, Mapping):
        if not isinstance(mechanism, (Schedule, Recipe)):
            return resolve(mechanism, **options)
        if options:
            raise ValueError(
                f"options {sorted(options)} go with a short name; a {type(mechanism).__name__} has its own"
            )
        return mechanism
    if layers is not None or options or not mechanism:
        raise ValueError(
            f"expected globs of layers with a config each and neither layers= nor options; got {dict(mechanism)}, "
            f"layers={layers} and options {sorted(options)}; put them into the mapping"
        )
    return {glob: own if isinstance(own, Schedule) else resolve(own) for glob, own in mechanism.items()}


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
    check_fields(mechanism, mechanism.type)  # where its own __post_init__ leaves the base's out
    return mechanism


def models_of(target: Any, components: ComponentChoice = None) -> list[nn.Module]:
    """The models of a pipeline that `apply` takes, or the model itself, each once; of a list of ControlNets each."""
    components = read("components", components, ComponentChoice, "a part's name, or several, such as ['transformer']")
    if isinstance(target, nn.Module):
        if components is not None:
            raise ValueError(
                f"components= names parts of a pipeline, but the target is the model {type(target).__name__}"
            )
        return single_models([target])
    parts = getattr(target, "components", None)
    if not isinstance(parts, dict):
        raise TypeError(f"expected a diffusers pipeline or model, got {type(target).__name__}")
    usual = [name for name in COMPONENTS if parts.get(name) is not None]
    usual = usual or [name for name in STAGES if row_of(parts.get(name)) is not None]
    chosen = usual if components is None else names_in(components)
    for name in chosen:
        if not isinstance(parts.get(name), nn.Module):
            models = sorted(key for key, part in parts.items() if isinstance(part, nn.Module))
            raise ValueError(f"{type(target).__name__} has no model {name!r}; its models: {', '.join(models)}")
    if not chosen:
        raise ValueError(f"{type(target).__name__} has none of {', '.join(COMPONENTS)}; name its model by components=")
    return single_models(parts[name] for name in chosen)


def names_in(choice: str | Iterable[str]) -> list[str]:
    """The names of a choice, of one or several."""
    return [choice] if isinstance(choice, str) else list(choice)


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Dotted name -> every module that computes by a processor."""
    return {name: module for name, module in model.named_modules() if callable(getattr(module, "processor", None))}


def plan_all(target: Any, mechanism: Mechanisms, placement: Placement | None = None) -> list[ModelSwap]:
    """`plan` for every model of `target`, with a common step counter; changes nothing."""
    check_supported(target)
    placement = placement or Placement()
    placement.check(target)
    models = [] if isinstance(mechanism, Recipe) else models_of(target, placement.components)
    if isinstance(mechanism, Recipe):
        swaps = plan_recipe(target, mechanism, placement)
    else:
        rules = {glob: placement.schedule(own) for glob, own in _by_glob(mechanism).items()}
        mixed = isinstance(mechanism, Mapping)
        swaps = [
            plan_mixed(model, rules, placement) if mixed else plan(model, rules[EVERY], placement) for model in models
        ]
    for swap in swaps:
        _check_sigma(target, swap)
        check_told(target, swap.family, swap.mechanisms, placement.counts_steps)
    _leave_shared_layers(swaps)
    runs = Runs(None if isinstance(target, nn.Module) else target)
    parts = [] if isinstance(target, nn.Module) else target.components.values()
    for swap in swaps:
        swap.state.runs, swap.state.exact_frames = runs, placement.exact_frames
        swap.state.chosen, swap.state.left_out = placement.chosen, placement.left_out
        for part in single_models(part for part in parts if isinstance(part, nn.Module)):
            if part is not swap.model:
                swap.entrances += _entrances(swap, part)
    return swaps


def plan_recipe(target: Any, recipe: Recipe, placement: Placement) -> list[ModelSwap]:
    """`plan` of every model that a recipe names, each layer by its own schedule."""
    if placement.layers is not None or placement.components is not None or placement.shares or placement.reuse > 1:
        raise ValueError(
            "a recipe says layers, shares and reuse itself: leave layers=, components=, shares=, reuse= out"
        )
    schedules = [schedule for own in recipe.models.values() for schedule in own.layers.values()]
    if isinstance(target, nn.Module) and any(schedule.needs & {"progress", "memory"} for schedule in schedules):
        raise ValueError(
            "a recipe with parts or reuse counts the steps of a pipeline; pass the pipeline, not its model"
        )
    swaps = []
    for name, own in recipe.models.items():
        model = _named(target, name, own)
        groups: dict[Schedule, list[str]] = {}
        for layer, schedule in own.layers.items():
            groups.setdefault(schedule, []).append(layer)
        swaps.append(_joined(model, [(names, schedule) for schedule, names in groups.items()], placement))
        swaps[-1].state.made_for = own
    return swaps


def _named(target: Any, name: str, own: ModelRecipe) -> nn.Module:
    """The model that a recipe names; raises `ValueError` where there is none of its class with its layers."""
    model = target if isinstance(target, nn.Module) else target.components.get(name)
    if not isinstance(model, nn.Module) or type(model).__name__ != own.name:
        raise ValueError(
            f"this recipe is for the {name} {own.name}, and {type(target).__name__} has {type(model).__name__} there"
        )
    unknown = sorted(own.layers.keys() - attention_modules(model).keys())
    if unknown:
        raise ValueError(f"this recipe has {len(unknown)} layers that this {own.name} lacks, such as {unknown[0]}")
    return model


def _check_sigma(target: Any, swap: ModelSwap) -> None:
    if "sigma" in swap.state.needs and isinstance(target, nn.Module):
        raise ValueError(
            f"{swap.mechanism} needs sigma, the share of noise, which the scheduler of a pipeline tells; pass the "
            f"pipeline, not its model"
        )
    for mechanism in swap.mechanisms:
        if mechanism.needs_steps and isinstance(target, nn.Module):
            raise ValueError(
                f"{mechanism} changes from step to step, which a pipeline counts; pass the pipeline, not its model"
            )


def _by_glob(
    mechanism: Mechanism | Schedule | Mapping[str, Mechanism | Schedule],
) -> Mapping[str, Mechanism | Schedule]:
    return mechanism if isinstance(mechanism, Mapping) else {EVERY: mechanism}


def _leave_shared_layers(swaps: list[ModelSwap]) -> None:
    """Leave layers that two models share to the first of them."""
    first: dict[int, ModelSwap] = {}
    for swap in swaps:
        for name, layer in [*swap.layers.items()]:
            owner = first.setdefault(id(layer.module), swap)
            if owner is not swap:
                del swap.layers[name]
                swap.kept[name] = f"shared with {type(owner.model).__name__}, and swapped there"


def _entrances(swap: ModelSwap, owner: nn.Module) -> list[Entrance]:
    """The modules of `owner` whose forward tells layers of the swap their grids, and `owner` itself; none for others.

    A ControlNet made from a transformer shares layers with it. It is called by itself, so its own forward has to be
    read.
    """
    layers = {id(layer.module): layer for layer in swap.layers.values()}
    shared = {name: layers[id(module)] for name, module in attention_modules(owner).items() if id(module) in layers}
    if not shared:
        return []
    family = family_of(owner)
    entries = find_layers(family, shared)
    found = {"": Entrance(Ref(owner), family)}
    for name, layer in shared.items():
        if name not in entries:
            raise ValueError(
                f"{type(owner).__name__} shares the layer {layer.name} with {type(swap.model).__name__}, and its row "
                f"among the families has no {name}; leave it out with layers="
            )
        inside = owner_of(entries[name], name)
        entrance = found.setdefault(inside, Entrance(Ref(owner.get_submodule(inside)), None))
        entrance.reads[layer.scope] = entries[name].read
    return list(found.values())


def plan_mixed(model: nn.Module, schedules: Mapping[str, Schedule], placement: Placement) -> ModelSwap:
    """`plan` with a schedule for each glob of layers, no layer by two of them."""
    scaling = [own for schedule in schedules.values() for own in schedule.mechanisms if _scales_rope(own)]
    if scaling and len(schedules) > 1:
        raise ValueError(
            f"expected mechanisms that leave the model's rotary embedding alone; got {scaling[0]}; put it on alone"
        )
    return _joined(model, list(schedules.items()), placement)


def _joined(model: nn.Module, schedules: Sequence[tuple[str | list[str], Schedule]], placement: Placement) -> ModelSwap:
    """One swap with a schedule for each choice of layers."""
    first, *others = (plan(model, own, replace(placement, layers=layers)) for layers, own in schedules)
    for other in others:
        twice = sorted(first.layers.keys() & other.layers.keys())
        if twice:
            raise ValueError(
                f"expected globs that pick no layer twice; got {[layers for layers, _ in schedules]}, {len(twice)} "
                f"layers such as {twice[0]} by two; make them narrower"
            )
        first.join(other)
    first.entrances = _entrances(first, model)
    return first


def plan(model: nn.Module, schedule: Schedule, placement: Placement) -> ModelSwap:
    """Decide which layers are swapped, raising for whatever cannot be; changes nothing."""
    check_supported(model)
    _check_one_input(schedule)
    family, layers = family_of(model), placement.layers
    for own in schedule.mechanisms:
        own.check_backend(placement.backend)
        if _scales_rope(own) and family.rope is None:
            raise ValueError(
                f"ntk_factor scales a rotary embedding read at every call, which {family.name} does not have"
            )
        if _scales_rope(own) and len(schedule.parts) > 1:
            raise ValueError(f"ntk_factor scales a rotary embedding for a whole run: leave it out of {schedule}")
    mechanism = schedule.main.mechanism
    swap = ModelSwap(model, family, mechanism)
    swap.state.needs = schedule.needs
    modules = attention_modules(model)
    entries = find_layers(family, [name for name in modules if not _in_cross_block(model, name)])
    chosen = _choose(entries, layers)
    scopes: dict[tuple[str, Read], Scope] = {}
    for name, module in modules.items():
        reason = _reason_to_keep(name, module, entries, chosen, mechanism, explicit=layers is not None)
        if reason is not None:
            swap.kept[name] = reason
            continue
        entry, owner = entries[name], owner_of(entries[name], name)
        check_processor(intercept.original_of(module.processor), known=entry.helpers)
        swap.layers[name] = SwappedLayer(
            name=name,
            ref=Ref(module),
            kind=entry.kind,
            schedule=schedule,
            backend=placement.backend,
            scope=scopes.setdefault((owner, entry.read), Scope()),
            state=swap.state,
            index=len(swap.layers),
            min_tokens=placement.min_tokens,
            weights=_weights(schedule, name, module),
            row=entry,
        )
    if not swap.layers:
        reasons = "; ".join(sorted(set(swap.kept.values()))) or "it has no attention layers"
        raise ValueError(f"no layer of {type(model).__name__} can carry {mechanism}: {reasons}")
    swap.entrances = _entrances(swap, model)
    return swap


def _check_one_input(schedule: Schedule) -> None:
    """Raise where parts of a schedule ask for the input of the block and for that of the layer."""
    if {"features", "hidden"} <= schedule.needs:
        raise ValueError(
            f"expected parts that look at the input of the block or at that of the layer; got both in {schedule}; "
            f"leave one of them out"
        )


def _scales_rope(mechanism: Mechanism) -> bool:
    return bool(getattr(mechanism, "ntk_factor", 1.0) != 1.0)


def _in_cross_block(model: nn.Module, name: str) -> bool:
    """Does the layer attend to text alone, by itself or by the UNet block around it?"""
    block, layer = vars(model.get_submodule(name.rpartition(".")[0])), vars(model.get_submodule(name))
    alone = block.get("only_cross_attention", False) or layer.get("only_cross_attention", False)
    return bool(alone) or block.get("self_attn") is False


def _reason_to_keep(
    name: str, module: nn.Module, entries: dict[str, Layers], chosen: set[str], mechanism: Mechanism, explicit: bool
) -> str | None:
    if name not in entries:
        return "not a self-attention over the grid"
    if name not in chosen:
        return "left out by layers="
    if not explicit and entries[name].kind not in mechanism.kinds:
        return f"{entries[name].kind} attention: {mechanism.type} takes it only by layers="
    along_frames = any(entry.kind == "temporal" for entry in entries.values())
    if not explicit and mechanism.across_frames and along_frames and entries[name].kind != "temporal":
        return f"attention within one frame: {mechanism.type} would change nothing"
    if "features" in mechanism.needs and not entries[name].has_features:
        return f"its block is not called with the block's input, which {mechanism.type} compares"
    if (reason := reason_without_hidden(mechanism, module)) is not None:
        return reason
    if mechanism.one_mask and entries[name].mask_of(module) == "queries":
        return f"each query has a mask of its own, and {mechanism.type} takes one for all"
    if entries[name].line and (reason := reason_on_a_line(mechanism)) is not None:
        return reason
    processor = intercept.original_of(module.processor)
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
        globs = names_in(layers)
        unmatched = [glob for glob in globs if not fnmatch.filter(names, glob)]
        if unmatched:
            raise ValueError(
                f"layers={unmatched[0]!r} matches none of {len(names)} layers, such as {', '.join(names[:3])}"
            )
        chosen = {name for glob in globs for name in fnmatch.filter(names, glob)}
    if not chosen:
        raise ValueError(f"layers= picks none of {len(names)} layers, such as {', '.join(names[:3])}")
    return chosen


_ANY_SIZE = 8, 64
"""Heads and their size, to ask a mechanism whether it has weights at all."""


def _weights(schedule: Schedule, name: str, module: nn.Module) -> nn.Module | None:
    """Fresh weights of the layer's mechanism, which its parts share where they differ in options alone."""
    mechanism, size = schedule.main.mechanism, _heads(module)
    if len({type(own) for own in schedule.mechanisms}) > 1:
        owning = [own for own in schedule.mechanisms if own.weights(*_ANY_SIZE) is not None]
        if owning:
            raise ValueError(f"{owning[0]} has weights of its own, which parts of other kinds cannot share: {schedule}")
    if size is not None:
        weights, own = mechanism.weights(*size), next(module.parameters(), None)
        return weights if weights is None or own is None or own.is_meta else weights.to(own.device)
    with torch.device("meta"):  # leaves the random numbers alone
        wanted = mechanism.weights(*_ANY_SIZE) is not None
    if wanted:
        raise ValueError(
            f"{mechanism} has weights of its own for every layer, but {type(module).__name__} ({name}) tells neither "
            f"by heads and inner_dim nor by names like them how many heads of what size it has; leave it out by layers="
        )
    return None


def _heads(module: nn.Module) -> tuple[int, int] | None:
    """How many heads a layer has, and their size, by the names that diffusers' attention modules use."""
    heads = _first_number(module, "heads", "num_heads", "num_attention_heads")
    if heads is None:
        return None
    query = getattr(module, "to_q", None) or getattr(module, "to_query", None)
    width = _first_number(module, "inner_dim") or (None if query is None else _first_number(query, "out_features"))
    head_dim = _first_number(module, "head_dim", "dim_heads") if width is None else width // heads
    return None if head_dim is None else (heads, head_dim)


def _first_number(module: nn.Module, *names: str) -> int | None:
    """The first of these attributes that is a number."""
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
