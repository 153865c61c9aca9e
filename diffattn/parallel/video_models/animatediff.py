"""AnimateDiff on clips: what of a `UNetMotionModel` looks across frames, or counts them.

    AnimateDiffTransformer3D   its GroupNorm takes the statistics of all frames; its attentions are swapped layers
    pos_embed                  one row of sines for each frame, 32 in most models, added before queries, keys, values

A longer video has no row for its frame 32, so the block adds nothing any more: attention adds the rows that it needs.
Frames are cut into chunks of S, counted from the start of the video whatever the ranks:

    chunk c       frames c S ... c S + S - 1, and as keys those `padding` frames before and after
    positions     0, 1, ... from the first of these keys on; at most S + 2 padding, so S = rows - 2 padding
    global keys   frame g has position floor(g rows / frames)

Projections are linear, W (x + e_p) = W x + W e_p: the rows are projected, and added to the keys of each chunk anew.
A video of at most `rows` frames is one chunk, with the numbers of its frames as positions: the model's own.

Cost beside that of `ClipAttention`: keys and values of (S + 2 padding) / S times the clip are added to and copied.
All else treats a frame as an image. The idea, chunks with positions of their own, is Video-Infinity's author's answer
to a request for AnimateDiff made concrete; its quality has not been measured.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from diffattn.grid import TokenGrid
from diffattn.mechanisms.base import Context, Mechanism
from diffattn.mechanisms.dual_scope import DualScopeAttention
from diffattn.mechanisms.parts.scopes.attention import JoinedKeys, Keys, attend_scopes
from diffattn.swap.model_swap import current

from ..attention import ClipAttention, HeldKeys
from ..hooks import SyncedGroupNorm, attach, before_forward, named_call, own_prompts
from ..operations.shares import FramePlan
from .clip_family import ClipFamily, refuse_official


@dataclass(frozen=True)
class Chunk:
    """Frames whose queries count positions together."""

    queries: range
    keys: range
    """The frames that they see nearby; position 0 is the first of them."""


def chunks(frames: int, padding: int, rows: int) -> Iterator[Chunk]:
    """All chunks of a video of `frames`, where the model has `rows` positions.

    >>> [(chunk.queries, chunk.keys) for chunk in chunks(40, padding=8, rows=32)]
    [(range(0, 16), range(0, 24)), (range(16, 32), range(8, 40)), (range(32, 40), range(24, 40))]
    """
    size = frames if frames <= rows else rows - 2 * padding
    for first in range(0, frames, size):
        queries = range(first, min(first + size, frames))
        yield Chunk(queries, range(max(first - padding, 0), min(queries.stop + padding, frames)))


@dataclass(frozen=True, kw_only=True)
class ChunkedClipAttention(ClipAttention):
    """`ClipAttention` of one layer, which adds the positions itself; `layer` is its diffusers `Attention`."""

    layer: nn.Module = field(repr=False, compare=False)
    table: nn.Module = field(repr=False, compare=False)
    """The block's `pos_embed`."""

    @property
    def as_alone(self) -> bool:
        return False

    def attend_cells(
        self,
        q: Tensor,
        held: HeldKeys,
        grid: TokenGrid,
        scale: float,
        context: Context,
        queries: range | None = None,
    ) -> Tensor:
        own, rows = self.plan.own if queries is None else queries, table_of(self.table).shape[0]
        at_q, at_k, at_v = (self._projected(name) for name in ("to_q", "to_k", "to_v"))
        shared, places = held.shared, self._global_places(held.shared_frames, rows)
        shared = shared._replace(k=shared.k + at_k[:, places], v=shared.v + at_v[:, places])
        outs = []
        for chunk in chunks(self.plan.frames, self.mechanism.padding, rows):
            asking = _overlap(chunk.queries, own)
            if not asking:
                continue
            near = _overlap(chunk.keys, self.local_frames)
            here, there = (_shift(frames, -chunk.keys.start) for frames in (asking, near))
            window = _pick(held.local, _shift(near, -self.local_frames.start))
            outs.append(
                attend_scopes(
                    q[:, :, asking.start - own.start : asking.stop - own.start] + at_q[:, here.start : here.stop],
                    window._replace(
                        k=window.k + at_k[:, there.start : there.stop], v=window.v + at_v[:, there.start : there.stop]
                    ),
                    shared,
                    held.others,
                    self.mechanism.scopes(context),
                    queries=asking,
                    local_frames=near,
                    shared_frames=held.shared_frames,
                    cells=1,
                    scale=scale * self.mechanism.attn_scale,
                    train_frames=self.mechanism.train_frames if self.mechanism.token_num_scale else None,
                )
            )
        return torch.cat(outs, dim=2)

    def _global_places(self, shared: Any, rows: int) -> list[int]:
        frames = self.plan.frames
        return [frame if frames <= rows else frame * rows // frames for frame in shared]

    def _projected(self, name: str) -> Tensor:
        """The rows of positions after one of the layer's projections, without its bias: `(heads, rows, d)`."""
        projection: nn.Module = self.layer.get_submodule(name)
        rows = table_of(self.table)
        heads: Any = self.layer.heads
        with_zero = projection(torch.cat([rows, torch.zeros_like(rows[:1])])[None])[0]
        return (with_zero[:-1] - with_zero[-1:]).unflatten(-1, (heads, -1)).transpose(0, 1)


def table_of(pos_embed: nn.Module) -> Tensor:
    """`(rows, dim)`"""
    return pos_embed.get_buffer("pe")[0]


def _overlap(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _shift(frames: range, by: int) -> range:
    return range(frames.start + by, frames.stop + by)


def _pick(keys: JoinedKeys, places: range) -> Keys:
    """The frames at `places`, copied together."""
    k, v, masks = zip(*keys.frames(list(places), 1), strict=True)
    return Keys(torch.cat(k, 2), torch.cat(v, 2), None if masks[0] is None else torch.cat(masks, -1))


class NoPositions(ModelHook):  # type: ignore[misc]
    """A `pos_embed` that adds nothing: the model keeps it, with its state."""

    def new_forward(self, module: nn.Module, x: Tensor) -> Tensor:
        return x


def animatediff_attention(model: nn.Module, mechanism: DualScopeAttention, plan: FramePlan) -> Mechanism:
    """Raises `ValueError` where model, mechanism and split do not fit."""
    refuse_official(mechanism, "AnimateDiff")
    if mechanism.chosen_by == "content" or mechanism.memory is not None:
        raise ValueError(
            f"on clips of AnimateDiff {'memory' if mechanism.memory is not None else 'chosen_by=content'} can't be "
            f"served: keys get their positions for each chunk of queries anew, so there are none to choose by or to "
            f"average; use chosen_by='place' without memory"
        )
    for name, block in _blocks(model):
        if type(block).__name__ != "BasicTransformerBlock":
            raise ValueError(f"{name} is a {type(block).__name__}; call pipe.disable_free_noise() first")
        rows = table_of(block.get_submodule("pos_embed")).shape[0]
        if plan.frames > rows and 2 * mechanism.padding >= rows:
            raise ValueError(
                f"the model has {rows} positions, so a video of {plan.frames} frames needs a padding of at most "
                f"{(rows - 1) // 2}, got {mechanism.padding}"
            )
        if any(getattr(block.get_submodule(layer), "fused_projections", False) for layer in ("attn1", "attn2")):
            raise ValueError("positions go through the single projections; call unfuse_qkv_projections() first")
    return ClipAttention(mechanism=mechanism, plan=plan)


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The transformer blocks along the frames, by name."""
    for name, module in model.named_modules():
        if type(module).__name__ == "AnimateDiffTransformer3D":
            for number, block in module.get_submodule("transformer_blocks").named_children():
                yield f"{name}.transformer_blocks.{number}", block


def attach_animatediff(model: nn.Module, plan: FramePlan, mode: str, stack: ExitStack) -> None:
    """Hang the hooks on a `UNetMotionModel` and give each layer its positions; `stack` takes the hooks off."""

    def read_prompts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = named_call(module, args, kwargs)
        prompts = own_prompts(call["encoder_hidden_states"], plan)
        return None if prompts is None else ((), {**call, "encoder_hidden_states": prompts.flatten(0, 1)})

    before_forward(stack, model, read_prompts)
    for module in model.modules():
        if type(module).__name__ == "AnimateDiffTransformer3D":
            attach(stack, module.get_submodule("norm"), SyncedGroupNorm(plan))
    swap = current(model)
    assert swap is not None
    for name, block in _blocks(model):
        table = block.get_submodule("pos_embed")
        attach(stack, table, NoPositions())
        for layer in (swap.layers[f"{name}.attn1"], swap.layers[f"{name}.attn2"]):
            assert isinstance(layer.mechanism, ClipAttention)
            layer.mechanism = ChunkedClipAttention(
                mechanism=layer.mechanism.mechanism, plan=plan, layer=layer.module, table=table
            )


ANIMATEDIFF = ClipFamily(("UNetMotionModel",), attach_animatediff, animatediff_attention, modes=("clean",))
