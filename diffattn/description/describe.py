"""Describe a model whose family has no row: its attention, its grid, a row to try, and what the row lacks."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import families
from ..swap.calls.steps import unwrap
from ..swap.model_swap import current
from ..swap.unsupported import check_supported
from .checks import Check, batch_check, checks_of
from .grids import Source
from .layers import GRID, Layer, Listing, judge, locate, locate_in_levels
from .report import Description, Kind
from .rows import Reader, distinct, evaluated, join_patterns, row_text
from .searching import sources
from .watching import Forward, has_processor, in_evaluation


def describe(model: nn.Module, /, **inputs: Any) -> Description:
    """What a row for `model` needs, found by running it: `print` it, or read its fields.

    Makes a dozen or more forwards without gradients, one for each binary digit of the number of cells among them: take
    a tiny random model of the class, inputs with a batch of two, and an image that is not square. The model is as it
    was afterwards.

    Args:
        model: any model, of a family with a row or without.
        inputs: the arguments of its forward, by name.

    Raises `TypeError` for what is no model, `ValueError` where its attention is swapped, and where its output is not
    finite or not twice the same.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, such as pipe.transformer or pipe.unet, got {type(model).__name__}")
    model = unwrap(model)
    if current(model) is not None:
        raise ValueError(f"expected a {type(model).__name__} with its own attention; call diffattn.restore first")
    forward = Forward(model, inputs)
    with in_evaluation(model):
        with Listing(model) as listing:
            output = forward()
        forward.check_repeats(output)
        layers, found = listing.layers(), sources(model, forward.given)
        locate(forward, layers, found)
        locate_in_levels(forward, layers, listing)
        for layer in layers.values():
            judge(layer, listing)
        description = _told(forward, layers, listing, found)
        in_row = {name: layer for name, layer in layers.items() if layer.verdict == GRID}
        return _with_row(description, forward, in_row, {*layers, *listing.ran}, found) if in_row else description


def _told(forward: Forward, layers: dict[str, Layer], listing: Listing, found: list[Source]) -> Description:
    """All but the row."""
    model, kinds = forward.model, _kinds(layers.values())
    in_row = [layer for layer in layers.values() if layer.verdict == GRID]
    grids = dict.fromkeys(
        layer.used[0].told
        for layer in in_row
        if layer.used is not None and layer.reader is not None and not layer.reader.owned
    )
    missing = [*_refused(model), *_silent(layers, listing), *(kind.missing for kind in kinds if kind.missing)]
    names = [cls.__name__ for cls in type(model).__mro__]
    known = next((row.name for row in families.FAMILIES if set(names) & set(row.models)), None)
    if known is None:
        missing += [f"apply refuses it: {families.REFUSED[name]}" for name in names if name in families.REFUSED]
    if not in_row and not found:
        missing.append(f"no grid among the arguments: {_given(forward)}")
    elif not in_row and not kinds and not missing:
        missing.append("no call of softmax attention was seen")
    elif not in_row:
        tried = "; ".join(dict.fromkeys(source.told for source in found))
        missing.append(f"no layer's queries and keys are the cells of a grid that was tried: {tried}")
    return Description(type(model).__name__, tuple(kinds), tuple(grids), tuple(missing), known_row=known)


def _with_row(
    description: Description, forward: Forward, in_row: dict[str, Layer], everything: set[str], found: list[Source]
) -> Description:
    """With the row to try, and what it was asked."""
    groups: dict[Reader, list[str]] = {}
    for name, layer in in_row.items():
        assert layer.reader is not None
        groups.setdefault(layer.reader, []).append(name)
    entries = [
        (join_patterns(names, everything - set(names)), reader)
        for names, reader in zip(groups.values(), distinct([*groups]), strict=True)
    ]
    levels = any(reader.owned for reader in groups)
    row = row_text(forward.model, entries, _options(forward, levels))
    code = "\n\n".join(dict.fromkeys(reader.code for _, reader in entries if reader.code))
    family = evaluated(row, code)
    used = [layer.used[0] for layer in in_row.values() if layer.used is not None]
    video = any(source.axes is not None and source.axes[0] is not None for source in used)
    video = video or any(place.size[0] > 1 for layer in in_row.values() for place in layer.places)
    checks: list[Check] = []
    if not _refused(forward.model):
        kinds = {name: reader.kind for reader, names in groups.items() for name in names}
        places = {name: layer.places for name, layer in in_row.items()}
        samples = max((source.samples for source in used or found), default=1)
        doubts = [Check(None, doubt) for doubt in dict.fromkeys(reader.doubt for reader in groups) if doubt]
        told = checks_of(forward, family, kinds, places, video and not levels)
        checks = [*doubts, batch_check(samples), *told]
    file = "unets.py" if levels else f"{'video' if video else 'image'}_transformers.py"
    return dataclasses.replace(description, row=row, readers=code, family=family, checks=tuple(checks), file=file)


def _options(forward: Forward, levels: bool) -> dict[str, str]:
    """What else the row says; `levels`: there is a grid on each level."""
    given = forward.given
    found = {
        "timestep": next((name for name in ("timestep", "timesteps", "t") if name in given), None),
        "rope": None if levels else _rope(forward),
        "latent": next((name for name in ("sample", "hidden_states", "x") if name in given), None) if levels else None,
    }
    return {key: name for key, name in found.items() if name is not None and (key, name) != ("timestep", "timestep")}


def _rope(forward: Forward) -> str | None:
    """The rotary embedding whose base is read at every forward, where there is one."""
    found = []
    for name, module in forward.model.named_modules():
        theta = vars(module).get("theta")
        if name and isinstance(theta, (int, float)):
            before = forward()
            try:
                setattr(module, "theta", 4 * theta)  # noqa: B010
                found += [] if torch.equal(forward(), before) else [name]
            finally:
                setattr(module, "theta", theta)  # noqa: B010
    return found[0] if len(found) == 1 else None


def _refused(model: nn.Module) -> list[str]:
    """The reason where `apply` refuses the model by name."""
    try:
        check_supported(model)
    except ValueError as error:
        return [str(error)]
    return []


def _silent(layers: dict[str, Layer], listing: Listing) -> list[str]:
    """Attention modules that ran and made no call of softmax attention that is seen."""
    found: dict[str, None] = {}
    for name in dict.fromkeys(listing.ran):
        if name in layers or any(layer.startswith(f"{name}.") for layer in layers):
            continue
        module = listing.module(name)
        if not has_processor(module):
            told = f"{type(module).__name__} attends by itself, without a processor"
        elif name in listing.own_softmax:
            kind = type(module.processor).__name__
            told = f"{kind} computes softmax attention by itself, in no call that a swap reaches"
        else:
            told = f"{type(module.processor).__name__} computes no softmax attention"
        found[f"{spell(name)}: {told}"] = None
    return list(found)


def spell(name: str) -> str:
    """`transformer_blocks.N.attn1`"""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "N", name) or "the model itself"


def _kinds(layers: Iterable[Layer]) -> list[Kind]:
    """Layers of one pattern whose calls are alike are one kind."""
    groups: dict[Any, list[Layer]] = {}
    for layer in layers:
        key = spell(layer.name), layer.verdict, layer.told, *(call.shapes for call in layer.calls)
        groups.setdefault(key, []).append(layer)
    return [
        Kind(spell(own[0].name), tuple(layer.name for layer in own), tuple(own[0].calls), own[0].verdict, own[0].told)
        for own in groups.values()
    ]


def _given(forward: Forward) -> str:
    """What the forward was given."""
    return ", ".join(
        f"{name} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{name} ({type(value).__name__})"
        for name, value in forward.inputs.items()
    )
