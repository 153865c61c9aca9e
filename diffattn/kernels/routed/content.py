"""An order of the keys by content: a balanced k-d tree on the keys of each head.

Each level parts every segment in two at the median along its longest axis, by one step of power iteration; segments
hold whole tiles, and within a tile whole blocks, so that tiles and blocks are equal in size. Time O(n d log(tiles)).

Source: Bentley, Multidimensional binary search trees used for associative searching, 1975; here along principal axes.
"""

import torch
from torch import Tensor


@torch.no_grad()
def content_order(keys: Tensor, tile: int, block: int) -> Tensor:
    """Number of the cell in each slot, `(g, tiles * tile)`, -1 for padding, for keys `(g, cells, d)`.

    The padding lies at the end of the last tile.
    """
    g, cells, _ = keys.shape
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    order = torch.arange(cells, device=keys.device).expand(g, -1)
    for sizes in levels(cells, tile, block):
        order = order.gather(1, _sorted(keys.gather(1, order[..., None].expand_as(keys)), sizes))
    missing = -cells % tile
    return torch.nn.functional.pad(order, (0, missing), value=-1)


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


def _sorted(keys: Tensor, sizes: list[int]) -> Tensor:
    """Where the cells of each segment go when it is sorted along its longest axis: `(g, cells)` indices."""
    lengths = torch.tensor(sizes, device=keys.device)
    number = torch.repeat_interleave(torch.arange(len(sizes), device=keys.device), lengths)
    centred = keys - _sums(keys, number, len(sizes))[:, number] / lengths[number][:, None]
    start = centred.square()
    axis = _sums(start, number, len(sizes))  # squares weigh the axes that spread most
    for _ in range(2):
        along = (centred * axis[:, number]).sum(-1, keepdim=True)
        axis = _sums(along * centred, number, len(sizes))
        axis = axis / axis.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(axis.dtype).tiny)
    along = (centred * axis[:, number]).sum(-1)
    by_value = along.argsort(dim=1, stable=True)
    by_segment = number[by_value].argsort(dim=1, stable=True)
    return by_value.gather(1, by_segment)


def _sums(x: Tensor, number: Tensor, count: int) -> Tensor:
    """Sums over segments, `(g, segments, d)`."""
    return x.new_zeros(x.shape[0], count, x.shape[2]).index_add_(1, number, x)
