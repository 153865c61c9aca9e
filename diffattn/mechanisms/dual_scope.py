"""Dual-scope attention: each frame of a video sees its neighbours and some frames spread over the whole video.

    out_q = softmax_k(a * scale * q k^T + bias_k) v,    k in { local } + { global } + { text }

    local:  frames at most `padding` from the query's own;                  bias b_local of the phase
    global: `top_k` frames, floor(g * frames / top_k) for g < top_k;        bias b_global of the phase
    memory: with `memory`, the means of what is neither (`parts/scopes/memory.py`); bias b_global of the phase
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

What is not Video-Infinity's, and not in the released code:
- `chosen_by="content"`: the global frames are those that matter to most query frames (`parts/scopes/choice.py`). After
  Mohtashami, Jaggi, Landmark Attention, https://arxiv.org/abs/2305.16300, which trains a token to stand for a block of
  text and lets each query choose; here the mean key stands for a frame, nothing is trained, and all query frames and
  heads of a sample share one choice. A layer along the frames at one place of the image is a sample for each place.
- `rotation`: floor((g + rotation * progress) * frames / top_k) mod frames in place of the global frames, for the share
  `progress` of the schedule that is behind. After the rotating global anchors of Glorian et al., LVSA,
  https://arxiv.org/abs/2605.31057, against the artifacts of a grid that never moves; the speed of it is ours.
- `memory`, `forget`: ours. Behrouz et al., Titans, https://arxiv.org/abs/2501.00663, beside a window of attention learn
  a neural memory while they read, with a decay; here there is nothing to learn, and what left the window counts by
  means of `memory` frames each, with `forget` taken off the logit for every frame of distance.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import register
from ..grid import TokenGrid
from ..kernels.call import attend_others
from ..options import FINITE, POSITIVE, Must, at_least
from .base import Context, Mechanism, Seen, default_scale
from .parts.scopes.attention import Keys, attend_scopes, block_frames, four_axes
from .parts.scopes.choice import choose_frames, landmarks
from .parts.scopes.frames import (
    Phase,
    Scopes,
    count_pairs,
    frames_mask,
    global_frames,
    official_global_frames,
    phase_biases,
)
from .parts.scopes.memory import (
    Means,
    Memory,
    Sums,
    check_one_mask,
    group_sums,
    running_sums,
    runs_of,
    runs_seen,
    weights_of,
)
from .parts.scopes.reference import FrameReference, chosen_frames
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
    chosen_by: Annotated[Literal["place", "content"], Must("'place' or 'content'")] = "place"
    """Which frames are global: evenly spread ones, or those that the query frames weigh most, sample by sample."""
    rotation: Annotated[float, FINITE] = 0.0
    """By how many of their distances the evenly spread frames move on in the course of a run; needs a pipeline."""
    memory: Annotated[int | None, at_least(1)] = None
    """Frames out of sight count by their means over so many; None: not at all."""
    forget: Annotated[float, Must("a number of at least 0", lambda value: value >= 0)] = 0.0
    """With `memory`: taken off the logit of a mean for each frame that it is away from the window."""

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
        self._check_choice()

    def _check_choice(self) -> None:
        """Raise for settings that the released code lacks, and for those that would change nothing."""
        changed = {
            "chosen_by='content'": self.chosen_by == "content",
            f"rotation={self.rotation:g}": self.rotation != 0,
            f"memory={self.memory}": self.memory is not None,
        }
        for option in (name for name, is_set in changed.items() if is_set):
            if self.official:
                raise ValueError(f"dual_scope: the released code has no {option}; leave it or official=True out")
            if self.top_k == 0 and self.memory is None:
                raise ValueError(f"dual_scope: {option} chooses global frames, and top_k=0 has none; leave one out")
        if self.chosen_by == "content" and self.rotation:
            raise ValueError(
                f"dual_scope: rotation={self.rotation:g} moves frames that are chosen by place, but "
                f"chosen_by='content'; leave one of them out"
            )
        if self.forget and self.memory is None:
            raise ValueError(
                f"dual_scope: forget={self.forget:g} is about the means of memory=None; give memory= as well, such as 8"
            )

    @property
    def needs(self) -> frozenset[str]:
        phased = any(phase is not None and phase.t is not None for phase in (self.local_phase, self.global_phase))
        return frozenset(({self.phase_by} if phased else set()) | ({"progress"} if self.rotation else set()))

    @property
    def one_mask(self) -> bool:  # type: ignore[override]
        """A mean is one for all queries."""
        return self.memory is not None

    @property
    def needs_steps(self) -> bool:
        return self.rotation != 0

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

    def global_frames(self, frames: int, context: Context = Context()) -> tuple[int, ...]:
        """The frames that all frames see, where they are chosen by place."""
        if self.official:
            return official_global_frames(frames, self.top_k, self.clips)
        if self.rotation and context.progress is None:
            raise ValueError(
                "dual_scope: its rotation needs the progress of every call, which this one lacks; apply it to a "
                "pipeline, pass context=Context(progress=...), or leave rotation out"
            )
        turn = self.rotation * context.progress if self.rotation and context.progress else 0.0
        return global_frames(frames, self.top_k, distinct=not self.duplicates, turn=turn)

    def chosen_frames(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """The global frames of each sample, `(b, top_k)`, by landmarks of queries and keys, `(b, h, frames, d)`."""
        scale *= self.attn_scale
        return choose_frames(q, k, padding=self.padding, top_k=self.top_k, scale=scale)

    def local_frames(self, frames: int) -> range:
        """The frames in reach of any; the released code adds `padding` frames of zeros at either end."""
        return range(-self.padding, frames + self.padding) if self.official else range(frames)

    def scopes(self, context: Context) -> Scopes:
        """The scopes in the phase of `context`, with biases relative to the larger one, which is the text's."""
        time = context.timestep if self.phase_by == "timestep" else context.sigma
        if self.phase_by in self.needs and time is None:
            raise ValueError(
                f"dual_scope: its phases need the {self.phase_by} of every call, which this one lacks; "
                + ("apply it to a pipeline, " if self.phase_by == "sigma" else "")
                + f"pass context=Context({self.phase_by}=...), or drop the biases: local_phase=None, global_phase=None"
            )
        local, shared = phase_biases(self.local_phase, self.global_phase, time)
        most = max(local, shared) if self.top_k or self.memory is not None else local
        return Scopes(self.padding, local - most, shared - most, self.duplicates or self.official)

    def split_keys(self, k: Tensor, v: Tensor, grid: TokenGrid, mask: Tensor | None) -> tuple[Keys, Keys]:
        """The keys of the frames, and those off the grid."""
        (cells_k, others_k), (cells_v, others_v) = grid.split(k), grid.split(v)
        cells_mask, others_mask = (None, None) if mask is None else grid.split(mask, dim=-1)
        return Keys(cells_k, cells_v, cells_mask), Keys(others_k, others_v, others_mask)

    def remember(self, keys: Keys, grid: TokenGrid, shared: tuple[int, ...] | Tensor) -> Memory | None:
        """The means of all that is out of sight, in a video that is here as a whole."""
        if self.memory is None:
            return None
        frames = range(grid.frames)
        weight = weights_of(frames, shared, keys.mask, grid.height * grid.width, keys.k)
        sums = running_sums(keys.k, keys.v, weight, frames, self.memory)
        whole = group_sums(keys.k, keys.v, weight, frames, self.memory, -(-grid.frames // self.memory))
        return self.means(whole, *sums, held=frames, frames=grid.frames, dtype=keys.k.dtype)

    def means(self, groups: Sums, before: Sums, after: Sums, *, held: range, frames: int, dtype: torch.dtype) -> Memory:
        """From the sums over whole groups, and over the groups of the frames `held` up to each and from each on."""
        assert self.memory is not None
        whole, upto, since = (Means.of(sums, dtype) for sums in (groups, before, after))
        return Memory(whole, upto, since, held, frames, self.memory, self.padding, self.forget)

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
        check_one_mask(mask, self.memory)
        if grid.frames == 1:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        rows, other_rows = (mask, mask) if mask is None or mask.shape[2] == 1 else grid.split(mask)
        asking, _ = grid.split(q)
        scale, size = default_scale(q) if scale is None else scale, grid.height * grid.width
        local, others = self.split_keys(k, v, grid, rows)
        places: tuple[int, ...] | Tensor = ()
        if self.chosen_by == "content" and self.top_k:
            places = self.chosen_frames(landmarks(asking, grid.frames), landmarks(local.k, grid.frames), scale)
            shared = local.pick_by_sample(places, size)
        else:
            places = self.global_frames(grid.frames, context)
            shared = local.pick(places, size)
        cells = attend_scopes(
            asking,
            local.pad(self.padding * size) if self.official else local,
            shared,
            others,
            self.scopes(context),
            queries=range(grid.frames),
            local_frames=self.local_frames(grid.frames),
            shared_frames=places,
            cells=size,
            scale=scale * self.attn_scale,
            train_frames=self.train_frames if self.token_num_scale else None,
            memory=self.remember(local, grid, places),
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
        check_one_mask(mask, self.memory)
        if grid.frames == 1:
            return softmax_reference(q, k, v, scale=scale, mask=mask)
        scale = default_scale(q) if scale is None else scale
        out = softmax_reference(q, k, v, scale=scale, mask=mask)  # what the others see; the cells follow
        factors = scale, self.attn_scale, self.train_frames if self.token_num_scale else None
        local = self.local_frames(grid.frames)
        plain = FrameReference(grid, self.scopes(context), local, *factors, self.memory, self.forget)
        samples = []
        for i in range(len(q)):
            asking, keys, values = (x[i : i + 1] for x in (q, k, v))
            own = mask if mask is None or len(mask) == 1 else mask[i : i + 1]
            shared = self._reference_choice(asking, keys, grid, scale, context)
            frames = [plain.attend(frame, asking, keys, values, own, shared) for frame in range(grid.frames)]
            samples.append(torch.cat(frames, dim=2))
        return torch.cat([out[:, :, : grid.before], torch.cat(samples), out[:, :, grid.before + grid.cells :]], dim=2)

    def _reference_choice(
        self, q: Tensor, k: Tensor, grid: TokenGrid, scale: float, context: Context
    ) -> tuple[int, ...]:
        """The global frames of one sample."""
        if self.chosen_by == "place" or self.top_k == 0:
            return self.global_frames(grid.frames, context)
        return chosen_frames(q, k, grid, padding=self.padding, top_k=self.top_k, scale=scale * self.attn_scale)

    def mask(self, grid: TokenGrid) -> Tensor:
        """Who sees whom, whatever the biases."""
        self.check(grid)
        if grid.frames > 1 and (self.duplicates or self.official):
            raise NotImplementedError("dual_scope: a mask cannot say that a frame is seen twice; use duplicates=False")
        if grid.frames > 1 and (self.memory is not None or self.chosen_by == "content" or self.rotation):
            raise NotImplementedError(
                "dual_scope: no mask over the tokens says what it sees with memory, chosen_by='content' or rotation: "
                "means, or frames that depend on the call; ask seen(q, k, v, grid)"
            )
        return frames_mask(grid, torch.tensor([self.global_frames(grid.frames)], dtype=torch.long), self.padding)[0, 0]

    def seen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        context: Context = Context(),
    ) -> Seen:
        if grid.frames == 1 or not (self.memory is not None or self.chosen_by == "content" or self.rotation):
            return super().seen(q, k, v, grid, scale=scale, context=context)
        if self.duplicates:
            raise NotImplementedError("dual_scope: what is seen twice can't be told; use duplicates=False")
        scale = default_scale(q) if scale is None else scale
        shared = [self._reference_choice(q[i : i + 1], k[i : i + 1], grid, scale, context) for i in range(len(q))]
        keys = frames_mask(grid, torch.tensor(shared, dtype=torch.long), self.padding)
        if self.memory is None:
            nothing = torch.zeros(1, 1, grid.tokens, 0, dtype=torch.bool)
            return Seen(keys, nothing, nothing.new_zeros(1, 1, 0, grid.cells))
        return Seen(keys, *runs_seen(grid, shared, self.memory, self.padding))

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, *, context: Context = Context()) -> int:
        """With `chosen_by="content"` for frames that are in nobody's window, the most that it can be."""
        if grid.frames == 1:
            return 4 * (grid.cells**2 + grid.other_pairs) * heads * head_dim
        pairs = self.frame_pairs(range(grid.frames), grid.frames, context)
        pairs = pairs * (grid.height * grid.width) ** 2 + grid.other_pairs
        return (4 * pairs + self.choice_pairs(grid.frames)) * heads * head_dim

    def frame_pairs(self, queries: range, frames: int, context: Context = Context()) -> int:
        """Pairs of one of the frames `queries` and a frame, or the mean of a run, that it sees."""
        scopes = Scopes(self.padding, duplicates=self.duplicates or self.official)
        by_content = self.chosen_by == "content"
        shared = () if by_content else self.global_frames(frames, context)
        pairs = count_pairs(scopes, self.local_frames(frames), queries, shared)
        for frame in queries:
            near = min(frame + self.padding + 1, frames) - max(frame - self.padding, 0)
            if by_content:
                pairs += min(self.top_k, frames if self.duplicates else frames - near)
            if self.memory is not None:
                pairs += len(runs_of(frame, frames, self.memory, self.padding))
        return pairs

    def choice_pairs(self, frames: int) -> int:
        """Operations of the choice of frames, over heads and their size."""
        return 2 * frames**2 if self.chosen_by == "content" and self.top_k else 0
