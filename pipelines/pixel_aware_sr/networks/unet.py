"""The stock U-Net of Stable Diffusion with pixel-aware cross-attention in its up blocks."""

from typing import Any, Self

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from torch import Tensor

from .paca import Layers, Variant, add_pixel_attention, hand_out
from .signatures import extends

# `from_pretrained` of a pipeline looks in a component's module for the base class that says how to load it.
__all__ = ["ModelMixin", "PASDUNet2DConditionModel"]


class PASDUNet2DConditionModel(UNet2DConditionModel):  # type: ignore[misc]
    """`UNet2DConditionModel` whose up blocks look at the residuals of a ControlNet (PASD, arXiv 2308.14469).

    The configuration is the stock one and `pixel_attention`, "full" or "light". Each residual is added to its skip
    connection, as ever, and is the context of one pixel-aware layer. Without residuals the model is the stock U-Net.

    Cost: attention in each of these layers is quadratic in the number of its tokens, at the finest level for the
    whole latent image; `diffattn.apply` makes it local. The full form adds 248 M weights to the 860 M of SD 1.5 and
    1035 M to the 2567 M of SDXL; the light form adds 29 M to SD 1.5.
    """

    @extends(UNet2DConditionModel, pixel_attention="full")
    def __init__(self, *args: Any, pixel_attention: Variant = "full", **kwargs: Any) -> None:
        """Build it untrained: pixel-aware layers change the image until they are trained or loaded."""
        super().__init__(*args, **kwargs)
        if pixel_attention not in ("full", "light"):
            raise ValueError(f'expected pixel_attention to be "full" or "light"; got {pixel_attention!r}')
        self.register_to_config(pixel_attention=pixel_attention)
        config = self.config
        levels = len(config.block_out_channels)
        heads = _per_level(config.num_attention_heads or config.attention_head_dim, levels)
        depths = _per_level(config.transformer_layers_per_block, levels)
        self._pixel_layers: list[Layers] = [
            add_pixel_attention(
                block,
                pixel_attention,
                heads=heads[-1 - i],
                depth=depths[-1 - i],
                groups=config.norm_num_groups,
                linear=config.use_linear_projection,
                upcast=bool(config.upcast_attention),
            )
            for i, block in enumerate(self.up_blocks)
        ]

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, pixel_attention: Variant = "full") -> Self:
        """A model with the weights of a stock one, shared with it; its pixel-aware layers are untrained."""
        model: Self = cls(**dict(unet.config), pixel_attention=pixel_attention)
        model.load_state_dict(unet.state_dict(), strict=False, assign=True)
        return model.to(unet.device, unet.dtype)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        *args: Any,
        down_block_additional_residuals: tuple[Tensor, ...] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock forward; the residuals, scaled as they are, also reach the pixel-aware layers.

        Raises `ValueError` for residuals of another number than there are skip connections, or without the mid one.
        """
        residuals = down_block_additional_residuals
        if residuals is not None:
            self._check(residuals, mid_block_additional_residual)
        hand_out(self._pixel_layers, residuals)
        try:
            return super().forward(
                sample,
                timestep,
                encoder_hidden_states,
                *args,
                down_block_additional_residuals=residuals,
                mid_block_additional_residual=mid_block_additional_residual,
                **kwargs,
            )
        finally:
            if not torch.is_grad_enabled():  # gradient checkpointing computes the layers again, later
                hand_out(self._pixel_layers, None)

    def _check(self, residuals: tuple[Tensor, ...], mid: Tensor | None) -> None:
        expected = sum(len(layers) for layers in self._pixel_layers)
        if len(residuals) != expected or mid is None:
            raise ValueError(
                f"expected {expected} residuals and the one of the middle; got {len(residuals)} and "
                f"{'none' if mid is None else 'one'} of the middle; does the ControlNet belong to this U-Net?"
            )


def _per_level(value: int | tuple[int, ...], levels: int) -> tuple[int, ...]:
    """A setting of every level, where one number stands for all."""
    return (value,) * levels if isinstance(value, int) else tuple(value)
