"""Wan on clips: what of a `WanTransformer3DModel` knows other frames, or the number of its own.

    rope     the phases of the rank's own frames in the whole video
    attn1    dual-scope attention over all tokens (`rotary.py`): (frames, h, w) row-major, rotated by frame, row, column
    attn2    attends to the text, token by token; with a prompt for each frame, frame by frame

All else is per token. Frames are latent frames everywhere: 21 for 81 images, which is Wan's length in training;
`DualScopeAttention(train_frames=21)` says so. Phases exist up to the model's `rope_max_seq_len` (1024).
"""

from contextlib import ExitStack
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from diffattn.mechanisms.base import Mechanism
from diffattn.mechanisms.dual_scope import DualScopeAttention

from ..hooks import attach, before_forward, named_call, own_prompts
from ..operations.shares import FramePlan
from ..rotary import RotaryClipAttention
from .clip_family import ClipFamily, refuse_official


class OffsetRope(ModelHook):  # type: ignore[misc]
    """Rotary embeddings of the rank's own frames: the columns of time from there, those of place as they are."""

    def __init__(self, plan: FramePlan) -> None:
        super().__init__()
        self.plan = plan

    def new_forward(self, module: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        own, forward = self.plan.own, self.fn_ref.original_forward
        frames, rows, columns = hidden_states.shape[-3:]
        self.plan.check(frames)
        empty = hidden_states.new_empty(())
        times = forward(empty.expand(1, 1, own.stop, *module.patch_size[1:]))  # one cell of each frame
        places = forward(empty.expand(1, 1, 1, rows, columns))
        return _joined(times[0][:, own.start :], places[0], module.t_dim), _joined(
            times[1][:, own.start :], places[1], module.t_dim
        )


def _joined(times: Tensor, places: Tensor, time_dim: int) -> Tensor:
    """`(1, frames cells, 1, d)` from tables of `frames` and of `cells` rows."""
    frames, cells = times.shape[1], places.shape[1]
    columns = [times[..., :time_dim].repeat_interleave(cells, dim=1), places[..., time_dim:].repeat(1, frames, 1, 1)]
    return torch.cat(columns, dim=-1)


class TextOfFrames(ModelHook):  # type: ignore[misc]
    """Cross attention to a text for each frame, `(b, frames, tokens, dim)`; one for all goes through as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = named_call(module, args, kwargs)
        text = call["encoder_hidden_states"]
        self.frames = text.shape[1] if text.dim() == 4 else 0
        if not self.frames:
            return args, kwargs
        call["hidden_states"] = call["hidden_states"].unflatten(1, (self.frames, -1)).flatten(0, 1)
        call["encoder_hidden_states"] = text.flatten(0, 1)
        extra = call.pop("kwargs", {})
        return (), {**call, **extra}

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return output.unflatten(0, (-1, self.frames)).flatten(1, 2) if self.frames else output


def wan_attention(model: nn.Module, mechanism: DualScopeAttention, plan: FramePlan) -> Mechanism:
    """Raises `ValueError` where model and split do not fit."""
    refuse_official(mechanism, "Wan")
    config: Any = model.config
    if config.patch_size[0] != 1:
        raise ValueError(
            f"a Wan model on clips needs patches of one latent frame, got patch_size={tuple(config.patch_size)}"
        )
    rope: Any = model.get_submodule("rope")
    if plan.frames > rope.max_seq_len:
        raise ValueError(
            f"the model has rotary embeddings for {rope.max_seq_len} latent frames, got a video of {plan.frames}; "
            f"use a shorter one, or a model with a larger rope_max_seq_len"
        )
    sin, cos = (table[1, : rope.t_dim : 2].double() for table in (rope.freqs_sin, rope.freqs_cos))
    return RotaryClipAttention(mechanism=mechanism, plan=plan, frequencies=tuple(torch.atan2(sin, cos).tolist()))


def attach_wan(model: nn.Module, plan: FramePlan, mode: str, stack: ExitStack) -> None:
    """Hang the hooks on a `WanTransformer3DModel`; `stack` takes them off."""

    def read_prompts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = named_call(module, args, kwargs)
        prompts = own_prompts(call["encoder_hidden_states"], plan)
        if prompts is None:
            return None
        if call["encoder_hidden_states_image"] is not None:
            raise ValueError("a prompt for each frame does not go with a picture's encoder_hidden_states_image")
        return (), {**call, "encoder_hidden_states": prompts}

    before_forward(stack, model, read_prompts)
    attach(stack, model.get_submodule("rope"), OffsetRope(plan))
    for block in model.get_submodule("blocks").children():
        attach(stack, block.get_submodule("attn2"), TextOfFrames())


WAN = ClipFamily(("WanTransformer3DModel",), attach_wan, wan_attention, modes=("clean",))
