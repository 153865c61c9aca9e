"""What is known of each attention layer, and whether a row can name it."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..families import arguments
from ..families.layout import MaskKind
from .grids import VIEWS, Source, View, spoken
from .probing import Finding, Place, probe, probe_levels
from .rows import Reader, level_reader, reader_for
from .watching import Call, Forward, Watch

KEPT, GRID, MISSING = "kept", "grid", "missing"


@dataclass
class Layer:
    """One attention layer."""

    name: str
    calls: list[Call] = field(default_factory=list)
    """Those of one forward."""
    findings: list[Finding] = field(default_factory=list)
    """Of these calls; empty before a grid was tried."""
    used: tuple[Source, View] | None = None
    """The grid that was tried on it."""
    reader: Reader | None = None
    places: list[Place] = field(default_factory=list)
    verdict: str = MISSING
    told: str = ""

    @property
    def located(self) -> bool:
        """Is every call's place of the cells measured?"""
        return bool(self.findings) and all(finding.place is not None for finding in self.findings)

    @property
    def tokens(self) -> list[int]:
        """Queries of its calls."""
        return [call.query[-2] for call in self.calls]


class Listing(Watch):
    """Notes beside the calls what modules were given: feature maps, numbers of frames, their block's input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.levels: dict[str, tuple[int, int]] = {}
        """Module -> height and width of its input."""
        self.frames: dict[str, int] = {}
        self.inputs: dict[str, int] = {}
        """Module -> tokens of its first argument; -1 where that is no sequence of tokens."""
        self.masks: dict[str, list[Tensor | None]] = {}
        """Layer -> masks (..., queries, keys) of its calls."""

    def answer(self, call: Call, given: dict[str, Any], compute: Callable[..., Tensor]) -> Tensor:
        """What the call gives."""
        self.masks.setdefault(call.layer, []).append(given.get("attn_mask"))
        return compute(**given)

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module's forward begins."""
        if not any(True for _ in module.children()):
            return
        first = args[0] if args else kwargs.get("hidden_states")
        self.inputs[name] = first.shape[1] if isinstance(first, Tensor) and first.ndim == 3 else -1
        try:
            given = arguments(module, args, kwargs)
        except TypeError:  # called by a hook with other arguments than the forward's own
            return
        features, frames = given.get("hidden_states"), given.get("num_frames")
        if isinstance(features, Tensor) and features.ndim == 4:
            self.levels[name] = int(features.shape[2]), int(features.shape[3])
        if isinstance(frames, int) and not isinstance(frames, bool):
            self.frames[name] = frames

    def layers(self) -> dict[str, Layer]:
        """The layers that made calls."""
        found: dict[str, Layer] = {}
        for call in self.calls:
            found.setdefault(call.layer, Layer(call.layer)).calls.append(call)
        return found

    def has_features(self, layer: Layer) -> bool:
        """Is the block around the layer called with a token for each of the layer's, or for each without the others?"""
        block = layer.name.rpartition(".")[0]
        if not layer.places:
            return True
        place, tokens = layer.places[0], layer.tokens[0]
        return self.inputs.get(block) in {
            tokens,
            tokens - place.after,
            tokens - place.before,
            tokens - place.before - place.after,
        }

    def mask_kind(self, layer: Layer) -> MaskKind:
        """What the masks of the layer are, as a row says it."""
        masks = zip(self.masks[layer.name], layer.places, strict=False)
        kinds = {_mask_kind(mask, place.before) for mask, place in masks}
        each: tuple[MaskKind, ...] = ("queries", "padding")
        return next((kind for kind in each if kind in kinds), "keys")


def _mask_kind(mask: Tensor | None, cell: int) -> MaskKind:
    """`cell` is a query that is no padding: those that it sees have its mask, where only padding differs."""
    if mask is None or mask.shape[-2] == 1:
        return "keys"
    row = mask[..., cell : cell + 1, :]
    seen = row if row.dtype == torch.bool else row > -1e4
    alike = (mask == row).all(dim=-1)
    if alike.shape[-1] == seen.shape[-1]:
        alike = alike | ~seen[..., 0, :]
    return "padding" if alike.all() else "queries"


def locate(forward: Forward, layers: dict[str, Layer], found: list[Source]) -> None:
    """Try the grids on the layers whose calls they may fit, until there is a reader for each.

    What no call depends on says nothing; other arguments are asked only where those with the usual names do not count.
    """
    counts = False
    for source in found:
        if counts and not source.usual:
            return
        for view in VIEWS:
            fitting = {
                layer.name
                for layer in layers.values()
                if layer.reader is None and any(view.fits(source, call.query) for call in layer.calls)
            }
            probed = probe(forward, source, view) if fitting else {}
            if not any(finding.worth for findings in probed.values() for finding in findings):
                continue
            counts = counts or source.usual
            for name, findings in probed.items():
                layer = layers.get(name)
                if layer is not None and layer.reader is None and len(findings) == len(layer.calls):
                    _take(layer, forward, findings, (source, view), name in fitting)


def _take(layer: Layer, forward: Forward, findings: list[Finding], used: tuple[Source, View], fits: bool) -> None:
    """Keep what was found of the layer where it says more than what is known."""
    places = [finding.place for finding in findings if finding.place is not None]
    reader = None
    if fits and len(places) == len(findings):
        reader = reader_for(forward.model, forward.given, *used, list(zip(places, layer.tokens, strict=True)))
    known = layer.findings[0].worth if layer.findings else -1
    more = findings[0].worth > known or (findings[0].worth == known and fits and layer.used is None)
    if reader is not None or more:
        layer.findings, layer.reader = findings, reader
        layer.used = used if fits else None
        layer.places = places if fits and len(places) == len(findings) else []


def locate_in_levels(forward: Forward, layers: dict[str, Layer], listing: Listing) -> None:
    """Give layers that are not located the reader of a module around them whose input has as many cells."""
    owners: dict[str, str] = {}
    for layer in layers.values():
        query, key = layer.calls[0].query, layer.calls[0].key
        if layer.reader is not None or len(layer.calls) > 1 or query[-2] != key[-2]:
            continue
        for owner in _around(layer.name):
            size, frames = listing.levels.get(owner), listing.frames.get(owner)
            if size is not None and math.prod(size) == query[-2]:
                owners[layer.name] = owner
                layer.reader = level_reader(layer.name, owner, temporal=False)
                break
            if frames == query[-2]:
                layer.reader, layer.findings = level_reader(layer.name, owner, temporal=True), []
                layer.places = [Place((frames, 1, 1), 0, 0)]
                break
    found = probe_levels(forward, owners, {name: (1, *size) for name, size in listing.levels.items()}) if owners else {}
    for name, findings in found.items():
        layer = layers[name]
        layer.findings = findings
        layer.places = [finding.place for finding in findings if finding.place is not None]
        if len(layer.places) != len(findings):
            layer.reader, layer.places = None, []


def _around(name: str) -> Iterator[str]:
    """The layer and the modules around it, from the inside."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def judge(layer: Layer, listing: Listing) -> None:
    """Decide whether a row can name the layer, and say why or why not."""
    if layer.reader is not None:
        features, mask = listing.has_features(layer), listing.mask_kind(layer)
        layer.reader = dataclasses.replace(layer.reader, features=features, mask=mask)
    layer.verdict, layer.told = _verdict(layer)


def _verdict(layer: Layer) -> tuple[str, str]:
    seen, call = _telling(layer)
    queries, keys = call.query[-2], call.key[-2]
    if seen is not None and not seen.in_queries:
        return KEPT, "its queries do not depend on the cells"
    if seen is not None and not seen.in_keys:
        return KEPT, "its keys do not depend on the cells: attention to text or other prompts"
    if queries != keys and seen is None:
        return MISSING, "other keys than queries, and no grid is known that could be among both"
    if queries != keys:
        kind = "fewer" if queries < keys else "more"
        return MISSING, f"{kind} queries than keys, cells among both: write its row by hand, with fewer_queries=True"
    unreachable = next((own.unreachable for own in layer.calls if own.unreachable), None)
    if unreachable is not None:
        return MISSING, unreachable
    if any(own.causal or own.dropout for own in layer.calls):
        return MISSING, "it attends in a causal order or with dropout, which windows do not have"
    if layer.reader is None and layer.places:
        return MISSING, f"its cells are {where(layer.places[0])}, which no reader tells"
    if layer.reader is None:
        known = seen is not None and bool(seen.reason)
        return MISSING, seen.reason if seen is not None and known else "no argument tells a grid of so many tokens"
    if layer.located and not all(finding.same for finding in layer.findings):
        return MISSING, "its keys are other cells than its queries"
    return GRID, where(layer.places[0]) + _source(layer)


def _telling(layer: Layer) -> tuple[Finding | None, Call]:
    """The call that depends most on the cells: one alone would keep the layer out of the row's "kept"."""
    if not layer.findings:
        return None, layer.calls[0]
    return max(zip(layer.findings, layer.calls, strict=True), key=lambda pair: pair[0].in_queries + pair[0].in_keys)


def where(place: Place) -> str:
    """Where the cells lie, in words."""
    sides = [f"{count} tokens {side}" for side, count in (("before", place.before), ("after", place.after)) if count]
    size = f"{place.size[0]} frames" if place.size[1:] == (1, 1) else spoken(place.size)
    return f"{size}, {' and '.join(sides) or 'the cells alone'}"


def _source(layer: Layer) -> str:
    assert layer.reader is not None
    if not layer.reader.owned:
        return ""
    return ", by the features around it" if layer.located else ", by the number of frames around it, not measured"
