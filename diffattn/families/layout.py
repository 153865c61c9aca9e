"""Where the tokens of an attention layer lie, and which layers a model family has: what a row says."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..grid import TokenGrid

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """A grid and how many other tokens lie on its sides: None is unknown until the call, and takes what is left.

    With 0 on both sides the layer sees the cells alone.
    """

    height: int
    width: int
    frames: int = 1
    before: int | None = None
    after: int | None = 0
    also: tuple[tuple[int, int, int, int], ...] = ()
    """Further grids among the other tokens: tokens from the first cell to their first, then frames, height, width."""
    aside: int = 0
    """A call of so many queries and keys is one of other tokens among themselves."""
    apart: bool = False
    """Is every call with fewer keys one of other tokens among themselves?"""

    def grid(self, tokens: int, queries: int | None = None) -> TokenGrid:
        """The grid of a call with this many tokens; raises `ValueError` where they are not the layout's.

        With fewer queries than tokens those that lie before the cells, then the last ones, do not ask.
        """
        cells = self.frames * self.height * self.width
        known = (self.before or 0) + (self.after or 0)
        rest = tokens - cells - known
        if rest < 0 or (rest and self.before is not None and self.after is not None):
            raise ValueError(
                f"the layer sees {tokens} tokens, but the model was called for a grid of "
                f"{self.frames} x {self.height} x {self.width} = {cells} cells{self._others(known)}: a use of the "
                f"model that is not known; call diffattn.restore first"
            )
        before = rest if self.before is None else self.before
        after, silent = tokens - cells - before, tokens - (tokens if queries is None else queries)
        if silent > before + after:
            raise ValueError(
                f"the layer has {queries} queries, and the model was called for a grid of {self.frames} x "
                f"{self.height} x {self.width} = {cells} cells: a use of the model that is not known; call "
                "diffattn.restore first"
            )
        first = min(before, silent)
        return TokenGrid(self.height, self.width, self.frames, before, after, (first, silent - first))

    def is_aside(self, queries: int, keys: int) -> bool:
        """Is a call of so many queries and keys one of other tokens among themselves?"""
        if self.apart:
            return keys < self.frames * self.height * self.width + (self.before or 0) + (self.after or 0)
        return queries == keys == self.aside

    def further(self, grid: TokenGrid) -> tuple[TokenGrid, ...]:
        """The grids of `also` in a call whose first grid is `grid`."""
        found = []
        for start, frames, height, width in self.also:
            before = grid.before + start
            after = grid.tokens - before - frames * height * width
            found.append(TokenGrid(height, width, frames, before, after))
        return tuple(found)

    def _others(self, known: int) -> str:
        if self.before is None or self.after is None:
            return f" and {known} or more other tokens" if known else ""
        return f" and {known} other tokens" if known else " and no other tokens"


Read = Callable[[nn.Module, Arguments], tuple[Layout, ...]]
"""Module and the named arguments of its forward -> one layout for the whole batch, or one per sample."""

MaskKind = Literal["keys", "padding", "queries"]


@dataclass(frozen=True)
class Layers:
    """Attention layers of one kind: those whose dotted name matches `name` as a whole."""

    name: str
    kind: str
    read: Read
    owner: str | None = None
    """Regular expression for the module whose forward is read: a group of `name`'s match start; None: the model."""
    has_features: bool = True
    """Is the first argument of the block around the layer its input, which some mechanisms compare?"""
    mask: MaskKind = "keys"
    """What a mask of the layer's own is: the same for all queries; one over queries and keys that only says what is
    padding, so that one over keys does; or of every query its own."""
    fewer_queries: bool = False
    """May a call have fewer queries than keys, those of its first and last other tokens missing? A causal call of such
    a layer is its text's own."""
    helpers: tuple[str, ...] = ()
    """Functions beside the processor that ask for attention, whose calls `read` knows."""
    masked_by: str | None = None
    """Attribute of the attention module that is None where a layer has no such mask; None: all have it."""
    line: bool = False
    """Are the cells a line in time, one row of one frame, in every call?"""

    def mask_of(self, module: nn.Module) -> MaskKind:
        """What a mask of this layer's own is."""
        unmasked = self.masked_by is not None and getattr(module, self.masked_by, None) is None
        return "keys" if unmasked else self.mask


def nothing_refused(call: Arguments) -> str | None:
    """Every call of the model treats its tokens alike."""
    return None


@dataclass(frozen=True)
class TokenPath:
    """Where the tokens of a model enter its blocks and leave them, so that they may be put in another order there."""

    models: tuple[str, ...]
    """Class names of the models for which it is so."""
    enter: str
    """Module whose output holds the cells, first: (b, tokens, c), or (b, c, frames, rows, columns)."""
    leave: str
    """Module whose output holds them when they leave."""
    positions: str | None = None
    """Module whose output, a tuple, holds the tables of positions."""
    first_table: bool = False
    """Is the first table alone that of the cells?"""
    others_behind: bool = False
    """Do references enter with the cells, behind them?"""
    residuals: tuple[str, ...] = ()
    """Arguments of the model's forward with lists of tensors (b, tokens, c) that are added in the blocks."""
    refuses: Callable[[Arguments], str | None] = nothing_refused
    """What in a call tells one token from another beside all that; None: nothing."""


@dataclass(frozen=True)
class Family:
    """One row."""

    name: str
    models: tuple[str, ...]
    """Class names of the models, subclasses included."""
    layers: tuple[Layers, ...]
    timestep: str | None = "timestep"
    """Argument of the model's forward that carries the timestep; None: the model is not told."""
    rope: str | None = None
    """Dotted name of a rotary embedding whose `theta` is read at every forward."""
    tokens: TokenPath | None = None
    """Where its tokens may be put in another order; None: nowhere known."""
    latent: str | None = None
    """Argument of the model's forward that holds the latent image (..., height, width), where levels differ."""


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The arguments of one forward by name; also where a hook has replaced `module.forward`."""
    bound = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def transformer(pattern: str, read: Read, **more: Any) -> tuple[Layers, ...]:
    return (Layers(pattern, "spatial", read, **more),)


def find_layers(family: Family, names: Iterable[str]) -> dict[str, Layers]:
    """Dotted names of the attention layers that the family's row describes; the first matching entry counts."""
    found = {}
    for name in names:
        for layers in family.layers:
            if re.fullmatch(layers.name, name):
                found[name] = layers
                break
    return found


def owner_of(layers: Layers, name: str) -> str:
    """Dotted name of the module whose forward tells the grid of layer `name`; "" is the model itself."""
    if layers.owner is None:
        return ""
    match = re.fullmatch(layers.owner, name)
    assert match is not None
    return match[1]
