"""The ControlNet of PASD: a stock one that first removes the degradation of the image it is conditioned on."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from diffusers import ControlNetModel, ModelMixin, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding, ControlNetOutput
from torch import Tensor, nn
from torch.nn import functional

from .signatures import extends

# `from_pretrained` of a pipeline looks in a component's module for the base class that says how to load it.
__all__ = ["ModelMixin", "PASDControlNetModel"]

FOREGROUND_SCALE, BACKGROUND_SCALE = 1.5, 0.6


class DegradationRemoval(ControlNetConditioningEmbedding):  # type: ignore[misc]
    """Condition encoder that is trained to predict the clean image at 1/2, 1/4 and 1/8 of its size.

    A stock encoder, with RRDB blocks after its first convolution where `rrdb_blocks` > 0, and a convolution to RGB
    after each that halves the size (PASD, section 3.2 of https://arxiv.org/abs/2308.14469).
    """

    def __init__(
        self,
        channels: int,
        conditioning_channels: int = 3,
        block_out_channels: Sequence[int] = (16, 32, 96, 256),
        rrdb_blocks: int = 0,
        rgbs: bool = True,
    ) -> None:
        """`channels` is the width of the ControlNet's first level."""
        super().__init__(channels, conditioning_channels, tuple(block_out_channels))
        width = block_out_channels[0]
        if rrdb_blocks:
            self.preprocesser = nn.Sequential(*(RRDB(width, width) for _ in range(rrdb_blocks)))
        if rgbs:
            self.to_rgbs = nn.ModuleList(nn.Conv2d(width, 3, 3, padding=1) for width in block_out_channels[1:])

    def forward(self, conditioning: Tensor) -> Tensor:
        """(batch, 3, rows, columns) in 0..1 -> (batch, channels, rows / 8, columns / 8); what is encoded stays."""
        if conditioning.shape[1] == self.conv_out.out_channels:
            return conditioning
        return self.conv_out(self.features(conditioning)[-1])

    def features(self, conditioning: Tensor) -> list[Tensor]:
        """Features at each size, the finest first: one after each convolution that halves the size."""
        hidden = functional.silu(self.conv_in(conditioning))
        if hasattr(self, "preprocesser"):
            hidden = self.preprocesser(hidden)
        found = []
        for block in self.blocks:
            hidden = functional.silu(block(hidden))
            if block.stride[0] == 2:
                found.append(hidden)
        return found

    def rgbs(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The clean image in -1..1 that each of the `features` predicts, (batch, 3, rows, columns) of its size."""
        return [convolution(hidden) for convolution, hidden in zip(self.to_rgbs, features, strict=True)]


class RDB(nn.Module):
    """Residual dense block: each of five convolutions sees the input and the outputs of those before it.

    x + 0.2 conv5([x, x1, ..., x4]),    x_k = leaky_relu(conv_k([x, x1, ..., x_(k-1)]), 0.2)
    (ESRGAN, https://arxiv.org/abs/1809.00219)
    """

    def __init__(self, features: int, growth: int) -> None:
        """`growth` channels join at each of the first four convolutions."""
        super().__init__()
        for k in range(5):
            out = growth if k < 4 else features
            self.add_module(f"conv{k + 1}", nn.Conv2d(features + k * growth, out, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, features, rows, columns) -> the same shape."""
        *first, last = self.children()
        seen = [x]
        for convolution in first:
            seen.append(functional.leaky_relu(convolution(torch.cat(seen, dim=1)), 0.2))
        out: Tensor = x + 0.2 * last(torch.cat(seen, dim=1))
        return out


class RRDB(nn.Module):
    """Three residual dense blocks in one residual: x + 0.2 (rdb3 . rdb2 . rdb1)(x)."""

    def __init__(self, features: int, growth: int) -> None:
        """PASD's `growth` is `features`, 16, where ESRGAN's is 32."""
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (RDB(features, growth) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, features, rows, columns) -> the same shape."""
        out: Tensor = x + 0.2 * self.rdb3(self.rdb2(self.rdb1(x)))
        return out


class PASDControlNetModel(ControlNetModel):  # type: ignore[misc]
    """`ControlNetModel` with `DegradationRemoval` as its condition encoder.

    The configuration is the stock one with the official keys `use_rrdb` and `return_rgbs` (has it the convolutions to
    RGB, which training alone needs?). What the encoder makes of an image depends on neither timestep nor prompt:
    `encode_condition` computes it once, and `forward` takes it in the picture's place.
    """

    @extends(ControlNetModel, return_rgbs=True, use_rrdb=False)
    def __init__(self, *args: Any, return_rgbs: bool = True, use_rrdb: bool = False, **kwargs: Any) -> None:
        """Build it untrained; `encode_condition` then returns zeros."""
        super().__init__(*args, **kwargs)
        config = self.config
        if config.controlnet_conditioning_channel_order != "rgb":
            raise ValueError('expected a controlnet_conditioning_channel_order of "rgb": PASD has no other')
        self.register_to_config(return_rgbs=return_rgbs, use_rrdb=use_rrdb)
        self.controlnet_cond_embedding = DegradationRemoval(
            config.block_out_channels[0],
            config.conditioning_channels,
            config.conditioning_embedding_out_channels,
            rrdb_blocks=2 if use_rrdb else 0,
            rgbs=return_rgbs,
        )

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, *args: Any, use_rrdb: bool = False, **kwargs: Any) -> Self:
        """As in diffusers: a ControlNet whose trunk starts with the weights of the U-Net's encoder."""
        plain: Self = super().from_unet(unet, *args, **kwargs)
        if not use_rrdb:
            return plain
        model = cls(**dict(plain.config) | {"use_rrdb": True})
        model.load_state_dict(plain.state_dict(), strict=False)
        return model

    def encode_condition(self, picture: Tensor) -> Tensor:
        """What `forward` takes in the place of `picture`, (batch, 3, rows, columns) in 0..1."""
        encoded: Tensor = self.controlnet_cond_embedding(self._beside_weights(picture))
        return encoded.to(picture.device)

    def clean_pictures(self, picture: Tensor) -> tuple[Tensor, list[Tensor]]:
        """For training: what `encode_condition` returns, and the clean image predicted at 1/2, 1/4 and 1/8 size."""
        encoder = self.controlnet_cond_embedding
        features = encoder.features(self._beside_weights(picture))
        return encoder.conv_out(features[-1]), encoder.rgbs(features)

    def _beside_weights(self, picture: Tensor) -> Tensor:
        """On the encoder's device: while the model is offloaded, that is not where the others compute."""
        device = self.controlnet_cond_embedding.conv_in.weight.device
        return picture.to(self.dtype) if device.type == "meta" else picture.to(device, self.dtype)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        *args: Any,
        fg_mask: Tensor | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As the stock forward.

        Args:
            sample: noisy latents, (batch, 4, rows, columns).
            timestep: one for all, or one each.
            encoder_hidden_states: text.
            controlnet_cond: the degraded image in 0..1, (batch, 3, 8 rows, 8 columns), or its encoded form.
            conditioning_scale: factor of every residual.
            *args: as in diffusers.
            fg_mask: 1 in the foreground and 0 elsewhere, (batch or 1, 1, any rows, any columns): the residuals are
                multiplied by 1.5 there and 0.6 elsewhere instead of by `conditioning_scale`.
            return_dict: a `ControlNetOutput` instead of a tuple.
            **kwargs: as in diffusers.
        """
        scale = conditioning_scale if fg_mask is None else 1.0
        down, mid = super().forward(
            sample, timestep, encoder_hidden_states, controlnet_cond, scale, *args, return_dict=False, **kwargs
        )
        if fg_mask is not None:
            down, mid = [_scale_by_mask(residual, fg_mask) for residual in down], _scale_by_mask(mid, fg_mask)
        return ControlNetOutput(down, mid) if return_dict else (down, mid)


def _scale_by_mask(residual: Tensor, mask: Tensor) -> Tensor:
    inside = functional.interpolate(mask.to(residual.dtype), residual.shape[-2:], mode="nearest")
    return residual * (FOREGROUND_SCALE * inside + BACKGROUND_SCALE * (1.0 - inside))
