"""What the mechanisms with a linear branch share: a part, the branch beside it, and the branch's projection.

    out_i = part(q, k, v)_i + P l_i + b for the cells i;    other tokens have what the part gives them

`l` is that of `parts/linear_branch.py`, over all cells or over the tiles that the part leaves out. Over all cells there
is one sum of keys and values for all queries, which P is put on: P (f S) = f (S P), d^2 numbers in place of n d.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...grid import TokenGrid
from ...kernels.routed import RoutedCall
from ..base import Context, Mechanism, Seen
from ..linear import key_mask
from ..parts import linear_branch
from ..parts.exact_tiles import only_densely
from ..parts.linear_branch import branch_reference, features_of, matrices, over_all, over_rest
from ..parts.linear_weights import LinearWeights


class ZeroLinear(nn.Linear):
    """Zero at first, made without random numbers."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class BranchWeights(nn.Module):
    """One layer's weights: a subclass says what it has of these."""

    part: nn.Module | None
    """Those of the part."""
    maps: LinearWeights | None
    """Those of the feature maps."""

    bias: Tensor | None = None
    """What is added to every cell, `(c,)`."""

    def project(self, found: Tensor) -> Tensor:
        """P times `(b, h, n, c)`."""
        raise NotImplementedError

    def shift(self, projected: Tensor) -> Tensor:
        """With the bias, where there is one."""
        return projected if self.bias is None else projected + self.bias.to(projected)


@dataclass(frozen=True, kw_only=True)
class Branched(Mechanism):
    """Base: a subclass says part, feature map and weights."""

    one_mask: ClassVar[bool] = True
    eps: ClassVar[float] = 1e-15
    """Added to the sum that is divided by: a query whose features meet no key's has 0."""

    feature_map: str = "softmax"

    @property
    def part(self) -> Any:
        """The mechanism beside the branch."""
        raise NotImplementedError

    @property
    def takes_rest(self) -> bool:
        """Is the branch over the cells alone that the part does not see exactly?"""
        raise NotImplementedError

    @property
    def needs(self) -> frozenset[str]:
        found: frozenset[str] = self.part.needs
        return found

    @property
    def backends(self) -> tuple[str, ...]:
        """Those of the part; the branch is computed in one way."""
        found: tuple[str, ...] = self.part.backends
        return found

    def explain_backend(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, backend: str, context: Context) -> str:
        told: str = self.part.explain_backend(q, k, v, grid, backend, self._told(context))
        return told

    def check(self, grid: TokenGrid, *, context: Context = Context()) -> None:
        self.part.check(grid, context=context)

    def _weights(self, context: Context) -> BranchWeights | None:
        """The layer's weights, after making sure that the mask is one for all queries; None: there is no branch."""
        key_mask(context.mask)
        if context.weights is not None and not isinstance(context.weights, BranchWeights):
            raise ValueError(
                f"{self.type}: Context.weights must come from mechanism.weights(heads, head_dim), got a "
                f"{type(context.weights).__name__}"
            )
        return context.weights

    def _told(self, context: Context) -> Context:
        """What the part is told."""
        weights = self._weights(context)
        return replace(context, weights=None if weights is None else weights.part)

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
        weights = self._weights(context)
        own = partial(self.part.attend, q, k, v, grid, scale=scale, backend=backend, context=self._told(context))
        number = torch.promote_types(q.dtype, torch.float32)
        if weights is None or (self.takes_rest and self.part.left_tiles(grid) is None):
            out: Tensor = own()
            return out
        if self.takes_rest and (backend == "dense" or only_densely(context.mask) is not None):
            asking, keys, values = (x.to(number) for x in (q, k, v))
            return self.reference(asking, keys, values, grid, scale=scale, context=context).to(q.dtype)
        if self.takes_rest:
            out = own(beside=partial(self._beside, weights=weights, heads=q.shape[1]))
            return out
        out = own()
        with torch.autocast(q.device.type, enabled=False):  # which would take sums in half precision again
            f, g, values, mask = self._branch(q.to(number), k.to(number), v.to(number), grid, weights, context)
            more = weights.shift(over_all(f, g, values, mask, self.eps, weights.project))
            return (out.to(number) + F.pad(more, (0, 0, grid.before, grid.after))).to(q.dtype)

    def _beside(self, call: RoutedCall, chosen: Tensor, *, weights: BranchWeights, heads: int) -> Tensor:
        """The projected branch over the rest, by tiles."""
        found = over_rest(call, chosen, self.feature_map, weights.maps, heads, self.eps)
        return weights.shift(weights.project(found.flatten(1, 2).unflatten(0, (-1, heads)))).reshape(found.shape)

    def _branch(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, weights: BranchWeights, context: Context
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Features of queries and keys, values, and weights of the cells."""
        first, second = matrices(weights.maps)
        asking, keys, values = (x[..., grid.cell_slice, :] for x in (q, k, v))
        f, g = features_of(self.feature_map, asking, first), features_of(self.feature_map, keys, second)
        return f, g, values, linear_branch.weights_of_cells(context.mask, grid, q.dtype)

    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        context: Context = Context(),
        **chosen: Tensor | None,
    ) -> Tensor:
        """The part's, and the branch by all pairs of cells. Memory O(n^2). `chosen` is the part's own."""
        weights, told = self._weights(context), self._told(context)
        out: Tensor = self.part.reference(q, k, v, grid, scale=scale, context=told, **chosen)
        if weights is None or (self.takes_rest and self.part.left_tiles(grid) is None):
            return out
        seen = torch.ones(1, 1, grid.cells, grid.cells, dtype=torch.bool, device=q.device)
        if self.takes_rest:
            keys = self.part.seen(q, k, v, grid, scale=scale, context=told, **chosen).keys.to(q.device)
            seen = ~keys[..., grid.cell_slice, grid.cell_slice]
        f, g, values, mask = self._branch(q, k, v, grid, weights, context)
        more = weights.shift(weights.project(branch_reference(f, g, values, mask, seen, self.eps)))
        return out + F.pad(more, (0, 0, grid.before, grid.after))

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
        """What each query sees by the part."""
        found: Seen = self.part.seen(q, k, v, grid, scale=scale, context=self._told(context))
        return found

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, *, context: Context = Context()) -> int:
        """Of the part; and of the branch, though an untrained call has none."""
        own: int = self.part.flops(grid, heads, head_dim, context=context)
        tiles = self.part.left_tiles(grid) if self.takes_rest else None
        if self.takes_rest and tiles is None:
            return own
        return own + heads * linear_branch.operations(grid.cells, head_dim, self.feature_map, tiles)
