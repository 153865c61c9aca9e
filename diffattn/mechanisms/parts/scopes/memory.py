"""What left the window, by means: the frames that a query frame does not see otherwise, in runs of at most `size`.

    groups:  frames 0 ... size-1, size ... 2 size-1, and so on, to the end of the video
    runs of query frame f:  what a group has before the window of f, and what it has behind it, global frames left out
    a run counts, for every cell of a frame, by one key and one value:  the means of those of its n frames,
    with log n + bias of the global frames - forget * (distance of the run's nearest frame from the window) on its logit

A key that the model's mask weighs by w = exp(mask), 0 where it is hidden, counts w in means and in n. Runs are
functions of the whole video, whose parts have the sums over their own frames.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from diffattn.grid import TokenGrid
from diffattn.kernels.pattern import cached


def check_one_mask(mask: Tensor | None, size: int | None) -> None:
    """Raise `ValueError` for a model's mask `(b|1, h|1, n|1, n)` that can't be served with a memory."""
    if size is not None and mask is not None and mask.shape[2] > 1:
        raise ValueError(
            f"dual_scope: the means of memory={size} are the same for all queries, so a mask must be one over the "
            f"keys, (b, 1, 1, n), got {tuple(mask.shape)}; leave memory out for this layer"
        )


class Sums(NamedTuple):
    """Weighted sums of keys and values over some frames of a group; `(b, h, places, cells, ..)`."""

    k: Tensor
    v: Tensor
    weight: Tensor
    """`(b|1, h|1, places, cells, 1)`"""


class Means(NamedTuple):
    """Mean keys and values, and the logarithms of how many they stand for."""

    k: Tensor
    """`(b, h, places * cells, d)`"""
    v: Tensor
    log_count: Tensor
    """`(b|1, h|1, 1, places * cells)`; -inf for no frame at all."""

    @classmethod
    def of(cls, sums: Sums, dtype: torch.dtype) -> "Means":
        """`dtype` is that of keys and values."""
        some = sums.weight > 0
        weight = torch.where(some, sums.weight, 1.0)
        count = weight.log().masked_fill(~some, -torch.inf)
        k, v = ((x / weight).to(dtype).flatten(2, 3) for x in (sums.k, sums.v))
        return cls(k, v, count.to(dtype).flatten(2).unsqueeze(2))

    def places(self, places: range, cells: int) -> "Means":
        """A part of them, as views."""
        part = slice(places.start * cells, places.stop * cells)
        return Means(self.k[:, :, part], self.v[:, :, part], self.log_count[..., part])


class Memory(NamedTuple):
    """All runs that some query frames see."""

    groups: Means
    """Whole groups of the video."""
    before: Means
    """For each frame of `held`: its group up to it."""
    after: Means
    """For each frame of `held`: its group from it on."""
    held: range
    frames: int
    size: int
    padding: int
    forget: float = 0.0

    def of_block(self, queries: range, cells: int, bias: float) -> tuple[list[Means], Tensor]:
        """The runs that any of `queries` sees, and their additive mask `(b|1, h|1, queries, means * cells)`."""
        count = -(-self.frames // self.size)
        low, high = queries.start - self.padding - 1, queries.stop + self.padding
        below = range(min(max((queries.stop - self.padding - 2) // self.size, 0), count))
        above = range(max(min((queries.start + self.padding + 1) // self.size + 1, count), below.stop), count)
        befores = range(max(low, 0), max(queries.stop - self.padding - 1, 0))
        afters = range(min(queries.start + self.padding + 1, self.frames), min(high + 1, self.frames))
        pieces = [self.groups.places(below, cells), self.groups.places(above, cells)]
        for means, frames in ((self.before, befores), (self.after, afters)):
            pieces.append(means.places(range(frames.start - self.held.start, frames.stop - self.held.start), cells))
        groups = (*below, *above)
        counts = torch.cat([piece.log_count for piece in pieces], dim=-1)
        mask = run_bias(queries, groups, befores, afters, self.size, self.padding, self.forget, counts)
        return pieces, (mask + bias).repeat_interleave(cells, dim=1) + counts


def run_bias(
    queries: range,
    groups: tuple[int, ...],
    befores: range,
    afters: range,
    size: int,
    padding: int,
    forget: float,
    like: Tensor,
) -> Tensor:
    """`_run_bias` as a tensor like `like`."""
    return _run_bias(queries, groups, befores, afters, size, padding, forget, like.dtype, like.device)


@cached(4096)
def _run_bias(
    queries: range,
    groups: tuple[int, ...],
    befores: range,
    afters: range,
    size: int,
    padding: int,
    forget: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """What a run loses by its distance, -inf where a query frame does not see it: `(queries, runs)`."""
    query = torch.arange(queries.start, queries.stop, device=device)[:, None]
    group = torch.tensor(groups, dtype=torch.long, device=device)
    low, high = query - padding - 1, query + padding + 1
    under = group < low.div(size, rounding_mode="floor")
    over = group > high.div(size, rounding_mode="floor")
    distance = torch.where(under, low + 2 - (group + 1) * size, group * size - high + 1)
    last, first = (torch.tensor([*frames], dtype=torch.long, device=device) for frames in (befores, afters))
    seen = torch.cat([under | over, low == last, high == first], dim=1)
    edge = torch.ones(len(queries), len(last) + len(first), dtype=torch.long, device=device)
    lost = -forget * torch.cat([distance, edge], dim=1).to(torch.promote_types(dtype, torch.float32))
    return lost.masked_fill(~seen, -torch.inf).to(dtype)


def runs_of(frame: int, frames: int, size: int, padding: int) -> list[tuple[range, int]]:
    """The runs that one query frame sees, global frames among them, each with its distance from the window.

    >>> runs_of(5, 12, size=4, padding=1)
    [(range(0, 4), 1), (range(7, 8), 1), (range(8, 12), 2)]
    """
    found = []
    for first in range(0, frames, size):
        stop = min(first + size, frames)
        before, after = range(first, min(stop, frame - padding)), range(max(first, frame + padding + 1), stop)
        if before:
            found.append((before, frame - padding - before[-1]))
        if after:
            found.append((after, after[0] - frame - padding))
    return found


def runs_seen(grid: TokenGrid, shared: list[tuple[int, ...]], size: int, padding: int) -> tuple[Tensor, Tensor]:
    """The runs as `diffattn.mechanisms.base.Seen` has blocks: who sees which, and the cells of each, by sample."""
    cells = grid.height * grid.width
    by_frame = [[run for run, _ in runs_of(frame, grid.frames, size, padding)] for frame in range(grid.frames)]
    runs = sorted({run for found in by_frame for run in found}, key=lambda run: (run.start, run.stop))
    blocks = torch.zeros(len(shared), 1, len(runs), cells, grid.frames, cells, dtype=torch.bool)
    means = torch.zeros(1, 1, grid.tokens, len(runs), cells, dtype=torch.bool)
    for number, run in enumerate(runs):
        for sample, chosen in enumerate(shared):
            for frame in (frame for frame in run if frame not in chosen):
                blocks[sample, 0, number, :, frame] = torch.eye(cells, dtype=torch.bool)
        for frame in (frame for frame, found in enumerate(by_frame) if run in found):
            means[0, 0, grid.before + frame * cells : grid.before + (frame + 1) * cells, number] = True
    return means.flatten(3), blocks.flatten(4, 5).flatten(2, 3)


def weights_of(
    frames: range, shared: tuple[int, ...] | Tensor, mask: Tensor | None, cells: int, like: Tensor
) -> Tensor:
    """How much each key of `frames` counts: `(b|1, h|1, frames, cells, 1)`, 0 for global frames.

    `mask` is the model's, over these keys, `(b|1, h|1, 1, frames * cells)`.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    number = torch.arange(frames.start, frames.stop, device=like.device)
    chosen = shared if isinstance(shared, Tensor) else torch.tensor([shared], dtype=torch.long, device=like.device)
    weight = (number[:, None] != chosen[:, None, :]).all(-1).to(dtype)[:, None, :, None]
    if mask is not None:
        own = mask.to(dtype) if mask.dtype == torch.bool else mask.to(dtype).exp()
        weight = weight * own.squeeze(2).unflatten(2, (len(frames), cells))
    return weight.expand(-1, -1, -1, cells).unsqueeze(-1)


def running_sums(k: Tensor, v: Tensor, weight: Tensor, frames: range, size: int) -> tuple[Sums, Sums]:
    """Of each of `frames`: the sums over its group up to it, and from it on, as far as `frames` goes.

    `k` and `v` are `(b, h, frames * cells, ..)`.
    """
    front = frames.start % size
    back = -(front + len(frames)) % size
    befores, afters = [], []
    for x in (k, v, None):
        by_frame = weight if x is None else x.to(weight.dtype).unflatten(2, (len(frames), -1)) * weight
        padded = F.pad(by_frame, (0, 0, 0, 0, front, back)).unflatten(2, (-1, size))
        upto, since = padded.cumsum(3), padded.flip(3).cumsum(3).flip(3)
        inner = slice(front, front + len(frames))
        befores.append(upto.flatten(2, 3)[:, :, inner])
        afters.append(since.flatten(2, 3)[:, :, inner])
    return Sums(*befores), Sums(*afters)


def group_sums(k: Tensor, v: Tensor, weight: Tensor, frames: range, size: int, count: int) -> Sums:
    """The sums of `frames` over each of the video's `count` groups; zeros for groups elsewhere."""
    first, last = frames.start // size, (frames.stop - 1) // size
    found = []
    for x in (k, v, None):
        by_frame = weight if x is None else x.to(weight.dtype).unflatten(2, (len(frames), -1)) * weight
        front = frames.start % size
        padded = F.pad(by_frame, (0, 0, 0, 0, front, -(front + len(frames)) % size))
        total = padded.unflatten(2, (-1, size)).sum(3)
        found.append(F.pad(total, (0, 0, 0, 0, first, count - 1 - last)))
    return Sums(*found)
