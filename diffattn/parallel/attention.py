"""Dual-scope attention where every rank has one clip of the video.

The rule is that of `diffattn.mechanisms.dual_scope`, in the numbers of frames of the whole video. A rank computes its
own frames' output; the keys and values it lacks come in two exchanges, keys and values packed together:

    local window:   a halo of `padding` frames on either side
    global frames:  gathered from the ranks that hold them

Some settings take more. `chosen_by="content"`: first every rank gathers the landmarks of all frames, so that all make
the same choice, and the chosen frames, others for each sample, are summed up over the ranks. `memory`: the halo is
longer by `memory` frames, whose means a window may cut, and the sums over whole groups are summed up over the ranks.

Tokens off the grid (text) are the same on every rank. They attend to all tokens: each rank attends for them to its own
frames, and the outputs are merged (`merge.py`), so all ranks go on with the same text.

Cost for an inner rank, with frames of `b h cells d` numbers: 4 padding frames sent and received, 2 top_k / ranks
frames sent and 2 top_k (ranks - 1) / ranks received, independent of the number of frames. Memory beyond inputs and
output: keys and values of 2 padding + top_k frames, and those that one block of queries sees.
By content: 2 frames b h d numbers of landmarks and 2 top_k frames more, sent and received; where a frame has one cell,
as in the temporal layers of a UNet, its landmark is its key, so these grow with the video as all its keys do.
With memory: 4 memory frames, and 2 frames / memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..grid import TokenGrid
from ..mechanisms.base import Context, Mechanism, default_scale
from ..mechanisms.dual_scope import DualScopeAttention
from ..mechanisms.parts.scopes.attention import JoinedKeys, Keys, attend_scopes, four_axes
from ..mechanisms.parts.scopes.choice import landmarks
from ..mechanisms.parts.scopes.memory import Memory, Sums, group_sums, running_sums, weights_of
from .operations.collectives import all_sum, tie
from .operations.gather import gather_all, gather_by_sample, gather_frames
from .operations.halo import halo_parts, pad_frames
from .operations.merge import merge_over_ranks, partial_attention
from .operations.shares import FramePlan


class HeldKeys(NamedTuple):
    """What the queries of a clip may see, after all exchanges."""

    local: JoinedKeys
    """The frames `ClipAttention.local_frames`."""
    shared: Keys
    others: Keys
    shared_frames: tuple[int, ...] | Tensor
    """The global frames: of all samples, or of each, `(b, top_k)`."""
    memory: Memory | None = None
    received: tuple[Tensor, ...] = ()
    """Of `memory`: what came from other ranks."""


@dataclass(frozen=True, kw_only=True)
class ClipAttention(Mechanism):
    """`mechanism` on a video of which this rank holds the clip that `plan` gives it.

    `diffattn.parallel.apply_on_clips` puts it into a model; grids are those of one clip.
    """

    type: ClassVar[str] = DualScopeAttention.type
    kinds: ClassVar[frozenset[str]] = DualScopeAttention.kinds
    across_frames: ClassVar[bool] = True

    mechanism: DualScopeAttention
    plan: FramePlan

    def __post_init__(self) -> None:
        self.mechanism.check(TokenGrid(1, 1, frames=self.plan.frames))
        if self.mechanism.official and (len(set(self.plan.lengths)) > 1 or self.mechanism.clips != self.plan.ranks):
            raise ValueError(
                f"the released code's choice of frames is that of equal clips, here clips={self.mechanism.clips}, "
                f"but the plan has clips of {self.plan.lengths} frames; make them equal, with "
                f"clips={self.plan.ranks}, or leave official=True out"
            )

    @property
    def needs(self) -> frozenset[str]:
        return self.mechanism.needs

    def check(self, grid: TokenGrid, *, context: Context = Context()) -> None:
        self.plan.check(grid.frames)

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
        grid.check(q, k)
        self.check(grid)
        if context.progress is None and self.plan.clock.progress is not None:
            context = replace(context, progress=self.plan.clock.progress)
        if self.plan.ranks == 1 and self.as_alone:
            return self.mechanism.attend(q, k, v, grid, scale=scale, context=context)
        mask = _key_mask(context.mask, q)
        scale = default_scale(q) if scale is None else scale
        asking, others = grid.split(q)
        held = self.exchange_keys(asking, k, v, grid, mask, scale, context)
        cells = self.attend_cells(asking, held, grid, scale, context)
        came = [x for keys in (*held.local.parts, held.shared) for x in (keys.k, keys.v)]
        cells = tie(cells, [*came, *held.received])
        if not grid.others:
            return cells
        return grid.join(cells, self.attend_others(others, k, v, grid, mask, scale, held))

    @property
    def as_alone(self) -> bool:
        """Is it `mechanism` itself where one rank holds the whole video?"""
        return True

    @property
    def sees_everything(self) -> bool:
        """Is it the model's own attention: a window over the whole video, and nothing else that changes a logit?"""
        own = self.mechanism
        plain = own.attn_scale == 1 and not (own.token_num_scale or own.official)
        return plain and own.top_k == 0 and own.padding >= self.plan.frames - 1

    def attend_cells(
        self,
        q: Tensor,
        held: HeldKeys,
        grid: TokenGrid,
        scale: float,
        context: Context,
        queries: range | None = None,
    ) -> Tensor:
        """The output of the cells of frames `queries`, `(b, h, n, c)`; None: of this rank's."""
        return attend_scopes(
            q,
            held.local,
            held.shared,
            held.others,
            self.mechanism.scopes(context),
            queries=self.plan.own if queries is None else queries,
            local_frames=self.local_frames,
            shared_frames=held.shared_frames,
            cells=grid.height * grid.width,
            scale=scale * self.mechanism.attn_scale,
            train_frames=self.mechanism.train_frames if self.mechanism.token_num_scale else None,
            memory=held.memory,
        )

    @property
    def halo(self) -> int:
        """Frames on either side that this rank gets of its neighbours."""
        return self.mechanism.padding + (self.mechanism.memory or 0)

    @property
    def local_frames(self) -> range:
        """The frames in reach of this clip; the released code has frames of zeros beyond the ends of the video."""
        reach, own = self.mechanism.local_frames(self.plan.frames), self.plan.own
        return range(max(own.start - self.halo, reach.start), min(own.stop + self.halo, reach.stop))

    def exchange_keys(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        mask: Tensor | None,
        scale: float,
        context: Context,
    ) -> HeldKeys:
        """All keys that this clip's cells, whose queries are `q`, may see."""
        (cells_k, others_k), (cells_v, others_v) = grid.split(k), grid.split(v)
        parts, others_mask = [cells_k, cells_v], None
        if mask is not None:
            cells_mask, others_mask = grid.split(mask, dim=-1)
            parts.append(cells_mask.transpose(-1, -2))
        parts = [part.unflatten(2, (grid.frames, -1)) for part in parts]
        halo, own = self.halo, self.plan.own
        befores, afters = halo_parts(parts, halo, halo, 2, self.plan)
        held, wanted = self.plan.window(halo, halo), self.local_frames
        first, last = range(held.start, own.start), range(own.stop, held.stop)
        before = [pad_frames(x, first, range(wanted.start, own.start), 2) for x in befores]
        after = [pad_frames(x, last, range(own.stop, wanted.stop), 2) for x in afters]
        places: tuple[int, ...] | Tensor
        if self.mechanism.chosen_by == "content" and self.mechanism.top_k:
            places = self.choose_frames(q, cells_k, grid.frames, scale)
            shared = gather_by_sample(parts, places, self.plan)
        else:
            places = self.mechanism.global_frames(self.plan.frames, context)
            shared = gather_frames(parts, places, 2, self.plan)
        local = JoinedKeys((_keys(before), _keys(parts), _keys(after)))
        others = Keys(others_k, others_v, others_mask)
        if self.mechanism.memory is None:
            return HeldKeys(local, _keys(shared), others, places)
        return HeldKeys(local, _keys(shared), others, places, *self.remember(local, places))

    def choose_frames(self, q: Tensor, k: Tensor, frames: int, scale: float) -> Tensor:
        """The global frames of each sample, the same on every rank."""
        marks = torch.stack([landmarks(q, frames), landmarks(k, frames)])
        asking, keys = gather_all(marks, 3, self.plan, "landmarks")
        return self.mechanism.chosen_frames(asking, keys, scale)

    def remember(self, local: JoinedKeys, shared: tuple[int, ...] | Tensor) -> tuple[Memory, tuple[Tensor, ...]]:
        """The means of what is out of sight, and what of it came from other ranks."""
        size, own = self.mechanism.memory, self.plan.own
        assert size is not None
        near, clip = local.joined(), local.parts[1]
        cells = clip.k.shape[2] // len(own)

        def weight(keys: Keys, frames: range) -> Tensor:
            return weights_of(frames, shared, keys.mask, cells, keys.k)

        before, after = running_sums(near.k, near.v, weight(near, self.local_frames), self.local_frames, size)
        groups = group_sums(clip.k, clip.v, weight(clip, own), own, size, -(-self.plan.frames // size))
        total = all_sum(torch.cat([part.flatten() for part in groups]), self.plan, "memory")
        summed = total.split([part.numel() for part in groups])
        groups = Sums(*(part.view(like.shape) for part, like in zip(summed, groups, strict=True)))
        made = self.mechanism.means(
            groups, before, after, held=self.local_frames, frames=self.plan.frames, dtype=clip.k.dtype
        )
        return made, (total,)

    def attend_others(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        mask: Tensor | None,
        scale: float,
        held: HeldKeys,
    ) -> Tensor:
        """The output of the tokens off the grid; their own keys are counted on the first rank alone."""
        if self.plan.rank > 0:
            k, v = k[:, :, grid.cell_slice], v[:, :, grid.cell_slice]
            mask = None if mask is None else mask[..., grid.cell_slice]
        out, lse = partial_attention(q, k, v, scale=scale, mask=mask)
        return merge_over_ranks(out, lse, self.plan).to(q.dtype)

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, *, context: Context = Context()) -> int:
        if self.plan.ranks == 1:
            return self.mechanism.flops(grid, heads, head_dim, context=context)
        if context.progress is None:
            context = replace(context, progress=self.plan.clock.progress)
        pairs = self.mechanism.frame_pairs(self.plan.own, self.plan.frames, context)
        pairs = pairs * (grid.height * grid.width) ** 2 + grid.tokens**2 - grid.cells**2
        return (4 * pairs + self.mechanism.choice_pairs(self.plan.frames)) * heads * head_dim

    def explain_backend(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, backend: str, context: Context) -> str:
        inner = self.mechanism.explain_backend(q, k, v, grid, backend, context)
        return f"{inner}, clip {self.plan.rank + 1} of {self.plan.ranks}"

    def to_dict(self) -> dict[str, Any]:
        return self.mechanism.to_dict()

    def __str__(self) -> str:
        own = self.plan.own
        return f"{self.mechanism} on frames {own.start} to {own.stop - 1} of {self.plan.frames}"


def official_on(mechanism: DualScopeAttention, plan: FramePlan) -> DualScopeAttention:
    """What the released code computes of `mechanism` on the ranks of `plan`."""
    return replace(mechanism, official=True, clips=plan.ranks)


def _key_mask(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The model's mask of the keys, `(b|1, h|1, 1, n)`, additive and in the dtype of `q`, to travel with them."""
    mask = four_axes(mask, q)
    if mask is None:
        return None
    if mask.shape[2] > 1:
        raise NotImplementedError(
            f"on clips a mask must be one over the keys, (b, 1, 1, n), got {tuple(mask.shape)}: no rank has the keys "
            f"of all frames"
        )
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask


def _keys(parts: Sequence[Tensor]) -> Keys:
    k, v, *mask = (part.flatten(2, 3) for part in parts)
    return Keys(k, v, mask[0].transpose(-1, -2) if mask else None)
