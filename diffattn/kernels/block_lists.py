"""FlexAttention's lists of blocks, from what a tile may touch: which blocks of keys a rule is asked about, which not.

A row of a list belongs to a block of queries and names blocks of keys; it is as wide as the longest needs. The CPU
kernel alone demands lists as wide as there are blocks of keys. The backward pass reads the same pairs by block of keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Touched(NamedTuple):
    """For every block of queries its candidates, `(blocks, candidates)`."""

    keys: Tensor
    """Number of the block of keys."""
    seen: Tensor
    """May any of its cells be seen?"""
    full: Tensor
    """Does every query see all of it?"""


class BlockLists(NamedTuple):
    """Counts `(1, 1, blocks)` and numbers `(1, 1, blocks, width)`, int32, in the order of `BlockMask`."""

    partial_count: Tensor
    partial: Tensor
    full_count: Tensor
    full: Tensor

    def to(self, device: torch.device | str) -> "BlockLists":
        return BlockLists(*(tensor.to(device) for tensor in self))


def paired(touched: Touched) -> Touched:
    """The candidates of every two blocks of queries as one: seen by any of both, full where both see all."""
    keys, seen, full = (x.reshape(x.shape[0] // 2, -1) for x in touched)
    keys, place = keys.sort(dim=1, stable=True)
    seen, full = seen.gather(1, place), full.gather(1, place)
    twice = keys[:, 1:] == keys[:, :-1]
    either, both = seen.clone(), torch.zeros_like(full)
    either[:, :-1] |= twice & seen[:, 1:]
    either[:, 1:] &= ~twice
    both[:, :-1] = twice & full[:, :-1] & full[:, 1:]
    return Touched(keys, either, both)


def with_further(touched: Touched, first: int, count: int, partial: int) -> Touched:
    """With `count` blocks of keys, from number `first`, that all see; a rule is asked about the last `partial`."""
    blocks = touched.keys.shape[0]
    numbers = torch.arange(first, first + count, dtype=touched.keys.dtype).expand(blocks, -1)
    full = (torch.arange(count) < count - partial).expand(blocks, -1)
    return Touched(
        torch.cat([touched.keys, numbers], dim=1),
        torch.cat([touched.seen, torch.ones_like(full)], dim=1),
        torch.cat([touched.full, full], dim=1),
    )


def lists(touched: Touched, width: int | None = None) -> BlockLists:
    """By block of queries; `width`: of every row, else what the longest needs."""
    keys, seen, full = touched
    return BlockLists(*_rows(keys, seen & ~full, width), *_rows(keys, full, width))


def transposed(touched: Touched, blocks: int) -> BlockLists:
    """By block of keys, of which there are `blocks`: the blocks of queries that see it."""
    keys, seen, full = touched
    return BlockLists(*_columns(keys, seen & ~full, blocks), *_columns(keys, full, blocks))


def _rows(keys: Tensor, flags: Tensor, width: int | None) -> tuple[Tensor, Tensor]:
    counts = flags.sum(1, dtype=torch.int32)
    wide = max(1, int(counts.max())) if width is None else width
    first = torch.argsort(~flags, dim=1, stable=True)[:, :wide]
    numbers = torch.zeros(keys.shape[0], wide, dtype=torch.int32)
    numbers[:, : first.shape[1]] = keys.gather(1, first)
    return counts[None, None], numbers[None, None]


def _columns(keys: Tensor, flags: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    asking, place = flags.nonzero(as_tuple=True)
    found = keys[asking, place].long()
    order = torch.argsort(found, stable=True)
    counts = torch.bincount(found, minlength=blocks)
    starts = counts.cumsum(0) - counts
    numbers = torch.zeros(blocks, max(1, int(counts.max())), dtype=torch.int32)
    rows = found[order]
    numbers[rows, torch.arange(rows.numel()) - starts[rows]] = asking[order].to(torch.int32)
    return counts.to(torch.int32)[None, None], numbers[None, None]
