"""CogVideoX on clips: what of a `CogVideoXTransformer3DModel` knows other frames, or the number of its own.

    attn1              joint attention, text, then (frames, h, w) row-major: dual-scope with `joint_text` (`rotary.py`)
    image_rotary_emb   tables of the rank's own frames in the whole video (CogVideoX-5b, 1.5)
    patch_embed        adds sines of the frame's number, or learned rows, in CogVideoX-2b and the 5b-I2V

Text queries see text and the global frames alone, so every rank goes on with the same text; with `top_k=0` they see all
frames, as in the model, and ranks merge their shares. All else is per token.

A call's `image_rotary_emb` may have rows for the whole video, of which the rank takes its own; or for its clip, as the
pipelines make them, whose columns of time are then made anew for the numbers of its frames (`get_3d_rotary_pos_embed`
of diffusers: a quarter of the head's numbers, one step a frame, theta 10000).

CogVideoX-1.5 takes two latent frames as one patch: clips have even lengths, and `padding`, `top_k` and `train_frames`
count patches. Latents are 13 frames in training, 11 patches in 1.5; `train_frames` says so. Distances beyond it are
compressed for rotary models; sines added to the input can't be, and a longer video goes beyond those of training there.
"""

from contextlib import ExitStack
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn

from diffattn.mechanisms.base import Mechanism
from diffattn.mechanisms.dual_scope import DualScopeAttention

from ..hooks import attach, before_forward, named_call
from ..operations.shares import FramePlan
from ..rotary import RotaryClipAttention
from .clip_family import ClipFamily, refuse_official

THETA = 10000.0
Tables = tuple[Tensor, Tensor]


class OffsetTables:
    """A pre-forward hook on the model that gives it the rotary tables of this rank's frames."""

    def __init__(self, plan: FramePlan) -> None:
        self.plan = plan

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = named_call(module, args, kwargs)
        config: Any = module.config
        self.plan.check(call["hidden_states"].shape[1] // (config.patch_size_t or 1))
        if call["image_rotary_emb"] is None:
            if config.use_rotary_positional_embeddings:
                raise ValueError("this model needs image_rotary_emb, of the whole video or of this rank's frames")
            return None
        height, width = call["hidden_states"].shape[-2:]
        cells = (height // config.patch_size) * (width // config.patch_size)
        return (), {**call, "image_rotary_emb": self._own(call["image_rotary_emb"], cells)}

    def _own(self, tables: Tables, cells: int) -> Tables:
        rows, own = len(tables[0]), self.plan.own
        if rows == self.plan.frames * cells:
            cos, sin = (table[own.start * cells : own.stop * cells] for table in tables)
            return cos, sin
        if rows != self.plan.length * cells:
            raise ValueError(
                f"image_rotary_emb needs a row for each of {cells} places in this rank's {self.plan.length} frames, or "
                f"in the video's {self.plan.frames}, got {rows} rows"
            )
        times = get_1d_rotary_pos_embed(time_dim(tables[0].shape[-1]), torch.arange(own.start, own.stop), THETA, True)
        cos, sin = (
            torch.cat([time.to(table).repeat_interleave(cells, 0), table[:, time.shape[1] :]], dim=1)
            for time, table in zip(times, tables, strict=True)
        )
        return cos, sin


def time_dim(head_dim: int) -> int:
    """Numbers at the start of a head that are rotated by the frame."""
    return head_dim // 4


class OffsetPositions(ModelHook):  # type: ignore[misc]
    """A `patch_embed` that adds the positions of this rank's frames in the whole video."""

    def __init__(self, plan: FramePlan) -> None:
        super().__init__()
        self.plan = plan
        self._rows: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}

    def new_forward(self, module: Any, text_embeds: Tensor, image_embeds: Tensor) -> Tensor:
        height, width = image_embeds.shape[-2:]
        if module.use_learned_positional_embeddings and (height, width) != (module.sample_height, module.sample_width):
            raise ValueError(
                f"learned positions are for latents of {module.sample_height} x {module.sample_width}, got "
                f"{height} x {width}"
            )
        embeds = self._without_positions(module, text_embeds, image_embeds)
        key = (height, width, embeds.dtype, embeds.device)
        if key not in self._rows:
            self._rows = {key: self._own_rows(module, height, width).to(embeds)}
        text = text_embeds.shape[1]
        return torch.cat([embeds[:, :text], embeds[:, text:] + self._rows[key]], dim=1)

    def _without_positions(self, module: Any, text_embeds: Tensor, image_embeds: Tensor) -> Tensor:
        names = ("use_positional_embeddings", "use_learned_positional_embeddings")
        former = {name: getattr(module, name) for name in names}
        try:
            for name in names:
                setattr(module, name, False)
            embeds: Tensor = self.fn_ref.original_forward(text_embeds, image_embeds)
        finally:
            for name, value in former.items():
                setattr(module, name, value)
        return embeds

    def _own_rows(self, module: Any, height: int, width: int) -> Tensor:
        """`(1, frames h w, dim)`: as in the model, the kept ones where the whole video has their size."""
        pictures = (self.plan.frames - 1) * module.temporal_compression_ratio + 1
        sizes = (module.sample_height, module.sample_width, module.sample_frames)
        kept = (height, width, pictures) == sizes
        device = module.pos_embedding.device
        rows = module.pos_embedding if kept else module._get_positional_embeddings(height, width, pictures, device)
        own, cells = self.plan.own, (height // module.patch_size) * (width // module.patch_size)
        first = module.max_text_seq_length
        return rows[:, first + own.start * cells : first + own.stop * cells]


def _patches(model: nn.Module, plan: FramePlan) -> FramePlan:
    config: Any = model.config
    return plan.coarser(config.patch_size_t or 1)


def _adds_positions(model: nn.Module) -> bool:
    embed: Any = model.get_submodule("patch_embed")
    return bool(embed.use_positional_embeddings or embed.use_learned_positional_embeddings)


def cogvideox_attention(model: nn.Module, mechanism: DualScopeAttention, plan: FramePlan) -> Mechanism:
    """Raises `ValueError` where model, mechanism and split do not fit."""
    refuse_official(mechanism, "CogVideoX")
    config: Any = model.config
    patches = _patches(model, plan)
    if (config.patch_size_t or 1) > 1 and _adds_positions(model):
        raise ValueError(f"patch_size_t={config.patch_size_t} goes with rotary embeddings alone, as in CogVideoX-1.5")
    frequencies: tuple[float, ...] = ()
    if config.use_rotary_positional_embeddings:
        dim = time_dim(config.attention_head_dim)
        frequencies = tuple(THETA ** (-i / dim) for i in range(0, dim, 2))
    return RotaryClipAttention(mechanism=mechanism, plan=patches, frequencies=frequencies, joint_text=True)


def attach_cogvideox(model: nn.Module, plan: FramePlan, mode: str, stack: ExitStack) -> None:
    """Hang the hooks on a `CogVideoXTransformer3DModel`; `stack` takes them off."""
    before_forward(stack, model, OffsetTables(_patches(model, plan)))
    if _adds_positions(model):
        attach(stack, model.get_submodule("patch_embed"), OffsetPositions(plan))


COGVIDEOX = ClipFamily(("CogVideoXTransformer3DModel",), attach_cogvideox, cogvideox_attention, modes=("clean",))
