"""What a family of models needs to work on clips: one row, `ClipFamily`, in a file of its own.

Attention is found and swapped by the family's row in `diffattn.families`. A row here adds what else looks across
frames, as hooks (`hooks.py`), and what knows a frame's number: on clips it has to be the one in the whole video.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from torch import nn

from diffattn.mechanisms.base import Mechanism
from diffattn.mechanisms.dual_scope import DualScopeAttention

from ..attention import ClipAttention
from ..operations.shares import FramePlan

Attach = Callable[[nn.Module, FramePlan, str, ExitStack], None]
"""(model, plan, mode, stack): make the model's modules work on clips, and leave on the stack what undoes it."""

MakeAttention = Callable[[nn.Module, DualScopeAttention, FramePlan], Mechanism]
"""(model, mechanism, plan) -> what its attention layers along the frames compute."""


def clip_attention(model: nn.Module, mechanism: DualScopeAttention, plan: FramePlan) -> Mechanism:
    """A token for each frame, or for each frame and place, and nothing in attention that knows a frame's number."""
    return ClipAttention(mechanism=mechanism, plan=plan)


def refuse_official(mechanism: DualScopeAttention, name: str) -> None:
    """Raise `ValueError` for a mechanism that computes what the released code does, which knows UNet3D alone."""
    if mechanism.official:
        raise ValueError(f"official=True is what the released code does with UNet3D, it has no {name}; leave it out")


@dataclass(frozen=True)
class ClipFamily:
    """One row."""

    models: tuple[str, ...]
    """Class names of the models, subclasses included."""
    attach: Attach
    attention: MakeAttention = clip_attention
    """Raises `ValueError` where model, mechanism and split do not fit; nothing has been changed by then."""
    modes: tuple[str, ...] = ("clean", "official")
    """Those of `apply_on_clips` that it knows."""
