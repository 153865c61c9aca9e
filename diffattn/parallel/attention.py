"""Dual-scope attention where every rank has one clip of the video.

The rule is that of `diffattn.mechanisms.dual_scope`, in the numbers of frames of the whole video. A rank computes its
own frames' output; the keys and values it lacks come in two exchanges, keys and values packed together:

    local window:   a halo of `padding` frames on either side
    global frames:  gathered from the ranks that hold them

Tokens off the grid (text) are the same on every rank. They attend to all tokens: each rank attends for them to its own
frames, and the outputs are merged (`merge.py`), so all ranks go on with the same text.

Cost for an inner rank, with frames of `b h cells d` numbers: 4 padding frames sent and received, 2 top_k / ranks
frames sent and 2 top_k (ranks - 1) / ranks received, independent of the number of frames. Memory beyond inputs and
output: keys and values of 2 padding + top_k frames, and those that one block of queries sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..grid import TokenGrid
from ..mechanisms.base import Context, Mechanism, default_scale
from ..mechanisms.dual_scope import DualScopeAttention
from ..mechanisms.parts.scope_attention import JoinedKeys, Keys, attend_scopes, four_axes
from ..mechanisms.parts.scopes import Scopes
from .operations.collectives import tie
from .operations.gather import gather_frames
from .operations.halo import halo_parts, pad_frames
from .operations.merge import merge_over_ranks, partial_attention
from .operations.shares import FramePlan


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
        if self.plan.ranks == 1 and self.as_alone:
            return self.mechanism.attend(q, k, v, grid, scale=scale, context=context)
        mask = _key_mask(context.mask, q)
        scale = default_scale(q) if scale is None else scale
        asking, others = grid.split(q)
        local, shared, other_keys = self.exchange_keys(k, v, grid, mask)
        cells = self.attend_cells(asking, local, shared, other_keys, grid, scale, context)
        cells = tie(cells, [x for keys in (*local.parts, shared) for x in (keys.k, keys.v)])
        if not grid.others:
            return cells
        return grid.join(cells, self.attend_others(others, k, v, grid, mask, scale, shared, other_keys))

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
        local: JoinedKeys,
        shared: Keys,
        others: Keys,
        grid: TokenGrid,
        scale: float,
        context: Context,
        queries: range | None = None,
    ) -> Tensor:
        """The output of the cells of frames `queries`, `(b, h, n, c)`; None: of this rank's."""
        return attend_scopes(
            q,
            local,
            shared,
            others,
            self.mechanism.scopes(context),
            queries=self.plan.own if queries is None else queries,
            local_frames=self.local_frames,
            shared_frames=self.shared_frames,
            cells=grid.height * grid.width,
            scale=scale * self.mechanism.attn_scale,
            train_frames=self.mechanism.train_frames if self.mechanism.token_num_scale else None,
        )

    @property
    def shared_frames(self) -> tuple[int, ...]:
        """The global frames of the video."""
        return self.mechanism.global_frames(self.plan.frames)

    @property
    def local_frames(self) -> range:
        """The frames in reach of this clip; the released code has frames of zeros beyond the ends of the video."""
        reach, padding = self.mechanism.local_frames(self.plan.frames), self.mechanism.padding
        own = self.plan.own
        return range(max(own.start - padding, reach.start), min(own.stop + padding, reach.stop))

    def exchange_keys(
        self, k: Tensor, v: Tensor, grid: TokenGrid, mask: Tensor | None
    ) -> tuple[JoinedKeys, Keys, Keys]:
        """The keys in reach of this clip, the global ones, and those off the grid."""
        (cells_k, others_k), (cells_v, others_v) = grid.split(k), grid.split(v)
        parts, others_mask = [cells_k, cells_v], None
        if mask is not None:
            cells_mask, others_mask = grid.split(mask, dim=-1)
            parts.append(cells_mask.transpose(-1, -2))
        parts = [part.unflatten(2, (grid.frames, -1)) for part in parts]
        padding, own = self.mechanism.padding, self.plan.own
        befores, afters = halo_parts(parts, padding, padding, 2, self.plan)
        held, wanted = self.plan.window(padding, padding), self.local_frames
        first, last = range(held.start, own.start), range(own.stop, held.stop)
        before = [pad_frames(x, first, range(wanted.start, own.start), 2) for x in befores]
        after = [pad_frames(x, last, range(own.stop, wanted.stop), 2) for x in afters]
        shared = gather_frames(parts, self.shared_frames, 2, self.plan)
        local = JoinedKeys((_keys(before), _keys(parts), _keys(after)))
        return local, _keys(shared), Keys(others_k, others_v, others_mask)

    def attend_others(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        mask: Tensor | None,
        scale: float,
        shared: Keys,
        others: Keys,
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
        scopes = Scopes(self.mechanism.padding, duplicates=self.mechanism.duplicates or self.mechanism.official)
        seen = (scopes.keys(range(frame, frame + 1), self.local_frames, self.shared_frames) for frame in self.plan.own)
        pairs = sum(len(near) + len(far) for near, far in seen) * (grid.height * grid.width) ** 2
        return 4 * (pairs + grid.tokens**2 - grid.cells**2) * heads * head_dim

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
