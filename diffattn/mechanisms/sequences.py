"""A mechanism on sequences that are not one grid whose tokens all ask: fewer queries than keys, and several grids.

The cells of a grid are the mechanism's. Everything else of the sequence is other tokens to it, the cells of further
grids too: so grids see each other exactly, and pairs are saved within each. A mechanism that chooses by content may
take grids of one size for the frames of one (`Mechanism.joins_grids`).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..grid import TokenGrid
from .base import Context, Mechanism, mask_as
from .softmax import SoftmaxAttention, softmax_reference


def attend_sequence(
    mechanism: Mechanism,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grids: Sequence[TokenGrid],
    *,
    scale: float | None = None,
    backend: str = "auto",
    context: Context = Context(),
) -> Tensor:
    """Output `(b, h, queries, c)` for `q` `(b, h, queries, d)` and keys and values of all tokens.

    Args:
        grids: one, whose `silent` tokens have no queries; or several of one sequence, in which all tokens ask.
    """
    first, *others = grids = joined(mechanism, grids)
    if others:
        return _several(mechanism, q, k, v, grids, scale, backend, context)
    if first.queries == first.tokens:
        return mechanism.attend(q, k, v, first, scale=scale, backend=backend, context=context)
    out = mechanism.attend(
        padded(q, first), k, v, first, scale=scale, backend=backend, context=_padded_context(context, first)
    )
    return out[:, :, first.query_slice]


def reference_sequence(
    mechanism: Mechanism,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grids: Sequence[TokenGrid],
    *,
    scale: float | None = None,
    context: Context = Context(),
) -> Tensor:
    """The same by `Mechanism.reference`: every query of a full sequence, of which those that ask are kept."""
    grids = joined(mechanism, grids)
    if len(grids) == 1:
        own = _padded_context(context, grids[0])
        out = mechanism.reference(padded(q, grids[0]), k, v, grids[0], scale=scale, context=own)
        return out[:, :, grids[0].query_slice]
    out = softmax_reference(q, k, v, scale=scale, mask=context.mask)
    for grid in grids:
        part = mechanism.reference(q, k, v, _alone(grid), scale=scale, context=context)
        out[:, :, grid.cell_slice] = part[:, :, grid.cell_slice]
    return out


def flops_of_sequence(
    mechanism: Mechanism, grids: Sequence[TokenGrid], heads: int, head_dim: int, context: Context
) -> int:
    """Floating-point operations for one sample."""
    grids = joined(mechanism, grids)
    if len(grids) == 1:
        return mechanism.flops(grids[0], heads, head_dim, context=context)
    if isinstance(mechanism, SoftmaxAttention):
        return 4 * grids[0].tokens ** 2 * heads * head_dim
    own = sum(mechanism.flops(_alone(grid), heads, head_dim, context=context) for grid in grids)
    rest = grids[0].tokens - sum(grid.cells for grid in grids)
    return own + 4 * rest * grids[0].tokens * heads * head_dim


def joined(mechanism: Mechanism, grids: Sequence[TokenGrid]) -> Sequence[TokenGrid]:
    """One grid in place of several of one size that follow each other, where the mechanism joins them."""
    first = min(grids, key=lambda grid: grid.before)
    starts = sorted(grid.before for grid in grids)
    even = starts == [first.before + i * first.cells for i in range(len(grids))]
    if not mechanism.joins_grids or not even or {grid.shape for grid in grids} != {first.shape}:
        return grids
    frames = first.frames * len(grids)
    return [replace(first, frames=frames, after=first.after - (len(grids) - 1) * first.cells)]


def padded(q: Tensor, grid: TokenGrid) -> Tensor:
    """Queries `(b, h, queries, d)` with zeros in the places of the tokens that do not ask: `(b, h, tokens, d)`."""
    return F.pad(q, (0, 0, *grid.silent))


def _padded_context(context: Context, grid: TokenGrid) -> Context:
    """A mask of every query, and features of the queries alone, for the padded queries."""
    mask, features = context.mask, context.features
    if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
        mask = F.pad(mask, (0, 0, *grid.silent), value=mask.dtype == torch.bool)
    if features is not None and features.shape[1] == grid.queries != grid.cells:
        features = F.pad(features, (0, 0, *grid.silent))
    elif features is not None and grid.cells < features.shape[1] < grid.tokens and not grid.before * grid.after:
        # a stream of its own, of the cells and the other tokens on their side, but for the text
        features = features[:, : grid.cells] if grid.after else features[:, -grid.cells :]
    return replace(context, mask=mask, features=features)


def _of_cells(features: Tensor | None, grid: TokenGrid, grids: Sequence[TokenGrid]) -> Tensor | None:
    """Features of one grid's cells, from those of all tokens, or of all but the text on one side."""
    if features is None or features.shape[1] == grid.tokens:
        return features
    text = min(own.before for own in grids)
    start = grid.before - text if features.shape[1] == grid.tokens - text else grid.before
    return features[:, start : start + grid.cells]


def _alone(grid: TokenGrid) -> TokenGrid:
    """The same where the cells alone ask."""
    return replace(grid, silent=(grid.before, grid.after))


def _several(
    mechanism: Mechanism,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grids: Sequence[TokenGrid],
    scale: float | None,
    backend: str,
    context: Context,
) -> Tensor:
    """Grid by grid, then the tokens on none by softmax."""
    out = v.new_empty(*q.shape[:3], v.shape[3])
    off_grid = torch.ones(q.shape[2], dtype=torch.bool, device=q.device)
    for number, grid in enumerate(grids):
        kept = None if context.memory is None else context.memory.setdefault(f"grid {number}", {})
        features, hidden = (_of_cells(x, grid, grids) for x in (context.features, context.hidden))
        own = replace(context, memory=kept, features=features, hidden=hidden)
        part = mechanism.attend(q, k, v, _alone(grid), scale=scale, backend=backend, context=own)
        out[:, :, grid.cell_slice] = part[:, :, grid.cell_slice]
        off_grid[grid.cell_slice] = False
    rest = torch.nonzero(off_grid)[:, 0]
    if len(rest):
        mask = mask_as(context.mask, q)
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., rest, :]
        out[:, :, rest] = F.scaled_dot_product_attention(
            q[:, :, rest], k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out
