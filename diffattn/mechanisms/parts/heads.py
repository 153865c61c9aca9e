"""Heads of several kinds: each kind has a mechanism of its own, and all of them the cost of their parts."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffattn.grid import TokenGrid

from ..base import Context, Mechanism, Seen


@dataclass(frozen=True, kw_only=True)
class ByHead(Mechanism):
    """Base: a subclass says its `parts`, and by `period` which head has which."""

    def parts(self, context: Context) -> tuple[Mechanism, ...]:
        """The mechanisms of a layer."""
        raise NotImplementedError

    @property
    def period(self) -> tuple[int, ...]:
        """The number of the part that each head has; heads beyond begin again."""
        return tuple(range(len(self.parts(Context()))))

    @property
    def every_part(self) -> tuple[Mechanism, ...]:
        """The parts of all layers."""
        return self.parts(Context())

    @property
    def approximates(self) -> bool:
        return all(part.approximates or part.exact for part in self.every_part)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset[str]().union(*(part.needs for part in self.every_part))

    @property
    def backends(self) -> tuple[str, ...]:
        """Those that all parts have."""
        first, *others = (part.backends for part in self.every_part)
        return tuple(name for name in first if all(name in other for other in others))

    def numbers(self, heads: int, context: Context) -> list[list[int]]:
        """The heads of each part, of `heads` from `context.first_head` on."""
        period = self.period
        kinds = [period[(context.first_head + head) % len(period)] for head in range(heads)]
        return [[head for head, kind in enumerate(kinds) if kind == number] for number in range(max(period) + 1)]

    def groups(self, heads: int, context: Context) -> Iterator[tuple[Mechanism, list[int], Context]]:
        """The parts that have heads, with these and what each is told."""
        period = self.period
        for number, (part, own) in enumerate(zip(self.parts(context), self.numbers(heads, context), strict=True)):
            if own:
                whole, rest = divmod(context.first_head, len(period))
                before = whole * period.count(number) + period[:rest].count(number)
                memory = None if context.memory is None else context.memory.setdefault(f"part {number}", {})
                weights = None if context.weights is None else _of(context.weights, number)
                mask = _heads_of(context.mask, own)
                yield part, own, replace(context, memory=memory, weights=weights, mask=mask, first_head=before)

    def check(self, grid: TokenGrid, *, context: Context = Context()) -> None:
        for part in self.every_part:
            part.check(grid, context=context)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        backend: str = "auto",
        context: Context = Context(),
    ) -> Tensor:
        self.check_backend(backend)
        self.check(grid, context=context)
        grid.check(q, k)
        outputs, order = [], []
        for part, own, told in self.groups(q.shape[1], context):
            asking, keys, values = (_pick(x, own) for x in (q, k, v))
            outputs.append(part.attend(asking, keys, values, grid, scale=scale, backend=backend, context=told))
            order += own
        if len(outputs) == 1:
            return outputs[0]
        return torch.cat(outputs, dim=1).index_select(1, torch.tensor(order, device=q.device).argsort())

    def explain_backend(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, backend: str, context: Context) -> str:
        lines = []
        for part, own, told in self.groups(q.shape[1], replace(context, memory=None)):
            asking, keys, values = (_pick(x, own) for x in (q, k, v))
            lines.append(part.explain_backend(asking, keys, values, grid, backend, told))
        return "; ".join(dict.fromkeys(lines))

    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        context: Context = Context(),
    ) -> Tensor:
        self.check(grid, context=context)
        out = v.new_zeros(*q.shape[:3], v.shape[3])
        for part, own, told in self.groups(q.shape[1], context):
            place = torch.tensor(own, device=q.device)
            asking, keys, values = (x[:, place] for x in (q, k, v))
            found = part.reference(asking, keys, values, grid, scale=scale, context=told)
            out = out.index_copy(1, place, found)
        return out

    def head_masks(self, grid: TokenGrid) -> tuple[tuple[str, Tensor], ...]:
        self.check(grid)
        kinds = []
        for number, part in enumerate(self.every_part):
            words = f"kind {number + 1} of {len(self.every_part)} of heads"
            kinds += [(f"{words} {more}".strip(), mask) for more, mask in part.head_masks(grid)]
        return tuple(kinds)

    def seen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        context: Context = Context(),
    ) -> Seen:
        found: dict[int, Seen] = {}
        for part, own, told in self.groups(q.shape[1], replace(context, memory=None)):
            asking, keys, values = (_pick(x, own) for x in (q, k, v))
            seen = part.seen(asking, keys, values, grid, scale=scale, context=told)
            for place, head in enumerate(own):
                found[head] = Seen(*(x[:, min(place, x.shape[1] - 1)] for x in seen))
        heads = [found[head] for head in range(q.shape[1])]
        most = max(seen.blocks.shape[1] for seen in heads)
        keys = _stacked([seen.keys for seen in heads])
        means = _stacked([F.pad(seen.means, (0, most - seen.means.shape[-1])) for seen in heads])
        blocks = _stacked([F.pad(seen.blocks, (0, 0, 0, most - seen.blocks.shape[1])) for seen in heads])
        return Seen(keys, means, blocks)

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, *, context: Context = Context()) -> int:
        self.check(grid, context=context)
        told = replace(context, memory=None, mask=None)
        parts = self.groups(heads, told)
        return sum(part.flops(grid, len(own), head_dim, context=own_told) for part, own, own_told in parts)

    def weights(self, heads: int, head_dim: int) -> nn.Module | None:
        made: dict[str, nn.Module] = {}
        for number, (part, own) in enumerate(zip(self.parts(Context()), self.numbers(heads, Context()), strict=True)):
            own_weights = part.weights(len(own), head_dim) if own else None
            if own_weights is not None:
                made[f"part_{number}"] = own_weights
        return nn.ModuleDict(made) if made else None


def _of(weights: Any, number: int) -> nn.Module | None:
    name = f"part_{number}"
    found: nn.Module | None = weights[name] if name in weights.keys() else None  # noqa: SIM118
    return found


def _pick(x: Tensor, heads: list[int]) -> Tensor:
    """Some of the heads; a view where they are evenly apart."""
    if len(heads) == x.shape[1]:
        return x
    steps = {after - before for before, after in itertools.pairwise(heads)} or {1}
    if len(steps) == 1:
        return x[:, heads[0] : heads[-1] + 1 : steps.pop()]
    return x[:, torch.tensor(heads, device=x.device)]


def _heads_of(mask: Tensor | None, heads: list[int]) -> Tensor | None:
    """A model's mask, of some of the heads where it has one for each."""
    if mask is None or mask.dim() < 3 or mask.shape[-3] == 1:
        return mask
    return mask.index_select(-3, torch.tensor(heads, device=mask.device))


def _stacked(heads: list[Tensor]) -> Tensor:
    """`(b|1, ...)` of each head as `(b|1, h, ...)`."""
    shape = torch.broadcast_shapes(*(x.shape[:1] for x in heads))
    return torch.stack([x.expand(*shape, *x.shape[1:]) for x in heads], dim=1)
