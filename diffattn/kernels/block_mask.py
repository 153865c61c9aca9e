"""The blocks that a window pattern touches, from geometry: never queries x keys.

In tile order a block of keys is a tile, and the blocks a tile may touch are the box of tiles its span reaches. Each
pair in that box is looked at once: full where all its cells see each other, partial where some do. Of a rule on tiles
one cell speaks for all of its tile; where the blocks are those tiles, only the ones with padding are partial. Keys that
every cell sees follow the cells as blocks of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .block_lists import BlockLists, Touched, lists, paired, transposed, with_further
from .order import TileOrder
from .pattern import CHUNK, Cells, Pattern, Shape, moves_by, tile_of

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""FlexAttention's `mask_mod`: batch, head, query and key index to whether the key is seen."""
LISTS = (
    *("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"),
    *("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"),
)
"""FlexAttention's names of the lists by block of queries, and by block of keys."""
FURTHER = 128
"""On CUDA the keys behind the cells are padded to multiples of this."""


class Rule(Protocol):
    """What a kernel asks about pairs in partial blocks. Hashable: one kernel is compiled for each."""

    def mask_mod(self, coordinates: tuple[Tensor, ...]) -> MaskMod:
        """The rule of a call; `coordinates`: those of `key_coordinates`, or none."""
        ...


@dataclass(frozen=True)
class TileRule:
    """The pattern on positions in tile order: padding is never seen, keys behind the cells are by every query."""

    pattern: Pattern
    order: TileOrder
    further: bool
    """Are there keys behind the cells?"""

    def mask_mod(self, coordinates: tuple[Tensor, ...] = ()) -> MaskMod:
        """`coordinates` are looked up; where there are none, they are computed."""
        return self._looked_up(coordinates) if coordinates else self._computed

    def _computed(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        order, cell = self.order, self.order.coordinates(key)
        allowed = self.pattern.allowed(order.coordinates(query), cell)
        if order.ragged:
            frames, rows, columns = order.shape
            allowed = allowed & (cell.frame < frames) & (cell.row < rows) & (cell.column < columns)
        return allowed | (key >= order.cells) if self.further else allowed

    def _looked_up(self, coordinates: tuple[Tensor, ...]) -> MaskMod:
        def cells(index: Tensor) -> Cells:
            *frame, row, column = (table[index] for table in coordinates)
            return Cells(frame[0] if frame else torch.zeros_like(row), row, column)

        def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            cell = cells(key)
            allowed = self.pattern.allowed(cells(query), cell)
            return allowed | (cell.row < 0) if self.further else allowed

        return rule


def key_coordinates(order: TileOrder, further: int, real: int, device: torch.device | str) -> tuple[Tensor, ...]:
    """(Frame,) row and column of every key, float32: cells in tile order, then `further` keys, of which `real` exist.

    Keys that every query sees have -1. Padding has NaN, with which every comparison is false: a rule asks neither after
    the end of the grid nor after that of a text, whose length is data. The frame is left out where there is one.
    """
    frames, rows, columns = order.shape
    cells = order.coordinates(torch.arange(order.cells))
    inside = (cells.frame < frames) & (cells.row < rows) & (cells.column < columns)
    behind = torch.full((further,), -1.0)
    behind[real:] = torch.nan
    frame, row, column = (torch.cat([axis.masked_fill(~inside, torch.nan), behind]).to(device) for axis in cells)
    return (frame, row, column) if frames > 1 else (row, column)


def check_padding(pattern: Pattern) -> None:
    """Raise where a rule does not hide padding."""
    zero = torch.zeros(1)
    nowhere = torch.full_like(zero, torch.nan)
    if pattern.allowed(Cells(zero, zero, zero), Cells(nowhere, nowhere, nowhere)).any():
        raise ValueError(
            f"{pattern} allows a key whose coordinates are NaN, and on CUDA padding has these: write `allowed` by "
            f"comparisons that are true for what may be seen, or choose backend='tiled'"
        )


@dataclass(frozen=True, eq=False)
class Blocks:
    """What the kernel is told of a pattern, beside the tokens: which blocks to compute, and what hides in them."""

    rule: Rule
    lists: BlockLists
    backward: BlockLists | None
    """The same pairs by block of keys; None where no gradients are asked for."""
    size: tuple[int, int]
    """Queries and keys of a block."""
    lengths: tuple[int, int]
    """Queries and keys, padding included."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All lists, in the order of `BlockMask`."""
        return (*self.lists, *(self.backward or ()))

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def mask(self, coordinates: tuple[Tensor, ...] = ()) -> BlockMask:
        """FlexAttention's own class."""
        return block_mask(self.tensors, self.rule.mask_mod(coordinates), self.size, self.lengths)


def block_mask(lists: tuple[Tensor, ...], rule: MaskMod, size: tuple[int, int], lengths: tuple[int, int]) -> BlockMask:
    """A BlockMask of 4 lists, or of 8 with those for the backward pass."""
    given: dict[str, Any] = dict(zip(LISTS, (*lists, *(None,) * (len(LISTS) - len(lists))), strict=True))
    return BlockMask(lengths, **given, BLOCK_SIZE=size, mask_mod=rule)


def tile_blocks(pattern: Pattern, order: TileOrder, extra: int = 0) -> Blocks:
    """Cell queries in tile order against cells in tile order and `extra` further keys, as the CPU kernel wants it.

    Time O(pairs in touched blocks), or O(tiles x reach) for a shift-invariant pattern; memory O(tiles x reach).
    """
    block = order.block
    further = -(-extra // block)
    touched = with_further(touched_blocks(pattern, order), order.tiles, further, 0)
    lengths = order.cells, order.cells + extra
    rule = TileRule(pattern, order, extra > 0)
    return Blocks(rule, lists(touched, order.tiles + further), None, (block, block), lengths)


def cuda_blocks(
    pattern: Pattern, order: TileOrder, extra: int, *, whole: bool, backward: bool, device: torch.device | str
) -> Blocks:
    """The same for CUDA: two tiles of a paired order are one block of queries, and lists are narrow.

    Args:
        extra: further keys, padded to a multiple of `FURTHER`.
        whole: are all of them real? Else the rule is asked about the last `FURTHER`, where the padding is.
        backward: with the lists that gradients need.
    """
    touched = touched_blocks(pattern, order)
    touched = paired(touched) if order.paired else touched
    further = -(-extra // order.block)
    touched = with_further(touched, order.tiles, further, 0 if whole else min(further, -(-FURTHER // order.block)))
    width = int(touched.seen.sum(1).max())  # of both kinds, so that lists of other texts are of the same width
    size = order.block * (2 if order.paired else 1), order.block
    by_key = transposed(touched, order.tiles + further) if backward else None
    return Blocks(
        TileRule(pattern, order, extra > 0),
        lists(touched, width).to(device),
        None if by_key is None else by_key.to(device),
        size,
        (order.cells, order.cells + extra),
    )


def touched_blocks(pattern: Pattern, order: TileOrder) -> Touched:
    """For every tile its candidates: the tiles in the box that its span reaches."""
    starts, widths = [], []
    for axis, (size, step, count) in enumerate(zip(order.shape, order.tile, order.counts, strict=True)):
        spans = [pattern.span(axis, low, min(low + step, size), size) for low in range(0, size, step)]
        spans += spans[-1:] * (count - len(spans))  # a tile of padding counts as its neighbour
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
    real = _spread([n * side < size for n, side, size in zip(near, order.tile, order.shape, strict=True)])
    if moves_by(pattern, order.tile):
        seen, full = _judge_by_offset(pattern, order, mine, near)
    else:
        step = max(1, CHUNK // (index.shape[1] * order.block**2))
        cuts = range(0, order.tiles, step)
        parts = [_judge(pattern, order, [m[i : i + step] for m in mine], [n[i : i + step] for n in near]) for i in cuts]
        seen, full = (torch.cat(part) for part in zip(*parts, strict=True))
    seen = seen & (real[0] & real[1] & real[2]).flatten(1)
    return Touched(index, seen, full & (whole[0] & whole[1] & whole[2]).flatten(1))


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
