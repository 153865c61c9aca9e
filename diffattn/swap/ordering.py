"""Tokens in tile order for a whole forward: put in order where they enter the blocks, put back where they leave.

A window's kernel wants the cells tile by tile (`diffattn.kernels.order`). Everything else between a transformer's
entrance and its exit treats tokens alike, so that one order, with the positions in the same, serves all layers:

    enter(x)[:, perm] -> blocks -> leave(y)[:, perm^-1]        positions[perm], residuals[:, perm]

Where that can't be, every layer orders its own tokens, and `diffattn.summary` says why. In a graph of torch.compile the
hooks do nothing.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..families import Arguments, Family, TokenPath, arguments
from ..grid import TokenGrid
from ..kernels.order import TileOrder
from ..kernels.pattern import cached
from .calls.frames import Call, Reading, Scope, find
from .entrance import may_skip
from .settings.schedule import Schedule

ANY_GRID, ANY_HEAD_DIM = TokenGrid(64, 64), 64
ONCE = "tokens put in tile order once for each call of the model"
IN_LAYERS = "tokens put in tile order in every layer that wants it"


class OrderedCells(NamedTuple):
    """The order of one forward."""

    order: TileOrder
    taken: Tensor
    """Row-major number of the cell in each place of the order."""
    back: Tensor
    """Place of each cell."""
    behind: int
    """Tokens behind the cells among those that enter."""

    def permuted(self, tensor: Tensor, axis: int, first: int, index: Tensor) -> Tensor:
        """The cells along `axis`, from number `first` on, by `index`."""
        cells = tensor.narrow(axis, first, index.numel()).index_select(axis, index)
        if index.numel() == tensor.shape[axis]:
            return cells
        rest = tensor.narrow(axis, first + index.numel(), tensor.shape[axis] - first - index.numel())
        return torch.cat([tensor.narrow(axis, 0, first), cells, rest], dim=axis)

    def entering(self, tokens: Tensor) -> Tensor:
        """`(b, cells and others, c)`, or `(b, c, frames, rows, columns)`, from row-major order."""
        if tokens.dim() == 5:
            return tokens.flatten(2).index_select(2, self.taken).view(tokens.shape)
        return self.permuted(tokens, 1, 0, self.taken)

    def leaving(self, tokens: Tensor) -> Tensor:
        """Undo `entering` for `(b, cells and others, c)`."""
        return self.permuted(tokens, 1, 0, self.back)

    def positions(self, table: Tensor) -> Tensor:
        """`(tokens, ...)` or `(b, tokens, ...)`, where text may come first."""
        axis = 0 if table.shape[0] >= self.taken.numel() + self.behind else 1
        return self.permuted(table, axis, table.shape[axis] - self.behind - self.taken.numel(), self.taken)


class OrderedLayer(Protocol):
    """What is asked of a `SwappedLayer`."""

    schedule: Schedule
    backend: str

    @property
    def module(self) -> nn.Module:
        """The attention module."""
        ...


class Ordering:
    """The hooks that order the tokens of one model, and why they did not in its last call."""

    def __init__(self, path: TokenPath, root: Scope, model: nn.Module, layers: Iterable[OrderedLayer]) -> None:
        self.told = ""
        """How the last call ordered its tokens, and why, for `summary`; empty before the first."""
        self._path, self._root, self._layers = path, root, tuple(layers)
        self._refused: str | None = None
        modules = [model.get_submodule(name) for name in (path.enter, path.leave)]
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            modules[0].register_forward_hook(self._enter),
            modules[1].register_forward_hook(self._leave),
        ]
        if path.positions is not None:
            self._handles.append(model.get_submodule(path.positions).register_forward_hook(self._place))

    @classmethod
    def of(cls, family: Family, root: Scope, model: nn.Module, layers: Iterable[OrderedLayer]) -> "Ordering | None":
        """For windows in a model whose row says where its tokens go in and out; None for all else."""
        several, path = list(layers), family.tokens
        if path is None or type(model).__name__ not in path.models or not wants_order(several):
            return None
        return cls(path, root, model, several)

    def refuse(self, reason: str) -> None:
        """Leave the order to the layers in every call."""
        self._refused = reason

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Decide for the forward that begins, and order the residuals that a ControlNet adds in it."""
        if torch.compiler.is_compiling():
            return None
        frame = find(self._root)
        if frame is None:
            return None
        given = arguments(model, args, kwargs)
        readings = [reading for reading in frame.readings.values() if reading is not None]
        try:
            found = self._decide(model, frame.call, given, readings)
        except (ValueError, NotImplementedError) as error:
            found = str(error)
        if isinstance(found, str):
            self.told = f"{IN_LAYERS}: {found}"
            return None
        self.told, frame.call.ordered = ONCE, found
        names = [name for name in self._path.residuals if kwargs.get(name) is not None]
        return (args, kwargs | {name: [found.entering(x) for x in kwargs[name]] for name in names}) if names else None

    def _decide(self, model: nn.Module, call: Call, given: Arguments, readings: list[Reading]) -> OrderedCells | str:
        """The order of a forward, or why each layer orders its own tokens."""
        if torch.is_grad_enabled():
            return "gradients are computed"
        kept = "a cache of diffusers keeps tokens" if may_skip(model) else None
        refused = self._refused or kept or self._path.refuses(given)
        if refused is not None or call.dense:
            return refused or "the model's own attention computes this step"
        layouts = [layout for reading in readings for layout in reading.layouts]
        places = {(place.frames, place.height, place.width, place.after) for place in layouts}
        shapes = {place[:3] for place in places}
        if any(layout.also for layout in layouts):
            return "the sequence holds several grids"
        if len(shapes) != 1:
            return "the samples of a call have other grids, or none was read"
        ((frames, height, width),) = shapes
        like = given["hidden_states"]  # parameters may be quantized, and elsewhere for now
        grid = TokenGrid(height, width, frames)
        if any(getattr(layer.module.processor, "_parallel_config", None) is not None for layer in self._layers):
            return "the tokens are split among ranks"
        q = like.new_empty(()).expand(1, 1, grid.tokens, ANY_HEAD_DIM)
        progress = None if call.moment is None else call.moment.progress
        parts = [(layer.schedule.at(progress), layer.backend) for layer in self._layers]
        kinds = {(part.mechanism, backend) for part, backend in parts if not part.own}
        if not kinds:
            return "the model's own attention computes this step"
        orders = {mechanism.cell_order(q, grid, backend) for mechanism, backend in kinds}
        order = orders.pop()
        if orders or order is None:
            return "a layer has another order, or a kernel that needs none"
        if order.ragged:
            return f"tiles of {order.tile} don't divide the grid"
        behind = max(place[3] or 0 for place in places) if self._path.others_behind else 0
        return OrderedCells(order, *numbers(order, like.device), behind)

    def _running(self) -> Call | None:
        """The forward under way, where its tokens are to be ordered."""
        if torch.compiler.is_compiling():
            return None
        frame = find(self._root)
        return None if frame is None or frame.call.ordered is None else frame.call

    def _enter(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        call = self._running()
        return None if call is None else call.ordered.entering(output)

    def _leave(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        call = self._running()
        return None if call is None else call.ordered.leaving(output)

    def _place(self, module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> Any:
        """The first tables of a forward are those of the cells; further ones are those of a text alone."""
        call = self._running()
        if call is None or call.placed:
            return None
        call.placed = True
        cells = call.ordered
        if self._path.first_table:
            return (cells.positions(output[0]), *output[1:])
        return tuple(cells.positions(table) for table in output)


def wants_order(layers: Iterable[OrderedLayer]) -> bool:
    """Are all mechanisms windows?"""
    found = {mechanism for layer in layers for mechanism in layer.schedule.mechanisms}
    return bool(found) and all(mechanism.pattern(ANY_GRID) is not None for mechanism in found)


@cached(16)
def numbers(order: TileOrder, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row-major number of the cell in each place of an order, and place of each cell."""
    cells = torch.arange(math.prod(order.shape))
    taken = order.to_tiles(cells[None, None, :, None]).flatten()
    return taken.to(device), taken.argsort().to(device)
