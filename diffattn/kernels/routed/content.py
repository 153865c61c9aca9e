"""An order of the keys by content: a balanced k-d tree on the keys of each head, as the queries tell them apart.

    |k - k'|^2 = mean over the queries of (q . (k - k'))^2

Each level parts every segment in two at the median along its longest axis, found by power iteration. Segments hold
whole tiles, and within a tile whole blocks, so that tiles and blocks are equal in size. Time O(n d (d + log tiles)).

Source: Bentley, Multidimensional binary search trees used for associative searching, 1975; here along principal axes.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

ITERATIONS = 4
"""Of the power iteration, from the first cell of a segment."""
RIDGE = 1e-4
"""Share of the mean variance that is added to that of every direction of the queries."""


@torch.no_grad()
def content_order(keys: Tensor, queries: Tensor, tile: int, block: int) -> Tensor:
    """Number of the cell in each slot, `(g, tiles * tile)`, -1 for padding, for keys and queries `(g, cells, d)`.

    The padding lies at the end of the last tile.
    """
    g, cells, _ = keys.shape
    keys = as_queries_see(keys, queries)
    order = torch.arange(cells, device=keys.device).expand(g, -1)
    for sizes in levels(cells, tile, block):
        order = order.gather(1, sorted_within(keys.gather(1, order[..., None].expand_as(keys)), sizes))
    missing = -cells % tile
    return torch.nn.functional.pad(order, (0, missing), value=-1)


def as_queries_see(keys: Tensor, queries: Tensor) -> Tensor:
    """Keys times a root of the queries' second moment, so that distances are those of the logits."""
    number = torch.promote_types(keys.dtype, torch.float32)
    keys, queries = keys.to(number), queries.to(number)
    moment = queries.mT @ queries / queries.shape[1]
    ridge = RIDGE * moment.diagonal(dim1=-2, dim2=-1).mean(-1) + torch.finfo(number).tiny
    root = torch.linalg.cholesky(moment + ridge[:, None, None] * torch.eye(keys.shape[-1], device=keys.device))
    return keys @ root


def levels(cells: int, tile: int, block: int) -> list[list[int]]:
    """Sizes of the segments that each level sorts: whole tiles first, then blocks within them."""
    found: list[list[int]] = []
    segments = [cells]
    while True:
        parted: list[int] = []
        for size in segments:
            unit = tile if size > tile else block
            count = -(-size // unit)
            first = (count + 1) // 2 * unit
            parted += [size] if count <= 1 else [first, size - first]
        if parted == segments:
            return found
        found.append(segments)
        segments = parted


def sorted_within(keys: Tensor, sizes: list[int], along: Callable[[Tensor, int], Tensor] | None = None) -> Tensor:
    """Where the cells of each segment go when it is sorted along an axis: `(g, cells)` indices.

    Segments of one size, most of them, are sorted together.

    Args:
        along: coordinates `(g, segments, cells)` of `(g, segments, cells, d)` cells, the first of which is at this
            place of all; None: along the longest axis of each segment.
    """
    parts, start = [], 0
    for size, run in itertools.groupby(sizes):
        count = len(list(run))
        cells = keys[:, start : start + count * size].unflatten(1, (count, size))
        coordinates = along_longest_axis(cells) if along is None else along(cells, start)
        order = coordinates.argsort(dim=-1, stable=True)
        order += start + torch.arange(count, device=keys.device)[:, None] * size
        parts.append(order.flatten(1))
        start += count * size
    return torch.cat(parts, dim=1)


def along_longest_axis(cells: Tensor) -> Tensor:
    """Coordinates of `(g, segments, cells, d)` along the principal axis of each segment, by power iteration."""
    centred = cells - cells.mean(2, keepdim=True)
    axis = centred[:, :, :1].mT + 1e-3
    for _ in range(ITERATIONS):
        axis = centred.mT @ (centred @ axis)
        axis = axis / axis.norm(dim=2, keepdim=True).clamp(min=torch.finfo(axis.dtype).tiny)
    return (centred @ axis).squeeze(-1)
