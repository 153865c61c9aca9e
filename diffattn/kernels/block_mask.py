"""FlexAttention's BlockMask of a window pattern, from geometry: never queries x keys.

In tile order a block is a tile, and the blocks a tile may touch are the box of tiles its span reaches. Each pair in
that box is looked at once: full where all its cells see each other, partial where some do. Of a rule on tiles one cell
speaks for all of its tile; where the blocks are those tiles, only the ones with padding are partial. Keys that every
cell sees follow the cells as full blocks of their own.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from ..grid import TokenGrid
from .order import TileOrder
from .pattern import CHUNK, Cells, Pattern, Shape, cached, moves_by, tile_of

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""FlexAttention's `mask_mod`: batch, head, query and key index to whether the key is seen."""


def mask_rule(pattern: Pattern, order: TileOrder, extra: int) -> Rule:
    """FlexAttention's `mask_mod`: the pattern on positions in tile order; padding is never seen, extra keys always."""
    frames, rows, columns = order.shape

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        cell = order.coordinates(key)
        allowed = pattern.allowed(order.coordinates(query), cell)
        if order.ragged:
            allowed = allowed & (cell.frame < frames) & (cell.row < rows) & (cell.column < columns)
        return allowed | (key >= order.cells) if extra else allowed

    return rule


def tile_block_mask(
    pattern: Pattern, order: TileOrder, extra: int = 0, device: torch.device | str = "cpu"
) -> BlockMask:
    """The BlockMask of cell queries in tile order against cells in tile order and `extra` further keys.

    Time O(pairs in touched blocks), or O(tiles x reach) for a shift-invariant pattern; memory O(tiles x reach).
    """
    keys, seen, full = touched_blocks(pattern, order)
    further = torch.arange(order.tiles, order.tiles + -(-extra // order.block), dtype=torch.int32)
    keys = torch.cat([keys, further.expand(order.tiles, -1)], dim=1)
    partial = F.pad(seen & ~full, (0, further.numel()), value=False)
    full = F.pad(full, (0, further.numel()), value=True)
    lengths = order.cells, order.cells + extra
    return _block_mask(keys, partial, full, order.block, mask_rule(pattern, order, extra), lengths, device)


def _block_mask(
    keys: Tensor,
    partial: Tensor,
    full: Tensor,
    block: int,
    rule: Rule,
    lengths: tuple[int, int],
    device: torch.device | str,
) -> BlockMask:
    """The BlockMask of candidate `keys` `(query blocks, candidates)`, of which some are `partial` and some `full`."""
    blocks = -(-lengths[1] // block)
    some, some_keys = _block_list(keys, partial, blocks)
    whole, whole_keys = _block_list(keys, full, blocks)
    return BlockMask.from_kv_blocks(
        some.to(device),
        some_keys.to(device),
        whole.to(device),
        whole_keys.to(device),
        BLOCK_SIZE=(block, block),
        mask_mod=rule,
        seq_lengths=lengths,
        compute_q_blocks=torch.device(device).type != "cpu",
    )


def _block_list(keys: Tensor, flags: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """FlexAttention's (count, indices) of the flagged blocks of each row.

    The indices are as wide as there are blocks, which the CPU kernel demands; what is not written is never touched.
    """
    place = torch.argsort(~flags, dim=1, stable=True)
    indices = torch.zeros(1, 1, keys.shape[0], blocks, dtype=torch.int32)
    indices[0, 0, :, : keys.shape[1]] = keys.gather(1, place)
    return flags.sum(1, dtype=torch.int32)[None, None], indices


def touched_blocks(pattern: Pattern, order: TileOrder) -> tuple[Tensor, Tensor, Tensor]:
    """For every tile its candidates `(tiles, candidates)`: their index, whether any cell is seen, whether all are."""
    starts, widths = [], []
    for axis, (size, step, count) in enumerate(zip(order.shape, order.tile, order.counts, strict=True)):
        spans = [pattern.span(axis, low, min(low + step, size), size) for low in range(0, size, step)]
        ranges = [(low // step, -(-high // step)) for low, high in spans]
        width = max(high - low for low, high in ranges)
        widths.append(width)
        starts.append(torch.tensor([min(low, count - width) for low, _ in ranges], dtype=torch.int32))
    tile = torch.arange(order.tiles, dtype=torch.int32)
    _, rows, columns = order.counts
    mine = [tile // (rows * columns), tile // columns % rows, tile % columns]
    near = [start[own][:, None] + torch.arange(width) for start, own, width in zip(starts, mine, widths, strict=True)]
    frame, row, column = _spread(near)
    index = ((frame * rows + row) * columns + column).flatten(1)
    whole = _spread([(n + 1) * side <= size for n, side, size in zip(near, order.tile, order.shape, strict=True)])
    if moves_by(pattern, order.tile):
        seen, full = _judge_by_offset(pattern, order, mine, near)
    else:
        step = max(1, CHUNK // (index.shape[1] * order.block**2))
        cuts = range(0, order.tiles, step)
        parts = [_judge(pattern, order, [m[i : i + step] for m in mine], [n[i : i + step] for n in near]) for i in cuts]
        seen, full = (torch.cat(part) for part in zip(*parts, strict=True))
    return index, seen, full & (whole[0] & whole[1] & whole[2]).flatten(1)


def _spread(axes: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Three `(tiles, width)` as views that broadcast to `(tiles, frames, rows, columns)`."""
    return axes[0][:, :, None, None], axes[1][:, None, :, None], axes[2][:, None, None, :]


def _judge_by_offset(
    pattern: Pattern, order: TileOrder, mine: list[Tensor], near: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """`_judge` for a rule that moves with the tiles: from one tile and all the offsets there are."""
    offsets = [theirs - own[:, None] for own, theirs in zip(mine, near, strict=True)]
    lows = [int(offset.min()) for offset in offsets]
    around = [torch.arange(low, int(offset.max()) + 1)[None] for low, offset in zip(lows, offsets, strict=True)]
    endless = TileOrder((2**30, 2**30, 2**30), order.tile)
    tables = _judge(pattern, endless, [torch.zeros(1, dtype=torch.int32)] * 3, around)
    sizes = [axis.shape[1] for axis in around]
    place = _spread([offset - low for offset, low in zip(offsets, lows, strict=True)])
    seen, full = (table.view(sizes)[place].flatten(1) for table in tables)
    return seen, full


def _judge(pattern: Pattern, order: TileOrder, mine: list[Tensor], near: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Any seen, all seen, each `(tiles, candidates)`, for tiles at `mine` and candidates at `near`."""
    query, key, valid = [], [], []
    for axis, (side, size, step) in enumerate(zip(order.tile, order.shape, _speakers(pattern, order), strict=True)):
        local = torch.arange(0, side, step, dtype=torch.int32)
        own = mine[axis].to(torch.int32)[:, None] * side + local  # tiles, side
        theirs = near[axis].to(torch.int32)[:, :, None] * side + local  # tiles, width, side
        places = [own.shape[0]] + [1] * 9
        places[4 + axis] = local.numel()
        query.append(own.clamp(max=size - 1).view(places))  # a padded query counts as its neighbour
        places = [theirs.shape[0]] + [1] * 9
        places[1 + axis], places[7 + axis] = theirs.shape[1], local.numel()
        key.append(theirs.view(places))
        valid.append((theirs < size).view(places))
    allowed = pattern.allowed(Cells(*query), Cells(*key))
    if order.ragged:
        allowed = allowed & valid[0] & valid[1] & valid[2]
    allowed = allowed.expand(torch.broadcast_shapes(*(part.shape for part in (*query, *key))))
    allowed = allowed.flatten(4).flatten(1, 3)
    return allowed.any(-1), allowed.all(-1)


def _speakers(pattern: Pattern, order: TileOrder) -> Shape:
    """Every how many cells, per axis, one has to be asked: cells of one tile of the pattern answer alike."""
    tile = tile_of(pattern)
    if tile is None:
        return 1, 1, 1
    pairs = zip(tile, order.tile, strict=True)
    frames, rows, columns = (min(pair) if max(pair) % min(pair) == 0 else 1 for pair in pairs)
    return frames, rows, columns


@cached(16)
def row_major_block_mask(
    pattern: Pattern, grid: TokenGrid, device: torch.device | str = "cpu", block: int = 128
) -> BlockMask:
    """The BlockMask in the order the model has, as CLEAR's released code keeps it: the yardstick of `diffattn bench`.

    Its rule divides positions by the width, as theirs does. Time O(tokens^2).
    """
    before, cells, rows, columns = grid.before, grid.cells, grid.height, grid.width

    def place(index: Tensor) -> Cells:
        index = index - before
        return Cells(index // (rows * columns), index // columns % rows, index % columns)

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = pattern.allowed(place(query), place(key))
        if grid.others:
            allowed = allowed | (query < before) | (query >= before + cells) | (key < before) | (key >= before + cells)
        return allowed

    blocks = -(-grid.tokens // block)
    key = torch.arange(grid.tokens)
    seen, full = torch.zeros(blocks, blocks, dtype=torch.bool), torch.zeros(blocks, blocks, dtype=torch.bool)
    for number in range(blocks):
        query = torch.arange(number * block, min((number + 1) * block, grid.tokens))[:, None]
        allowed = rule(key, key, query, key)
        missing = blocks * block - grid.tokens
        seen[number] = F.pad(allowed, (0, missing)).unflatten(1, (-1, block)).any(2).any(0)
        full[number] = F.pad(allowed, (0, missing), value=True).unflatten(1, (-1, block)).all(2).all(0)
    keys = torch.arange(blocks, dtype=torch.int32).expand(blocks, -1)
    return _block_mask(keys, seen & ~full, full, block, rule, (grid.tokens, grid.tokens), device)
