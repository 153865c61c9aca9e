"""Dual-scope attention: each frame of a video sees its neighbours and some frames spread over the whole video.

    out_q = softmax_k(a * scale * q k^T + bias_k) v,    k in { local } + { global } + { text }

    local:  frames at most `padding` from the query's own;                  bias b_local of the phase
    global: `top_k` frames, floor(g * frames / top_k) for g < top_k;        bias b_global of the phase
    text:   all tokens off the grid;                                        bias max(b_local, b_global)
    a:      `attn_scale`, times log(n) / log(train_frames) with `token_num_scale` and n frames seen by the query

Early in the denoising the global frames are favoured, to agree on the whole; later the local ones, for smooth motion.
All tokens of a frame share its scopes: one in the temporal layers of a UNet, rows x columns in video transformers. Text
queries see all tokens, as in the model's own attention, without `a` or a bias. One frame alone is exact attention.

Time O(frames * (2 padding + 1 + top_k) * cells^2 * d) for `cells` tokens a frame: linear in the frames. Memory beyond
inputs and output: the keys that one block of frames sees; the backward pass keeps those of all blocks.

Source: Tan et al., Video-Infinity: Distributed Long Video Generation, section on dual-scope attention,
https://arxiv.org/abs/2406.16260; logits scaled by the number of keys: Jin et al., https://arxiv.org/abs/2306.08645.
The paper cuts the video into one clip for each device; here scopes are functions of the whole video, so that clips
change nothing.
Differences from the released code, all undone by `official=True`:
- frames before the first and after the last are masked; the code attends to keys of zeros there;
- a global frame in the local window is seen once, with the larger bias; the code sees it twice (`duplicates=True`);
- global frames are spread evenly whatever `top_k`; the code's choice depends on the number of devices (`clips`) and can
  leave out the end of the video.
The text's bias is ours: the code has no model with text among the frames, where it would drown the text.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import register
from ..grid import TokenGrid
from ..kernels.call import attend_others
from ..options import POSITIVE, Must, at_least
from .base import Context, Mechanism, default_scale
from .parts.scope_attention import Keys, add_model_mask, attend_scopes, block_frames, four_axes
from .parts.scopes import Phase, Scopes, count_pairs, global_frames, official_global_frames, phase_biases
from .softmax import softmax_reference

LATE, EARLY = Phase(800, local_bias=10.0), Phase(800, global_bias=10.0)
"""The released example: favour the local window below t = 800, and the global frames from there on."""

PHASE = Must("None or (t, local_bias, global_bias)")


@register("dual_scope")
@dataclass(frozen=True, kw_only=True)
class DualScopeAttention(Mechanism):
    """Dual-scope attention along the frames of a video; the defaults are those of the released single-prompt example.

    >>> DualScopeAttention(padding=8, top_k=16).flops(TokenGrid(1, 1, frames=288), heads=8, head_dim=40) / 1e6
    11.73504
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"spatial", "temporal"})
    across_frames: ClassVar[bool] = True

    padding: Annotated[int, at_least(0)] = 8
    """Frames of local context on either side; the window has 2 padding + 1."""
    top_k: Annotated[int, at_least(0)] = 16
    """Global frames; 0 for none."""
    local_phase: Annotated[Phase | None, PHASE] = LATE
    """(t, local_bias, global_bias) of the late steps, those below t; None: no bias."""
    global_phase: Annotated[Phase | None, PHASE] = EARLY
    """(t, local_bias, global_bias) of the early steps, those from t on; None: no bias."""
    phase_by: Annotated[Literal["timestep", "sigma"], Must("'timestep' or 'sigma'")] = "timestep"
    """What t is: the timestep as the model gets it (0 ... 1000 in most), or the share of noise, 0 ... 1: sigma in flow
    matching, 1/(1 + sqrt(SNR)) in general. 800 is 0.84 in Stable Diffusion's schedule. Shares need a pipeline."""
    attn_scale: Annotated[float, POSITIVE] = 1.0
    """Multiplies the logits."""
    token_num_scale: bool = False
    """Multiply them by log(frames seen) / log(train_frames) as well; for more than `train_frames` keys."""
    train_frames: Annotated[int, at_least(2)] = 16
    """Frames of a video in the model's training."""
    duplicates: bool = False
    """See a global frame in the local window twice, as a local and as a global one."""
    official: bool = False
    """Compute what the released code does."""
    clips: Annotated[int, at_least(1)] = 1
    """With `official`: on how many devices, each with one clip."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("local_phase", "global_phase"):
            phase = getattr(self, name)
            if self.phase_by == "sigma" and phase is not None and phase.t is not None and not 0 <= phase.t <= 1:
                raise ValueError(
                    f"dual_scope: with phase_by='sigma' the t of {name} is a share of noise between 0 and 1, "
                    f"such as 0.84, got {phase.t!r}"
                )
        if self.clips > 1 and not self.official:
            raise ValueError(
                f"dual_scope: clips={self.clips} changes nothing but the released code's choice of frames; "
                f"leave it out, or add official=True"
            )
        if self.official and self.padding == 0:
            raise ValueError("dual_scope: the released code needs a padding of at least 1; leave official=True out")

    @property
    def needs(self) -> frozenset[str]:
        phases = (self.local_phase, self.global_phase)
        return frozenset({self.phase_by} if any(phase is not None and phase.t is not None for phase in phases) else ())

    def check(self, grid: TokenGrid, *, context: Context = Context()) -> None:
        if not self.official or grid.frames == 1:
            return
        if grid.frames % self.clips:
            raise ValueError(
                f"dual_scope: the released code cuts a video into clips of equal length, but {grid.frames} frames are "
                f"no multiple of clips={self.clips}; use another length, or leave official=True out"
            )
        if self.padding > grid.frames // self.clips:
            raise ValueError(
                f"dual_scope: the released code needs clips of at least padding={self.padding} frames, got "
                f"{grid.frames} frames in clips={self.clips}; use a smaller padding, or leave official=True out"
            )

    def global_frames(self, frames: int) -> tuple[int, ...]:
        """The frames that all frames see."""
        if self.official:
            return official_global_frames(frames, self.top_k, self.clips)
        return global_frames(frames, self.top_k, distinct=not self.duplicates)

    def local_frames(self, frames: int) -> range:
        """The frames in reach of any; the released code adds `padding` frames of zeros at either end."""
        return range(-self.padding, frames + self.padding) if self.official else range(frames)

    def scopes(self, context: Context) -> Scopes:
        """The scopes in the phase of `context`, with biases relative to the larger one, which is the text's."""
        time = context.timestep if self.phase_by == "timestep" else context.sigma
        if self.needs and time is None:
            raise ValueError(
                f"dual_scope: its phases need the {self.phase_by} of every call, which this one lacks; "
                + ("apply it to a pipeline, " if self.phase_by == "sigma" else "")
                + f"pass context=Context({self.phase_by}=...), or drop the biases: local_phase=None, global_phase=None"
            )
        local, shared = phase_biases(self.local_phase, self.global_phase, time)
        most = max(local, shared) if self.top_k else local
        return Scopes(self.padding, local - most, shared - most, self.duplicates or self.official)

    def split_keys(self, k: Tensor, v: Tensor, grid: TokenGrid, mask: Tensor | None) -> tuple[Keys, Keys, Keys]:
        """The local keys, the global ones, and those off the grid."""
        (cells_k, others_k), (cells_v, others_v) = grid.split(k), grid.split(v)
        cells_mask, others_mask = (None, None) if mask is None else grid.split(mask, dim=-1)
        local, cells = Keys(cells_k, cells_v, cells_mask), grid.height * grid.width
        shared = local.pick(self.global_frames(grid.frames), cells)
        if self.official:
            local = local.pad(self.padding * cells)
        return local, shared, Keys(others_k, others_v, others_mask)

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
        mask = four_axes(context.mask, q)
        if grid.frames == 1:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        rows, other_rows = (mask, mask) if mask is None or mask.shape[2] == 1 else grid.split(mask)
        asking, _ = grid.split(q)
        scale = default_scale(q) if scale is None else scale
        cells = attend_scopes(
            asking,
            *self.split_keys(k, v, grid, rows),
            self.scopes(context),
            queries=range(grid.frames),
            local_frames=self.local_frames(grid.frames),
            shared_frames=self.global_frames(grid.frames),
            cells=grid.height * grid.width,
            scale=scale * self.attn_scale,
            train_frames=self.train_frames if self.token_num_scale else None,
        )
        if not grid.others:
            return cells
        return grid.join(cells, attend_others(q, k, v, grid, mask=other_rows, scale=scale))

    def explain_backend(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, backend: str, context: Context) -> str:
        if grid.frames == 1:
            return f"{backend}: one frame alone"
        return f"{backend}: SDPA on {block_frames(grid.frames, grid.height * grid.width)} frames at a time"

    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        context: Context = Context(),
    ) -> Tensor:
        self.check(grid)
        mask = four_axes(context.mask, q)
        if grid.frames == 1:
            return softmax_reference(q, k, v, scale=scale, mask=mask)
        scopes, scale = self.scopes(context), default_scale(q) if scale is None else scale
        size = grid.height * grid.width
        out = softmax_reference(q, k, v, scale=scale, mask=mask)  # what the others see; the cells follow
        for frame in range(grid.frames):
            tokens, bias, factor = self._seen(frame, grid, scopes)
            own = slice(grid.before + frame * size, grid.before + (frame + 1) * size)
            seen_k, seen_v = (F.pad(x, (0, 0, 0, 1))[:, :, tokens] for x in (k, v))  # behind the last token: zeros
            total: Tensor | None = torch.tensor(bias, dtype=q.dtype, device=q.device)
            if mask is not None:
                rows = mask[:, :, own] if mask.shape[2] > 1 else mask
                model = F.pad(rows, (0, 1), value=rows.dtype == torch.bool)[..., tokens]
                total = add_model_mask(total, [model], slice(None))
            cells = softmax_reference(q[:, :, own], seen_k, seen_v, scale=scale * factor, mask=total)
            out = torch.cat([out[:, :, : own.start], cells, out[:, :, own.stop :]], dim=2)
        return out

    def _seen(self, frame: int, grid: TokenGrid, scopes: Scopes) -> tuple[list[int], list[float], float]:
        """Tokens that one frame sees (`grid.tokens` for a key of zeros), their biases, and the factor of the logits."""
        shared = self.global_frames(grid.frames)
        near = [other for other in self.local_frames(grid.frames) if scopes.near(frame, other)]
        far = list(shared)
        if not scopes.duplicates:
            near = [other for other in near if not (scopes.global_first and other in shared)]
            far = [other for other in shared if scopes.global_first or not scopes.near(frame, other)]
        tokens: list[int] = []
        bias: list[float] = []
        size = grid.height * grid.width
        for other, of_scope in [(f, scopes.local_bias) for f in near] + [(f, scopes.global_bias) for f in far]:
            start = grid.before + other * size
            tokens += range(start, start + size) if 0 <= other < grid.frames else [grid.tokens] * size
            bias += [of_scope] * size
        tokens += [*range(grid.before), *range(grid.before + grid.cells, grid.tokens)]
        factor = self.attn_scale
        if self.token_num_scale:
            factor *= math.log(len(near) + len(far)) / math.log(self.train_frames)
        return tokens, bias + [0.0] * grid.others, factor

    def mask(self, grid: TokenGrid) -> Tensor:
        """Who sees whom, whatever the biases."""
        self.check(grid)
        if grid.frames > 1 and (self.duplicates or self.official):
            raise NotImplementedError("dual_scope: a mask cannot say that a frame is seen twice; use duplicates=False")
        frame = torch.arange(grid.frames)
        seen = (frame[:, None] - frame).abs() <= self.padding
        seen[:, list(self.global_frames(grid.frames))] = True
        size = grid.height * grid.width
        mask = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
        mask[grid.cell_slice, grid.cell_slice] = seen.repeat_interleave(size, 0).repeat_interleave(size, 1)
        return mask

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, *, context: Context = Context()) -> int:
        shared = self.global_frames(grid.frames)
        scopes = Scopes(self.padding, duplicates=self.duplicates or self.official)
        pairs = count_pairs(scopes, self.local_frames(grid.frames), grid.frames, shared) if grid.frames > 1 else 1
        pairs = pairs * (grid.height * grid.width) ** 2 + grid.other_pairs
        return 4 * pairs * heads * head_dim
