"""The control branch of STAR: the U-Net's encoder and middle once more, told of the low-resolution clip.

    h = transformer_in(conv_in(x_t) + hint(z_lr))        then the blocks down and the middle, as in the U-Net
    residual_k = zero_conv_k(h_k)                        one for each skip connection, one for the middle

The hint and the zero convolutions start at 0: an untrained branch changes nothing.
"""

import functools
import inspect
from typing import Any, Self

import torch
from diffattn.pipelines.video_sr.liem import add_liem
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_3d_blocks import UNetMidBlock3DCrossAttn, get_down_block
from torch import Tensor, nn

from .unet import DOWNSAMPLE_PADDING, STARUNet3DConditionModel, check_latents, first_transformer

# `from_pretrained` of a pipeline looks in a component's module for the base class that says how to load it.
__all__ = ["ModelMixin", "STARControlNetModel"]


class STARControlNetModel(ModelMixin, AttentionMixin, ConfigMixin):  # type: ignore[misc]
    """Residuals for `STARUNet3DConditionModel` from the noisy latents and those of the low-resolution clip.

    The configuration is the U-Net's, without its decoder's settings, and `conditioning_channels`, those of the hint.

    Source: Xie et al., STAR, https://arxiv.org/abs/2501.02976, after Zhang et al., https://arxiv.org/abs/2302.05543.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ("norm", "time_embedding")

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        conditioning_channels: int = 4,
        down_block_types: tuple[str, ...] = ("CrossAttnDownBlock3D",) * 3 + ("DownBlock3D",),
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 1024,
        attention_head_dim: int = 64,
        liem: bool = True,
        transformer_in_heads: int = 8,
    ) -> None:
        """Build it untrained."""
        super().__init__()
        first = block_out_channels[0]
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.controlnet_cond_embedding = _zeroed(nn.Conv2d(conditioning_channels, first, 3, padding=1))
        self.time_proj = Timesteps(first, True, 0)
        self.time_embedding = TimestepEmbedding(first, 4 * first, act_fn=act_fn)
        self.transformer_in = first_transformer(self.config)
        self.down_blocks, self.mid_block = _encoder(self.config)
        self.controlnet_down_blocks = nn.ModuleList(_zeroed(nn.Conv2d(c, c, 1)) for c in _skip_widths(self.config))
        self.controlnet_mid_block = _zeroed(nn.Conv2d(block_out_channels[-1], block_out_channels[-1], 1))
        if liem:
            add_liem(self)
        self.gradient_checkpointing = False

    @classmethod
    def from_unet(cls, unet: STARUNet3DConditionModel, conditioning_channels: int = 4) -> Self:
        """An untrained branch: copies of the U-Net's encoder and middle, zeros elsewhere."""
        wanted = inspect.signature(cls.__init__).parameters.keys() & unet.config.keys()
        model = cls(**{key: unet.config[key] for key in wanted}, conditioning_channels=conditioning_channels)
        own = model.state_dict().keys()
        model.load_state_dict({k: tensor for k, tensor in unet.state_dict().items() if k in own}, strict=False)
        return model.to(unet.device, unet.dtype)

    @property
    def downsamplings(self) -> int:
        """How often rows and columns are halved."""
        return len(self.config.block_out_channels) - 1

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        return_dict: bool = True,
    ) -> Any:
        """Residuals ((b frames, c, rows, columns), ..) of the skip connections, and that of the middle.

        Args:
            sample: x_t, (b, 4, frames, rows, columns) of a legal size.
            timestep: one for all, or (b,).
            encoder_hidden_states: text, (b, tokens, width).
            controlnet_cond: latents of the low-resolution clip, scaled as x_0, of the shape of `sample`.
            conditioning_scale: factor of every residual.
            return_dict: a `ControlNetOutput` instead of a tuple.

        Raises `ValueError` for another shape or size.
        """
        self._check(sample, controlnet_cond)
        b, _, frames = sample.shape[:3]
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(b)
        emb = self.time_embedding(self.time_proj(timesteps).to(self.dtype)).repeat_interleave(frames, dim=0)
        text = encoder_hidden_states.repeat_interleave(frames, dim=0)
        hidden = self.conv_in(_frames(sample)) + self.controlnet_cond_embedding(_frames(controlnet_cond))
        hidden = self.transformer_in(hidden, num_frames=frames, return_dict=False)[0]
        skips, hidden = self._encode(hidden, emb, text, frames)
        down = tuple(
            convolution(skip) * conditioning_scale
            for convolution, skip in zip(self.controlnet_down_blocks, skips, strict=True)
        )
        mid = self.controlnet_mid_block(hidden) * conditioning_scale
        return ControlNetOutput(down, mid) if return_dict else (down, mid)

    def _check(self, sample: Tensor, hint: Tensor) -> None:
        check_latents("latents", sample, self.config.in_channels, self.downsamplings)
        wanted = (len(sample), self.config.conditioning_channels, *sample.shape[2:])
        if hint.shape != wanted:
            raise ValueError(
                f"expected a controlnet_cond of the shape {wanted}, as the latents; got {tuple(hint.shape)}; encode "
                "the clip at the final size"
            )

    def _encode(self, hidden: Tensor, emb: Tensor, text: Tensor, frames: int) -> tuple[list[Tensor], Tensor]:
        """What enters the skip connections, and the output of the middle."""
        skips = [hidden]
        for block in self.down_blocks:
            context = {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}
            hidden, found = self._call(functools.partial(block, num_frames=frames, **context), hidden, emb)
            skips += found
        middle = functools.partial(self.mid_block, encoder_hidden_states=text, num_frames=frames)
        return skips, self._call(middle, hidden, emb)

    def _call(self, block: Any, *args: Tensor) -> Any:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)


def _frames(latents: Tensor) -> Tensor:
    """(b, c, frames, rows, columns) -> (b frames, c, rows, columns)."""
    return latents.transpose(1, 2).flatten(0, 1)


def _zeroed(convolution: nn.Conv2d) -> nn.Conv2d:
    for parameter in convolution.parameters():
        nn.init.zeros_(parameter)
    return convolution


def _skip_widths(config: Any) -> list[int]:
    """Channels of what enters each skip connection: the first one, each layer's, and what is halved."""
    *upper, last = config.block_out_channels
    n = config.layers_per_block
    return [config.block_out_channels[0], *(c for c in upper for _ in range(n + 1)), *[last] * n]


def _encoder(config: Any) -> tuple[nn.ModuleList, UNetMidBlock3DCrossAttn]:
    """The stock blocks down and the stock middle, built as the U-Net's."""
    widths = config.block_out_channels
    common = {
        "temb_channels": 4 * widths[0],
        "resnet_eps": config.norm_eps,
        "resnet_act_fn": config.act_fn,
        "resnet_groups": config.norm_num_groups,
        "cross_attention_dim": config.cross_attention_dim,
        "num_attention_heads": config.attention_head_dim,  # the 3D blocks take the width of a head for their number
    }
    down = nn.ModuleList(
        get_down_block(
            kind,
            num_layers=config.layers_per_block,
            in_channels=widths[max(i - 1, 0)],
            out_channels=widths[i],
            add_downsample=i < len(widths) - 1,
            downsample_padding=DOWNSAMPLE_PADDING,
            **common,
        )
        for i, kind in enumerate(config.down_block_types)
    )
    scale = config.mid_block_scale_factor
    return down, UNetMidBlock3DCrossAttn(in_channels=widths[-1], output_scale_factor=scale, **common)
