"""The denoising U-Net of X-Portrait: that of AnimateDiff, with two differences in its motion modules.

group norm of a motion module   over the channels of a group and the pixels of one frame; AnimateDiff's joins frames
last layer of an up block       upsampler, then motion module; AnimateDiff's the other way round
"""

import functools
from typing import Any

import torch
from diffusers import ModelMixin, UNetMotionModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn

# `from_pretrained` of a pipeline looks in a component's module for the base class that says how to load it.
__all__ = ["FrameGroupNorm", "ModelMixin", "MotionUpBlock", "XPortraitUNet"]


class FrameGroupNorm(nn.GroupNorm):
    """Group norm of each frame by itself."""

    def forward(self, video: Tensor) -> Tensor:
        """(batch, channels, frames, rows, columns) -> the same shape."""
        frames = video.transpose(1, 2)
        return super().forward(frames.flatten(0, 1)).view_as(frames).transpose(1, 2)


class MotionUpBlock(nn.Module):
    """An up block whose last motion module comes after the upsampler, at twice the resolution.

    It takes over the modules of a stock block, and with them the names of their weights.
    """

    def __init__(self, stock: Any) -> None:
        """`stock` is a `CrossAttnUpBlockMotion` or an `UpBlockMotion`."""
        super().__init__()
        self.has_cross_attention = hasattr(stock, "attentions")
        if self.has_cross_attention:
            self.attentions: nn.ModuleList = stock.attentions
        self.resnets: nn.ModuleList = stock.resnets
        self.motion_modules: nn.ModuleList = stock.motion_modules
        self.upsamplers: nn.ModuleList = stock.upsamplers or nn.ModuleList()

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        upsample_size: Any = None,
        num_frames: int = 1,
        **text: Any,
    ) -> Tensor:
        """As the stock block: frames lie in the batch, and `text` is what its spatial transformers take."""
        last = len(self.resnets) - 1
        for i, skip in enumerate(reversed(res_hidden_states_tuple)):
            hidden_states = self.resnets[i](torch.cat([hidden_states, skip], dim=1), temb)
            if self.has_cross_attention:
                hidden_states = self.attentions[i](hidden_states, return_dict=False, **text)[0]
            for upsampler in self.upsamplers if i == last else ():
                hidden_states = upsampler(hidden_states, upsample_size)
            hidden_states = self.motion_modules[i](hidden_states, num_frames=num_frames)
        return hidden_states


class XPortraitUNet(UNetMotionModel):  # type: ignore[misc]
    """`UNetMotionModel` with X-Portrait's motion modules; settings and names of weights are the stock ones.

    X-Portrait's own settings are those of `components.unet_config`. Computes epsilon (batch, 4, frames, rows, columns)
    from noisy latents of that shape; `encoder_hidden_states` is (batch frames, tokens, width). At most
    `motion_max_seq_length` frames have a position.

    Source: Xie et al., X-Portrait, https://arxiv.org/abs/2403.15931; the placement and the norm are those of the
    released code.
    """

    # diffusers reads the signature for the configuration
    @functools.wraps(UNetMotionModel.__init__, assigned=())  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build it untrained."""
        super().__init__(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, AnimateDiffTransformer3D):
                norm = module.norm
                module.norm = FrameGroupNorm(norm.num_groups, norm.num_channels, norm.eps)
        for i, block in enumerate(self.up_blocks):
            self.up_blocks[i] = MotionUpBlock(block)
