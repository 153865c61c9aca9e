"""Merge similar tokens and undo it: bipartite soft matching over a grid, as pure functions on index tensors.

    dst = one cell of every st x sy x sx block, src = all other cells
    similarity(i, j) = cosine(feature_i, feature_j),  i in src, j in dst
    the `count` src with the highest best similarity are merged: dst_j = mean of itself and every src that chose it
    merged sequence = [ src that were kept, most similar first ; dst ]

Un-merging copies a destination's result to all tokens merged into it. Blocks lie in `st` frames (default 1), but a src
may choose a dst of any frame of the grid.

Source: Bolya & Hoffman, Token Merging for Fast Stable Diffusion, https://arxiv.org/abs/2303.17604; the matching itself
is Bolya et al., Token Merging: Your ViT But Faster, section 3, https://arxiv.org/abs/2210.09461. Differences from the
released code: src and dst are in ascending token order and ties go to the lower token id, so that the order does not
depend on the device; a token of norm zero has similarity 0 instead of NaN; merging no token is allowed; any number of
frames. Frames, rows and columns that fill no whole block hold no dst, as released.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from diffattn.grid import TokenGrid

from ..base import Context

MOST_SIMILARITIES = 2**25
"""Similarities that `match` holds at a time, if one source token has no more: 128 MiB in float32."""


class Stage(NamedTuple):
    """Merging options while the share of denoising steps already done is below `until`; the last stage ends at 1."""

    until: float
    sx: int  # columns of the block that gives one destination
    sy: int  # rows of that block
    ratio: float  # share of the cells merged away
    agent_ratio: float = 0.0  # share of the cells merged away to leave the agents

    def check(self, grid: TokenGrid) -> None:
        """Raise `ValueError` where `grid` holds no block."""
        if self.sx > grid.width or self.sy > grid.height:
            raise ValueError(
                f"a block of sy={self.sy} rows and sx={self.sx} columns does not fit the grid {grid}; use smaller sx "
                f"and sy, or keep coarse layers exact with max_downsample= or layers="
            )


def checked_stages(stages: Sequence[Sequence[float]]) -> tuple[Stage, ...]:
    """`stages` as `Stage`s; wrong numbers raise `ValueError`."""
    reached = 0.0
    checked = tuple(Stage(*stage) for stage in stages)  # type: ignore[arg-type]
    for stage in checked:
        if not all(isinstance(side, int) and side >= 1 for side in (stage.sx, stage.sy)):
            raise ValueError(f"sx and sy must be ints of at least 1, got {stage.sx!r} and {stage.sy!r}")
        if not (0 <= stage.ratio <= 1 and 0 <= stage.agent_ratio <= 1):
            raise ValueError(f"ratio and agent_ratio must lie in 0-1, got {stage.ratio} and {stage.agent_ratio}")
        if stage.until <= reached:
            raise ValueError(f"each stage must end after the one before it, got until={stage.until} after {reached}")
        reached = stage.until
    if checked and reached != 1:
        raise ValueError(f"the last stage must have until=1.0, got {reached}")
    return checked


def stage_at(stages: Sequence[Stage], progress: float | None) -> Stage:
    """The stage that holds at `progress`; the first where that is None."""
    return next((stage for stage in stages if (progress or 0.0) < stage.until), stages[-1])


def seeded_generator(seed: int, context: Context) -> torch.Generator:
    """A CPU generator that depends on seed, layer and denoising step alone."""
    prime = 1_000_003
    step = round((context.progress or 0.0) * prime)
    return torch.Generator().manual_seed(((seed * prime + context.call_index) * prime + step) % 2**63)


def compared_features(k: Tensor, grid: TokenGrid, context: Context) -> Tensor:
    """What merging compares, `(b, cells, c)`: the block's input, or the keys with heads side by side."""
    features = context.features
    if features is None:
        return k[..., grid.cell_slice, :].transpose(1, 2).flatten(2)
    # a block may carry text in an argument of its own, which comes to lie before or after the rest
    first = {grid.tokens: grid.before, grid.before + grid.cells: grid.before, grid.cells + grid.after: 0, grid.cells: 0}
    if grid.before == 0 and grid.cells <= features.shape[1] <= grid.tokens:
        return features[:, : grid.cells]  # padding of the cells' own part, and then text
    if features.shape[1] not in first:
        raise ValueError(
            f"merging compares one feature per cell or per token of {grid} ({grid.cells} or {grid.tokens}), got "
            f"{features.shape[1]}; pass the input of this layer's own block as Context.features, or None"
        )
    start = first[features.shape[1]]
    return features[:, start : start + grid.cells]


def refuse_mask(context: Context) -> None:
    """Raise `ValueError` on a model's mask."""
    if context.mask is not None:
        raise ValueError(
            "merging would mix hidden tokens with visible ones, so it takes no mask; use a mechanism without merging, "
            "or leave the masked layers out with layers="
        )


def destinations(grid: TokenGrid, sx: int, sy: int, generator: torch.Generator | None = None, st: int = 1) -> Tensor:
    """Cell ids of one token per block of `st` frames x `sy` rows x `sx` columns, ascending, `(dst,)`.

    Each is drawn from its block with `generator`, or is the block's first cell where that is None.
    """
    frames, rows, columns = grid.frames // st, grid.height // sy, grid.width // sx
    shape = (frames * rows, columns, 1)
    inside = torch.zeros(shape, dtype=torch.long)
    if generator is not None:
        inside = torch.randint(st * sy * sx, shape, generator=generator, device=generator.device)
    inside = inside.view(frames, rows, columns)
    frame, row, column = (torch.arange(size, device=inside.device) for size in inside.shape)
    frame = frame[:, None, None] * st + inside // (sy * sx)  # frames rows columns
    row = row[:, None] * sy + inside // sx % sy
    column = column * sx + inside % sx
    return ((frame * grid.height + row) * grid.width + column).flatten().sort().values


def count_destinations(grid: TokenGrid, sx: int, sy: int, st: int = 1) -> int:
    """How many `destinations` there are."""
    return (grid.frames // st) * (grid.height // sy) * (grid.width // sx)


def count_merged(grid: TokenGrid, sx: int, sy: int, ratio: float, st: int = 1) -> int:
    """How many cells merging a share of `ratio` takes away: at most all that are no destination."""
    return min(grid.cells - count_destinations(grid, sx, sy, st), int(grid.cells * ratio))


class Merging(NamedTuple):
    """Which tokens are merged into which; made by `Match.first`."""

    kept: Tensor  # b src-r, positions in src
    merged: Tensor  # b r, positions in src
    into: Tensor  # b r, positions in dst
    place: Tensor  # b n, where each token lies in the merged sequence
    members: Tensor  # b size, how many tokens make each merged one

    def merge(self, tokens: Tensor) -> Tensor:
        """Average `(b, ..., n, d)` to `(b, ..., size, d)`; sums are taken in float32 at least."""
        batch, size = self.members.shape
        fine = at_least_float32(tokens)
        sums = fine.new_zeros(*fine.shape[:-2], size, fine.shape[-1])
        sums = sums.scatter_add(-2, self._index(fine), fine)
        return (sums / self.members.view(batch, *[1] * (tokens.dim() - 3), size, 1)).to(tokens.dtype)

    def unmerge(self, tokens: Tensor) -> Tensor:
        """Copy `(b, ..., size, d)` back to `(b, ..., n, d)`."""
        return tokens.gather(-2, self._index(tokens))

    def _index(self, tokens: Tensor) -> Tensor:
        batch, count = self.place.shape
        place = self.place.view(batch, *[1] * (tokens.dim() - 3), count, 1)
        return place.expand(*tokens.shape[:-2], count, tokens.shape[-1])


class Match(NamedTuple):
    """Every source token with the destination it is most similar to, most similar pair first."""

    src: Tensor  # src, token ids
    dst: Tensor  # dst, token ids
    order: Tensor  # b src, positions in src
    target: Tensor  # b src, positions in dst

    def first(self, count: int) -> Merging:
        """Merge the `count` most similar source tokens."""
        merged, kept = self.order.split([count, self.order.shape[1] - count], dim=1)
        into = self.target[:, :count]
        batch, start = len(kept), kept.shape[1]
        place = torch.empty(batch, len(self.src) + len(self.dst), dtype=torch.long, device=kept.device)
        place[:, self.dst] = torch.arange(start, start + len(self.dst), device=kept.device)
        place.scatter_(1, self.src[kept], torch.arange(start, device=kept.device).expand(batch, -1))
        place.scatter_(1, self.src[merged], into + start)
        members = torch.zeros(batch, start + len(self.dst), dtype=torch.long, device=kept.device)
        members.scatter_add_(1, place, torch.ones_like(place))
        return Merging(kept, merged, into, place, members)


@torch.no_grad()
def match(features: Tensor, dst: Tensor) -> Match:
    """Match the tokens of `features` `(b, n, c)` that are not in `dst` with those that are. Time O(src dst c).

    Similarities are computed in float32 at least, so that half precision does not make ties, and for a part of the
    sources at a time where there are many.
    """
    dst = dst.to(features.device)
    is_source = torch.ones(features.shape[1], dtype=torch.bool, device=features.device)
    is_source[dst] = False
    # nonzero would wait for the device; the number of sources is known
    src = is_source.logical_not().sort(stable=True).indices[: features.shape[1] - len(dst)]
    metric = F.normalize(at_least_float32(features), dim=-1)
    at_a_time = max(1, MOST_SIMILARITIES // max(1, len(features) * len(dst)))
    with torch.autocast(metric.device.type, enabled=False):
        targets = metric[:, dst].transpose(-1, -2)
        found = [(metric[:, part] @ targets).max(dim=-1) for part in src.split(at_a_time)]
    best, target = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))  # b src
    order = best.sort(dim=-1, descending=True, stable=True).indices
    return Match(src, dst, order, target.gather(1, order))


def at_least_float32(tokens: Tensor) -> Tensor:
    """`tokens`, half precision widened."""
    return tokens if tokens.dtype == torch.float64 else tokens.float()


def groups_reference(features: Sequence[Sequence[float]], dst: Sequence[int], count: int) -> list[list[int]]:
    """The merged sequence of one sample as lists of token ids, by loops over plain numbers; a dst leads its group."""

    def cosine(one: Sequence[float], other: Sequence[float]) -> float:
        norms = sum(x * x for x in one) * sum(x * x for x in other)
        return sum(x * y for x, y in zip(one, other, strict=True)) / norms**0.5 if norms else 0.0

    best = {}
    for source in range(len(features)):
        if source not in dst:
            scores = [cosine(features[source], features[target]) for target in dst]
            best[source] = (max(scores), dst[scores.index(max(scores))])
    order = sorted(best, key=lambda source: (-best[source][0], source))
    groups = {target: [target] for target in dst}
    for source in order[:count]:
        groups[best[source][1]].append(source)
    return [[source] for source in order[count:]] + list(groups.values())
