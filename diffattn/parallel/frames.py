"""Clip parallelism: a video model on as many ranks as there are clips, every rank with its own frames.

    plan = FramePlan.split(frames, init_device_mesh("cuda", (ranks,)))
    with apply_on_clips(unet, plan, DualScopeAttention(padding=8, top_k=16)):
        out = unet(latents[:, :, plan.own.start : plan.own.stop], timestep, text).sample    # this rank's frames

Attention along the frames becomes dual-scope attention (`attention.py`), swapped in as by `diffattn.apply`; what else
looks across frames is made to do so across ranks by hooks, listed for each family of models in `CLIP_FAMILIES`.
In mode "clean" the result does not depend on the number of ranks nor on the split, up to rounding. Mode "official" is
what Video-Infinity's code does (https://arxiv.org/abs/2406.16260): each rank's own GroupNorms, convolutions padded
with zeros, attention with `official=True`.

Cost for an inner rank and `e` bytes a number, with S numbers a frame in the keys of all attentions and C in the inputs
of all convolutions: (4 padding + 2 top_k / ranks) S e + 2 C e bytes sent, whatever the length of the video.
"""

import functools
import logging
from contextlib import ExitStack
from typing import Any, Literal

from torch import nn

from ..families import family_of, find_layers
from ..mechanisms.base import Mechanism
from ..mechanisms.dual_scope import DualScopeAttention
from ..swap.apply import Handle, commit
from ..swap.model_swap import ModelSwap
from ..swap.plan import models_of, plan_all, resolve
from .attention import ClipAttention, official_on
from .operations.shares import FramePlan
from .video_models.animatediff import ANIMATEDIFF
from .video_models.clip_family import ClipFamily
from .video_models.cogvideox import COGVIDEOX
from .video_models.unet3d import UNET3D
from .video_models.wan import WAN

logger = logging.getLogger("diffattn")

Mode = Literal["clean", "official"]

CLIP_FAMILIES: list[ClipFamily] = [UNET3D, ANIMATEDIFF, COGVIDEOX, WAN]
"""Models that can be split into clips: one row, in a file of its own, for each family."""


def apply_on_clips(
    target: Any,
    plan: FramePlan,
    mechanism: Mechanism | str = "dual_scope",
    *,
    mode: Mode = "clean",
    **options: Any,
) -> Handle:
    """Make a model compute the clip that `plan` gives this rank; every rank calls it with the same arguments.

    The handle's `restore()`, `diffattn.restore(target)` or the end of a `with` block undo it bit for bit; applying
    anything else to the model does, too. From then on every forward of the model is one of all ranks together.

    Args:
        target: a model, or a pipeline with one; its forward takes and gives this rank's frames. A UNet then takes
            `encoder_hidden_states` of `(batch, frames, tokens, dim)` as well: one prompt for each frame.
        mechanism: a `DualScopeAttention`, or its short name with its fields as `options`. A window over the whole video
            (`padding=plan.frames, top_k=0` without phases) is the model's own attention.
        mode: "clean", or "official" for what the released code does by default. Its attention alone, with exact norms
            and convolutions, is "clean" with `DualScopeAttention(official=True, clips=plan.ranks)`.

    Raises `ValueError` on all ranks, with nothing changed, where model, mechanism or split do not fit, or the ranks
    disagree on them.
    """
    plan.check_group()
    swaps: list[ModelSwap] = []
    error: Exception | None = None
    try:
        swaps = _plan_swaps(target, plan, mechanism, mode, options)
    except (TypeError, ValueError) as wrong:
        error = wrong
    _raise_everywhere(plan, error)
    settings = [f"{type(swap.model).__name__}: {swap.mechanism.to_dict()}" for swap in swaps]
    plan.agree("the split, the mode, the model or the mechanism", (plan.lengths, mode, settings))
    handle = commit(swaps, trained=True)  # its warning is of images; clips have their own
    try:
        for swap in swaps:
            stack = ExitStack()
            swap.on_undo(stack.close)
            clip_family_of(swap.model).attach(swap.model, plan, mode, stack)
    except BaseException:
        handle.restore()
        raise
    for swap in swaps:
        if isinstance(swap.mechanism, ClipAttention) and not swap.mechanism.sees_everything:
            _say_other_video(swap.mechanism.mechanism.padding, swap.mechanism.mechanism.top_k)
    return handle


@functools.cache  # once per window
def _say_other_video(padding: int, top_k: int) -> None:
    logger.warning(
        "frames see %d on either side and %d of the whole video: expect another video than from the model's own "
        "attention, which sees all",
        padding,
        top_k,
    )


def _plan_swaps(
    target: Any, plan: FramePlan, mechanism: Mechanism | str, mode: str, options: dict[str, Any]
) -> list[ModelSwap]:
    resolved = resolve(mechanism, **options)
    if not isinstance(resolved, DualScopeAttention):
        raise TypeError(f"on clips attention along the frames is DualScopeAttention, got {resolved}")
    if mode not in ("clean", "official"):
        raise ValueError(f"mode must be 'clean' or 'official', got {mode!r}")
    model = models_of(target)[0]
    family = clip_family_of(model)
    if mode not in family.modes:
        raise ValueError(
            f"mode={mode!r} is what the released code does with UNet3D, it has no {type(model).__name__}; use 'clean'"
        )
    if mode == "official":
        resolved = official_on(resolved, plan)
    swaps = plan_all(target, family.attention(model, resolved, plan))
    for swap in swaps:
        _check_model(swap)
    return swaps


def _raise_everywhere(plan: FramePlan, error: Exception | None) -> None:
    """Raise on all ranks what one has found, so that none waits for the others."""
    told = plan.gather_objects("" if error is None else str(error))
    if error is not None:
        raise error
    for rank, wrong in enumerate(told):
        if wrong:
            raise ValueError(f"rank {rank}: {wrong}")


def _check_model(swap: ModelSwap) -> None:
    """Raise where an attention layer along the frames would be left with one clip."""
    clip_family_of(swap.model)
    layers = find_layers(swap.family, [*swap.layers, *swap.kept])
    temporal = [name for name, layer in layers.items() if layer.kind == "temporal"] or list(layers)
    left = [name for name in temporal if name not in swap.layers]
    if left:
        raise ValueError(
            f"{len(left)} attention layers along the frames can't be made to work on clips, first {left[0]}: "
            f"{swap.kept[left[0]]}"
        )


def clip_family_of(model: nn.Module) -> ClipFamily:
    """The row of a model, by the names of its class and base classes; others raise `ValueError`."""
    names = {cls.__name__ for cls in type(model).__mro__}
    for family in CLIP_FAMILIES:
        if names & set(family.models):
            return family
    known = ", ".join(name for family in CLIP_FAMILIES for name in family.models)
    raise ValueError(f"{family_of(model).name} can't be split into clips yet; models that can: {known}")
