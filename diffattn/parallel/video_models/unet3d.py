"""UNet3D (ModelScope, Zeroscope, VideoCrafter2) on clips: which of its modules look across frames.

    TransformerTemporalModel   its GroupNorm takes the statistics of all frames; its attentions are swapped layers
    TemporalConvLayer          four times GroupNorm, SiLU, Conv3d with a kernel of 3 frames

All else treats a frame as an image. No module knows the number of a frame, so nothing needs positions.
"""

from contextlib import ExitStack

from torch import nn

from ..hooks import FramePrompts, HaloConv, PaddedConvLayer, SyncedGroupNorm, attach, before_forward
from ..operations.shares import FramePlan
from .clip_family import ClipFamily


def attach_unet3d(model: nn.Module, plan: FramePlan, mode: str, stack: ExitStack) -> None:
    """Hang the hooks of mode "clean" or "official" on a `UNet3DConditionModel`; `stack` takes them off."""
    prompts = FramePrompts(plan)
    before_forward(stack, model, prompts.read)
    for module in model.modules():
        name = type(module).__name__
        if name == "Transformer2DModel":
            before_forward(stack, module, prompts.write)
        elif name == "TransformerTemporalModel" and mode == "clean":
            attach(stack, module.get_submodule("norm"), SyncedGroupNorm(plan))
        elif name == "TemporalConvLayer" and mode == "clean":
            _attach_conv_layer(module, plan, stack)
        elif name == "TemporalConvLayer":
            attach(stack, module, PaddedConvLayer(plan))


def _attach_conv_layer(layer: nn.Module, plan: FramePlan, stack: ExitStack) -> None:
    for module in layer.modules():
        if isinstance(module, nn.GroupNorm):
            attach(stack, module, SyncedGroupNorm(plan))
        elif isinstance(module, nn.Conv3d):
            attach(stack, module, HaloConv(plan, halo=(module.kernel_size[0] - 1) // 2 * module.dilation[0]))


UNET3D = ClipFamily(("UNet3DConditionModel",), attach_unet3d)
