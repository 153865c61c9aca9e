"""Hooks that make modules of a model work on clips, each undone bit by bit: what families of models are built from.

`attach` puts one on a module and its removal on a stack. Modules keep their class, parameters and names.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from ..families import arguments
from .operations.conv import LAYER_HALO, crop_frames
from .operations.group_norm import distributed_group_norm
from .operations.halo import halo_exchange, pad_frames
from .operations.shares import FramePlan

NAME = "diffattn_clips"
"""Under which diffusers' registry knows our hooks; a module has one of them."""


def attach(stack: ExitStack, module: nn.Module, hook: ModelHook) -> None:
    """Hang `hook` on `module` until `stack` closes."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(hook, NAME)
    stack.callback(_detach, module, registry)


def _detach(module: nn.Module, registry: Any) -> None:
    registry.remove_hook(NAME, recurse=False)
    if not registry.hooks:
        # as before: the class's own forward, and no registry
        del module._diffusers_hook
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del module.forward


def before_forward(stack: ExitStack, module: nn.Module, hook: Callable[..., Any]) -> None:
    """Run `hook(module, args, kwargs) -> (args, kwargs)` before every forward until `stack` closes.

    A hook of torch: on whole models, where `maybe_free_model_hooks` of a pipeline drops those of diffusers.
    """
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    stack.callback(handle.remove)


def named_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one forward by name, to be changed and passed on."""
    return {name: value for name, value in arguments(module, args, kwargs).items() if name != "self"}


class SyncedGroupNorm(ModelHook):  # type: ignore[misc]
    """GroupNorm with the statistics of the whole video; frames on axis `dim`."""

    def __init__(self, plan: FramePlan, dim: int = 2) -> None:
        super().__init__()
        self.plan, self.dim = plan, dim

    def new_forward(self, module: Any, x: Tensor) -> Tensor:
        return distributed_group_norm(x, module.num_groups, module.weight, module.bias, module.eps, self.plan, self.dim)


class HaloConv(ModelHook):  # type: ignore[misc]
    """A convolution that gets the neighbouring frames it reaches; frames on axis `dim`, and with stride 1."""

    def __init__(self, plan: FramePlan, halo: int = 1, dim: int = 2) -> None:
        super().__init__()
        self.plan, self.halo, self.dim = plan, halo, dim

    def pre_forward(self, module: nn.Module, x: Tensor) -> tuple[tuple[Tensor], dict[str, Any]]:
        return (halo_exchange(x, self.halo, self.halo, self.dim, self.plan, "conv")[0],), {}

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return crop_frames(output, self.plan.window(self.halo, self.halo), self.dim, self.plan)


class PaddedConvLayer(ModelHook):  # type: ignore[misc]
    """A `TemporalConvLayer` as the released code computes it: `diffattn.parallel.operations.conv.padded_layer`."""

    def __init__(self, plan: FramePlan, halo: int = LAYER_HALO) -> None:
        super().__init__()
        self.plan, self.halo = plan, halo
        self.wanted = range(plan.own.start - halo, plan.own.stop + halo)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[()], dict[str, Any]]:
        call = named_call(module, args, kwargs)
        clip = call["hidden_states"].unflatten(0, (-1, call["num_frames"]))  # b f c h w
        window, frames = halo_exchange(clip, self.halo, self.halo, 1, self.plan, "conv")
        padded = pad_frames(window, frames, self.wanted, 1)
        return (), {"hidden_states": padded.flatten(0, 1), "num_frames": len(self.wanted)}

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return crop_frames(output.unflatten(0, (-1, len(self.wanted))), self.wanted, 1, self.plan).flatten(0, 1)


def own_prompts(text: Tensor | None, plan: FramePlan) -> Tensor | None:
    """The prompts of this rank's frames out of `(batch, frames, tokens, dim)`, theirs or the whole video's.

    None where there is one prompt for all frames, or none.
    """
    if text is None or text.dim() != 4:
        return None
    if text.shape[1] == plan.frames:
        text = text[:, plan.own.start : plan.own.stop]
    if text.shape[1] != plan.length:
        raise ValueError(
            f"encoder_hidden_states of (batch, frames, tokens, dim) needs a prompt for each of this rank's "
            f"{plan.length} frames, or of the video's {plan.frames}, got {tuple(text.shape)}"
        )
    return text


class FramePrompts:
    """Lets a UNet take a prompt for each frame: `encoder_hidden_states` of `(batch, frames, tokens, dim)`.

    The frames are those of this rank, or of the whole video. The model repeats one prompt for all frames itself, so it
    gets the first, and its layers the rest: `read` goes before the model's forward, `write` before the layers'.
    """

    def __init__(self, plan: FramePlan) -> None:
        self.plan = plan
        self.prompts: Tensor | None = None

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take the prompts out of the call of the model."""
        call = named_call(module, args, kwargs)
        self.prompts = None
        prompts = own_prompts(call["encoder_hidden_states"], self.plan)
        if prompts is None:
            return None
        self.prompts = prompts.flatten(0, 1)
        call["encoder_hidden_states"] = prompts[:, 0]
        return (), call

    def write(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Put them into the call of a layer."""
        if self.prompts is None:
            return None
        return (), {**named_call(module, args, kwargs), "encoder_hidden_states": self.prompts}
