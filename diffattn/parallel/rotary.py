"""Dual-scope attention on clips for video transformers, whose queries and keys are rotated by their frame's number.

    logit = scale (R(f_q) q) (R(f_k) k)^T = scale q R(f_k - f_q) k^T,    R(f): pairs of numbers turned by f w_j

Frames are numbered in the whole video. Local keys are near, so their phases are as in training. A global frame of a
video longer than in training lies further off than any that the model has seen: seen from frame i its distance
d = g - i is compressed beyond the window, and the greatest is that of training,

    d' = d                                                   for |d| <= P
    d' = sign(d) (P + (|d| - P) (D - P) / (N - 1 - P))       beyond,   D = max(P, train_frames - 1)

for a window of P = `padding` frames on either side and a video of N frames. Tokens off the grid (text) are not rotated;
to them frame f lies at f D / (N - 1). Where N - 1 <= D, or without global frames, all of it is the model's own.

With `joint_text` queries off the grid see the tokens off the grid and the global frames alone: every rank computes the
same, and their keys do not grow with the video. Without global frames (`top_k=0`) they see everything.

Cost beside that of `ClipAttention`: in a video longer than training each query frame turns 2 top_k cells numbers d.
Source: positions beyond a window in smaller steps are Leaky ReRoPE of Su, 2023, https://kexue.fm/archives/9708; that
distances out of training are what fails in long videos, Zhao et al., RIFLEx, https://arxiv.org/abs/2502.15894. For
global frames of dual-scope attention it is ours, without a measurement of quality.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..grid import TokenGrid
from ..mechanisms.base import Context
from ..mechanisms.parts.scopes.attention import Keys, add_model_mask
from .attention import ClipAttention, HeldKeys


@dataclass(frozen=True, kw_only=True)
class RotaryClipAttention(ClipAttention):
    """`ClipAttention` that knows how the model rotates keys; without `frequencies` it does not."""

    frequencies: tuple[float, ...] = ()
    """Turn for each frame, in radians, of the pairs of numbers (0, 1), (2, 3), ... at the start of a key."""
    joint_text: bool = False
    """Do tokens off the grid see the global frames alone?"""

    def __post_init__(self) -> None:
        super().__post_init__()
        own = self.mechanism
        if not self.as_alone and (own.chosen_by == "content" or own.memory is not None):
            raise ValueError(
                f"on clips of this model {'memory' if own.memory is not None else 'chosen_by=content'} can't be "
                f"served: global frames are seen at distances of training, others from each frame, so their keys are "
                f"not those that are chosen and averaged; use chosen_by='place' without memory"
            )

    @property
    def reach(self) -> int:
        """The greatest distance of two frames in the window or in training."""
        return max(self.mechanism.padding, self.mechanism.train_frames - 1)

    @property
    def compresses(self) -> bool:
        """Are there distances beyond those of training?"""
        return bool(self.frequencies) and self.mechanism.top_k > 0 and self.plan.frames - 1 > self.reach

    @property
    def as_alone(self) -> bool:
        return not (self.compresses or (self.joint_text and self.mechanism.top_k > 0))

    def attend_cells(
        self,
        q: Tensor,
        held: HeldKeys,
        grid: TokenGrid,
        scale: float,
        context: Context,
        queries: range | None = None,
    ) -> Tensor:
        if not self.compresses:
            return super().attend_cells(q, held, grid, scale, context, queries)
        cells, parts = grid.height * grid.width, []
        own = self.plan.own if queries is None else queries
        for i, frame in enumerate(own):
            far = self._seen_from(frame, held, cells)
            text = held.others._replace(k=self._turned(held.others.k, frame - self._place(frame)))
            query, one = q[:, :, i * cells : (i + 1) * cells], range(frame, frame + 1)
            seen = held._replace(shared=far, others=text)
            parts.append(super().attend_cells(query, seen, grid, scale, context, one))
        return torch.cat(parts, dim=2)

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
        if not (self.joint_text and self.mechanism.top_k > 0):
            return super().attend_others(q, k, v, grid, mask, scale, held)
        cells, others, seen = grid.height * grid.width, held.others, held.shared
        if self.compresses:
            seen = seen._replace(k=self._shifted(seen.k, [self._place(g) - g for g in held.shared_frames], cells))
        own = add_model_mask(None, [part.mask for part in (others, seen)], slice(None))
        keys, values = (torch.cat(pair, dim=2) for pair in ((others.k, seen.k), (others.v, seen.v)))
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=own, scale=scale)

    def _seen_from(self, frame: int, held: HeldKeys, cells: int) -> Keys:
        """The global keys where `frame` sees them."""
        shared = held.shared
        distances = [g - frame for g in held.shared_frames]
        return shared._replace(k=self._shifted(shared.k, [self.compressed(d) - d for d in distances], cells))

    def compressed(self, distance: int) -> float:
        """The distance at which a global frame is seen."""
        padding, far = self.mechanism.padding, abs(distance)
        if far <= padding:
            return distance
        step = (self.reach - padding) / (self.plan.frames - 1 - padding)
        return math.copysign(padding + (far - padding) * step, distance)

    def _place(self, frame: int) -> float:
        """Where a frame lies for the tokens off the grid."""
        return frame * self.reach / (self.plan.frames - 1)

    def _shifted(self, k: Tensor, frames: list[float], cells: int) -> Tensor:
        """Keys of some frames, each turned on by a number of frames of its own."""
        shift = torch.tensor(frames, dtype=torch.float64, device=k.device).repeat_interleave(cells)
        return self._turned(k, shift[:, None])

    def _turned(self, k: Tensor, frames: float | Tensor) -> Tensor:
        """Keys `(b, h, m, d)` turned on by `frames`, a number or `(m, 1)`."""
        rotary = 2 * len(self.frequencies)
        angles = torch.tensor(self.frequencies, dtype=torch.float64, device=k.device) * frames
        cos, sin = angles.cos().float(), angles.sin().float()
        x, y = k[..., :rotary].float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1).flatten(-2)
        return torch.cat([turned.to(k.dtype), k[..., rotary:]], dim=-1)
