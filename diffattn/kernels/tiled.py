"""SDPA on gathered tiles: each tile of queries against its own window of keys. No compiler, any device, a backward.

The grid is cut into tiles. A tile's window is the smallest box that holds all its queries may see, moved inward at the
borders so that all windows have one size and lie within the grid; the rule itself is a boolean mask per tile. Tiles
above each other form a strip: its keys are copied once, its windows are then views, and all strips at one height are
one SDPA call. Keys that every cell sees (text, pooled) are appended to each window. Rules on tiles need neither boxes
nor masks: `blocks.py`.

Time O(n (window + tile) d). Memory beyond inputs and output: `blocks.BUDGET` bytes, or one strip where that is more.
The backward pass computes each tile again, so that only the inputs are kept.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..grid import TokenGrid
from .blocks import block_attention, block_order, default_budget
from .call import WindowCall
from .order import tile_shape
from .pattern import Cells, Pattern, cached, moves_by

TILE_CELLS, VIDEO_TILE_CELLS = 128, 256
"""Queries in a tile, of an image and of a video: fastest of 64, 128 and 256, or within a tenth of it, on 2 cores with
AVX2 (4 heads x 64, float32; 128 x 128 and 16 x 32 x 32 tokens)."""


class Strips(NamedTuple):
    """Neighbouring tiles along the columns, `first ... last-1`, all of `width` columns."""

    first: int
    last: int
    width: int


@dataclass(frozen=True)
class Windows:
    """How a grid is cut: `tile` and `window` sizes, and where each tile's window starts, per axis."""

    shape: tuple[int, int, int]
    tile: tuple[int, int, int]
    window: tuple[int, int, int]
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

    def queries(self, axis: int, index: int) -> tuple[int, int]:
        """Half-open range of tile `index`; the last one may be shorter."""
        return index * self.tile[axis], min((index + 1) * self.tile[axis], self.shape[axis])

    def keys(self, axis: int, index: int) -> tuple[int, int]:
        """Half-open range of its window."""
        return self.starts[axis][index], self.starts[axis][index] + self.window[axis]

    def relative(self, height: tuple[int, int]) -> tuple[int, ...]:
        """What the tiles at `height` look like from themselves: their sizes, and their windows' offsets."""
        places = []
        for axis, index in enumerate(height):
            low, high = self.queries(axis, index)
            places += [high - low, self.starts[axis][index] - low]
        return tuple(places)

    def heights(self) -> Iterator[tuple[int, int]]:
        """Tile indices along frames and rows, one pair for each SDPA call."""
        return ((frame, row) for frame in range(len(self.starts[0])) for row in range(len(self.starts[1])))

    def strips(self, most: int) -> Iterator[Strips]:
        """All strips, at most `most` at a time; a narrower last one by itself."""
        count, ragged = len(self.starts[2]), self.shape[2] % self.tile[2]
        whole = count - 1 if ragged else count
        for first in range(0, whole, most):
            yield Strips(first, min(first + most, whole), self.tile[2])
        if ragged:
            yield Strips(whole, count, ragged)

    def alike(self, strips: Strips) -> Strips:
        """The first strips whose windows lie to them as those of `strips` do: a rule that moves masks them alike."""
        offsets = [start - place * self.tile[2] for place, start in enumerate(self.starts[2])]
        count = strips.last - strips.first
        same = (
            first
            for first in range(strips.first)
            if offsets[first : first + count] == offsets[strips.first : strips.last]
        )
        first = strips.first if strips.width != self.tile[2] else next(same, strips.first)
        return Strips(first, first + count, strips.width)


@cached(256)
def windows(pattern: Pattern, shape: tuple[int, int, int], tile: tuple[int, int, int]) -> Windows:
    """Cut a grid of `shape` (frames, rows, columns) into tiles and find their windows."""
    starts, sizes = [], []
    for axis, (size, step) in enumerate(zip(shape, tile, strict=True)):
        spans = [pattern.span(axis, low, min(low + step, size), size) for low in range(0, size, step)]
        longest = max(high - low for low, high in spans)
        sizes.append(longest)
        starts.append(tuple(min(low, size - longest) for low, _ in spans))
    return Windows(shape, tile, (sizes[0], sizes[1], sizes[2]), (starts[0], starts[1], starts[2]))


def tile_mask(
    pattern: Pattern, cut: Windows, height: tuple[int, int], strips: Strips, extra: int, device: torch.device
) -> Tensor:
    """Who sees whom in the tiles at one height: `(strips, queries, window + extra)`, True for the extra keys."""

    def around(low: int, high: int, place: int) -> Tensor:
        shape = [1] * 7
        shape[place] = high - low
        return torch.arange(low, high, device=device).view(shape)

    first = torch.arange(strips.first, strips.last, device=device).view(-1, *[1] * 6) * cut.tile[2]
    begin = torch.tensor(cut.starts[2][strips.first : strips.last], device=device).view(-1, *[1] * 6)
    query = Cells(
        around(*cut.queries(0, height[0]), 1), around(*cut.queries(1, height[1]), 2), first + around(0, strips.width, 3)
    )
    key = Cells(
        around(*cut.keys(0, height[0]), 4), around(*cut.keys(1, height[1]), 5), begin + around(0, cut.window[2], 6)
    )
    allowed = pattern.allowed(query, key)
    shape = torch.broadcast_shapes(*(part.shape for part in (*query, *key)))
    return F.pad(allowed.expand(shape).flatten(4).flatten(1, 3), (0, extra), value=True)


@cached(64)
def tile_masks(pattern: Pattern, cut: Windows, strips: Strips, extra: int, device: torch.device) -> tuple[Tensor, ...]:
    """`tile_mask` at all heights; equal ones, all but those at the borders, share memory."""
    known: dict[object, Tensor] = {}
    masks: list[Tensor] = []
    for height in cut.heights():
        place = cut.relative(height) if moves_by(pattern, cut.tile) else height
        if place not in known:
            mask = tile_mask(pattern, cut, height, strips, extra, device)
            known[place] = masks[-1] if masks and torch.equal(masks[-1], mask) else mask
        masks.append(known[place])
    return tuple(masks)


def gather_strips(x: Tensor, cut: Windows, strips: Strips) -> Tensor:
    """Copy the columns that each strip may see: `b h f y x d -> b h strips f y window d`."""
    return torch.stack([x[..., slice(*cut.keys(2, strip)), :] for strip in range(strips.first, strips.last)], dim=2)


def scatter_strips(total: Tensor, parts: Tensor, cut: Windows, strips: Strips) -> None:
    """Add the strips back to where `gather_strips` took them from: its adjoint."""
    for part, strip in zip(parts.unbind(2), range(strips.first, strips.last), strict=True):
        total[..., slice(*cut.keys(2, strip)), :] += part


def at_height(x: Tensor, cut: Windows, height: tuple[int, int]) -> Tensor:
    """The windows of a row of tiles, as a view: `b h strips f y window d`."""
    return x[:, :, :, slice(*cut.keys(0, height[0])), slice(*cut.keys(1, height[1]))]


def tile_view(x: Tensor, cut: Windows, height: tuple[int, int], strips: Strips) -> Tensor:
    """The queries (or outputs) of a row of tiles, as a view: `b h f y x d -> b h strips tf ty tx d`."""
    begin = strips.first * cut.tile[2]
    columns = slice(begin, begin + (strips.last - strips.first) * strips.width)
    part = x[:, :, slice(*cut.queries(0, height[0])), slice(*cut.queries(1, height[1])), columns]
    return part.unflatten(4, (strips.last - strips.first, strips.width)).permute(0, 1, 4, 2, 3, 5, 6)


class Operands(NamedTuple):
    """Cells as `b h f y x d`, extra keys as `b h e d`, the model's mask on keys as `b h 1 keys` (or None)."""

    q: Tensor
    k: Tensor
    v: Tensor
    extra_k: Tensor
    extra_v: Tensor
    cell_mask: Tensor | None
    extra_mask: Tensor | None


class Work(NamedTuple):
    """What does not change from tile to tile and carries no gradient."""

    pattern: Pattern
    cut: Windows
    scale: float
    budget: int
    sdpa: Callable[..., Tensor] = F.scaled_dot_product_attention

    def strips(self, operands: Operands) -> Iterator[Strips]:
        """As many strips at once as the budget allows."""
        q, k, cut = operands.q, operands.k, self.cut
        frames, rows, _ = cut.shape
        keys = cut.window[0] * cut.window[1] * cut.window[2] + operands.extra_k.shape[2]
        planes = q.shape[0] * q.shape[1]
        pairs = cut.tile[0] * cut.tile[1] * cut.tile[2] * keys * (planes if operands.cell_mask is not None else 1)
        tokens = frames * rows * cut.window[2] + keys
        strip = planes * tokens * (k.shape[-1] + operands.v.shape[-1]) * k.element_size() + pairs * (
            1 + k.element_size()
        )
        return cut.strips(max(1, self.budget // strip))

    def masks(self, strips: Strips, extra: int, device: torch.device) -> Iterator[Tensor]:
        if moves_by(self.pattern, self.cut.tile):
            strips = self.cut.alike(strips)
        if torch.compiler.is_compiling():
            return (tile_mask(self.pattern, self.cut, height, strips, extra, device) for height in self.cut.heights())
        return iter(tile_masks(self.pattern, self.cut, strips, extra, device))


def merged_mask(
    rule: Tensor, cells: Tensor | None, extra: Tensor | None, height: tuple[int, int], cut: Windows
) -> Tensor:
    """The rule `(strips, n, m)` and the model's mask on the gathered keys, broadcastable to `(b * h, strips, n, m)`."""
    if cells is None or extra is None:
        return rule[None]
    window = at_height(cells, cut, height).flatten(3).unsqueeze(3)  # b h strips 1 window
    keys = torch.cat([window, extra.unsqueeze(2).expand(*window.shape[:3], -1, -1)], dim=-1)
    merged = rule & keys if keys.dtype == torch.bool else keys.masked_fill(~rule, -torch.inf)
    return merged.flatten(0, 1)


def with_extra(windows: Tensor, extra: Tensor) -> Tensor:
    """`b h strips f y x d` and `b h e d` -> `(b * h, strips, window + e, d)`; without extra keys a view."""
    keys = windows.flatten(3, 5)
    if extra.shape[2]:
        keys = torch.cat([keys, extra.unsqueeze(2).expand(-1, -1, keys.shape[2], -1, -1)], dim=3)
    return keys.flatten(0, 1)


def attend_rows(operands: Operands, work: Work) -> Tensor:
    """All tiles, `b h f y x c`."""
    q, k, v, extra_k, extra_v, cell_mask, extra_mask = operands
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    for strips in work.strips(operands):
        keys, values = gather_strips(k, work.cut, strips), gather_strips(v, work.cut, strips)
        hidden = None if cell_mask is None else gather_strips(cell_mask, work.cut, strips)
        masks = work.masks(strips, extra_k.shape[2], q.device)
        for height, rule in zip(work.cut.heights(), masks, strict=True):
            tile = tile_view(q, work.cut, height, strips)
            result = work.sdpa(
                tile.flatten(3, 5).flatten(0, 1),
                with_extra(at_height(keys, work.cut, height), extra_k),
                with_extra(at_height(values, work.cut, height), extra_v),
                attn_mask=merged_mask(rule, hidden, extra_mask, height, work.cut),
                scale=work.scale,
            )
            target = tile_view(out, work.cut, height, strips)
            target.copy_(result.view(target.shape))
    return out


class TiledAttention(torch.autograd.Function):
    """`attend_rows` that keeps its inputs alone and computes every tile again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, work: Work, *operands: Tensor) -> Tensor:
        ctx.work = work
        ctx.save_for_backward(*operands)
        return attend_rows(Operands(*operands), work)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        work, operands = ctx.work, Operands(*ctx.saved_tensors)
        q, k, v, extra_k, extra_v, cell_mask, extra_mask = operands
        totals = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in operands[:5]]
        grad_q, grad_k, grad_v, grad_extra_k, grad_extra_v = totals
        for strips in work.strips(operands):
            keys, values = gather_strips(k, work.cut, strips), gather_strips(v, work.cut, strips)
            hidden = None if cell_mask is None else gather_strips(cell_mask, work.cut, strips)
            grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
            masks = work.masks(strips, extra_k.shape[2], q.device)
            for height, rule in zip(work.cut.heights(), masks, strict=True):
                window_k, window_v = at_height(keys, work.cut, height), at_height(values, work.cut, height)
                parts = [tile_view(q, work.cut, height, strips), window_k, window_v, extra_k, extra_v]
                parts = [part.detach().requires_grad_() for part in parts]
                with torch.enable_grad():
                    result = work.sdpa(
                        parts[0].flatten(3, 5).flatten(0, 1),
                        with_extra(parts[1], parts[3]),
                        with_extra(parts[2], parts[4]),
                        attn_mask=merged_mask(rule, hidden, extra_mask, height, work.cut),
                        scale=work.scale,
                    )
                above = tile_view(grad, work.cut, height, strips).reshape(result.shape)
                found = torch.autograd.grad(result, parts, above, allow_unused=True, materialize_grads=True)
                tile_view(grad_q, work.cut, height, strips).copy_(found[0])
                at_height(grad_keys, work.cut, height).add_(found[1])
                at_height(grad_values, work.cut, height).add_(found[2])
                grad_extra_k += found[3]
                grad_extra_v += found[4]
            scatter_strips(grad_k, grad_keys, work.cut, strips)
            scatter_strips(grad_v, grad_values, work.cut, strips)
        return None, *totals, None, None


def tile_key_mask(call: WindowCall) -> tuple[Tensor | None, Tensor | None]:
    """The model's mask on keys as `attend_rows` takes it; for all batches and heads at once, or for each."""
    masks = call.key_mask()
    if masks is None:
        return None, None
    shared = masks[0].shape[0] * masks[0].shape[1] == 1
    cells, extra = (mask if shared else mask.expand(call.q.shape[0], call.q.shape[1], -1, -1) for mask in masks)
    return cells.squeeze(2).unflatten(2, call.grid.shape).unsqueeze(-1), extra


def best_windows(pattern: Pattern, grid: TokenGrid) -> Windows:
    """The cut of `grid` whose windows hold the fewest keys."""
    cells = TILE_CELLS if grid.frames == 1 else VIDEO_TILE_CELLS
    tile = tile_shape(pattern, grid.shape, cells, blocks=False)
    return windows(
        pattern, grid.shape, (min(tile[0], grid.frames), min(tile[1], grid.height), min(tile[2], grid.width))
    )


def tiled_attention(
    call: WindowCall,
    *,
    tile: tuple[int, int, int] | None = None,
    budget: int | None = None,
    sdpa: Callable[..., Tensor] = F.scaled_dot_product_attention,
) -> Tensor:
    """`sdpa` on gathered tiles of `tile` (frames, rows, columns) cells; None chooses. See the module for the method."""
    grid = call.grid
    free = tile is None and sdpa is F.scaled_dot_product_attention and not torch.compiler.is_compiling()
    blocks = block_order(call.pattern, grid) if free else None
    if blocks is not None:
        return block_attention(call, blocks)
    cut = best_windows(call.pattern, grid) if tile is None else windows(call.pattern, grid.shape, tile)
    work = Work(call.pattern, cut, call.scale, default_budget(call.q.device) if budget is None else budget, sdpa)
    q, k, v = (grid.split(tensor)[0].unflatten(2, grid.shape) for tensor in (call.q, call.k, call.v))
    cell_mask, extra_mask = tile_key_mask(call)
    operands = Operands(q, k, v, *call.extras(), cell_mask, extra_mask)
    if call.needs_grad and not torch.compiler.is_compiling():
        cells: Tensor = TiledAttention.apply(work, *operands)
    else:
        cells = attend_rows(operands, work)
    return call.join(cells.flatten(2, 4))
