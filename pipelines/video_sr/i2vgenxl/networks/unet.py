"""The denoising U-Net of STAR: the stock 3D U-Net with LIEMs and with samplers that keep the rows of 720 pixels.

    down    3 x 3 convolution, stride 2, padding of 2 rows and 1 column      90 -> 46 -> 24 -> 13 rows
    up      twice the size, less the first and the last row, 3 x 3           13 -> 24 -> 46 -> 90

Rows come back where their number is 2 more than a multiple of 2^downsamplings, columns where theirs is a multiple.
"""

from typing import Any

from diffattn.pipelines.pixel_aware_sr.networks.signatures import extends
from diffattn.pipelines.video_sr.liem import add_liem
from diffusers import ModelMixin, UNet3DConditionModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional

# `from_pretrained` of a pipeline looks in a component's module for the base class that says how to load it.
__all__ = [
    "CroppedUpsample",
    "ModelMixin",
    "STARUNet3DConditionModel",
    "check_latents",
    "first_transformer",
    "legal_size",
]

DOWNSAMPLE_PADDING = (2, 1)
"""Rows and columns of zeros around what is halved."""
SPARE_ROWS = 2


def legal_size(height: int, width: int, downsamplings: int = 3) -> tuple[int, int]:
    """The smallest size of latents that the networks take and that is not below `height` x `width`.

    >>> legal_size(88, 160), legal_size(90, 161), legal_size(7, 3, downsamplings=1)
    ((90, 160), (90, 168), (8, 4))
    """
    if min(height, width) < 1:
        raise ValueError(f"expected at least one row and one column of latents; got {height} x {width}")
    factor = 2**downsamplings
    rows = -(-(height - SPARE_ROWS) // factor) * factor + SPARE_ROWS
    return max(rows, SPARE_ROWS), -(-width // factor) * factor


def check_latents(name: str, latents: Tensor, channels: int, downsamplings: int) -> None:
    """Raise `ValueError` unless `latents` are (b, `channels`, frames, rows, columns) of a legal size."""
    shape = tuple(latents.shape)
    if len(shape) != 5 or shape[1] != channels:
        raise ValueError(f"expected {name} of the shape (b, {channels}, frames, rows, columns); got {shape}")
    rows, columns = shape[-2:]
    above = legal_size(rows, columns, downsamplings)
    if above == (rows, columns):
        return
    factor = 2**downsamplings
    below = [size - factor if size > given else size for size, given in zip(above, (rows, columns), strict=True)]
    sizes = {(r, c) for r in (below[0], above[0]) for c in (below[1], above[1]) if min(r, c) > 0}
    raise ValueError(
        f"expected {name} with rows 2 more than a multiple of {factor} and columns a multiple of {factor}; got "
        f"{rows} x {columns}; pad or crop to {' or '.join(f'{r} x {c}' for r, c in sorted(sizes))}"
    )


def first_transformer(config: Any) -> TransformerTemporalModel:
    """The temporal transformer after the first convolution; its inner width need not be that of the level."""
    return TransformerTemporalModel(
        num_attention_heads=config.transformer_in_heads,
        attention_head_dim=config.attention_head_dim,
        in_channels=config.block_out_channels[0],
        num_layers=1,
        norm_num_groups=config.norm_num_groups,
    )


class CroppedUpsample(nn.Module):
    """Nearest neighbours at twice the size, less the first and the last row; then a 3 x 3 convolution."""

    def __init__(self, stock: Upsample2D) -> None:
        """It takes over the convolution of the stock module, and with it the names of its weights."""
        super().__init__()
        self.conv: nn.Conv2d = stock.conv

    def forward(self, hidden_states: Tensor, output_size: Any = None) -> Tensor:
        """(n, c, rows, columns) -> (n, c, 2 rows - 2, 2 columns), whatever `output_size` is."""
        doubled = functional.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        out: Tensor = self.conv(doubled[:, :, 1:-1])
        return out


class STARUNet3DConditionModel(UNet3DConditionModel):  # type: ignore[misc]
    """`UNet3DConditionModel` with LIEMs, STAR's samplers and the names of the stock weights.

    The defaults are those of the released I2VGen-XL variant. The configuration is the stock one and `liem`, whether
    the blocks have LIEMs, and `transformer_in_heads`, the attention heads of the first temporal transformer, 8 in the
    stock model. `downsample_padding` is always (2, 1).

    Source: Xie et al., STAR, https://arxiv.org/abs/2501.02976.
    """

    @extends(UNet3DConditionModel, liem=True, transformer_in_heads=8)
    def __init__(self, *args: Any, liem: bool = True, transformer_in_heads: int = 8, **kwargs: Any) -> None:
        """Build it untrained."""
        super().__init__(*args, **{**kwargs, "downsample_padding": DOWNSAMPLE_PADDING})
        self.register_to_config(liem=liem, transformer_in_heads=transformer_in_heads)
        self.transformer_in = first_transformer(self.config)
        for block in self.up_blocks:
            for i, stock in enumerate(block.upsamplers or ()):
                block.upsamplers[i] = CroppedUpsample(stock)
        if liem:
            add_liem(self)

    @property
    def downsamplings(self) -> int:
        """How often rows and columns are halved."""
        return len(self.config.block_out_channels) - 1

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
        """Velocity of the noisy latents; as the stock forward.

        Args:
            sample: x_t, (b, 4, frames, rows, columns) of a legal size.
            timestep: one for all, or (b,).
            encoder_hidden_states: text, (b, tokens, width).
            *args: as in diffusers.
            down_block_additional_residuals: of `STARControlNetModel`, added to the skip connections.
            mid_block_additional_residual: added to the output of the middle.
            **kwargs: as in diffusers.

        Raises `ValueError` for another shape or size, and for residuals of another number than skip connections.
        """
        check_latents("latents", sample, self.config.in_channels, self.downsamplings)
        residuals = down_block_additional_residuals
        if residuals is not None or mid_block_additional_residual is not None:
            self._check(() if residuals is None else residuals, mid_block_additional_residual)
        return super().forward(
            sample,
            timestep,
            encoder_hidden_states,
            *args,
            down_block_additional_residuals=residuals,
            mid_block_additional_residual=mid_block_additional_residual,
            **kwargs,
        )

    def _check(self, residuals: tuple[Tensor, ...], mid: Tensor | None) -> None:
        expected = sum(len(block.resnets) for block in self.up_blocks)
        if len(residuals) != expected or mid is None:
            raise ValueError(
                f"expected {expected} residuals and the one of the middle; got {len(residuals)} and "
                f"{'none' if mid is None else 'one'} of the middle; does the control branch belong to this U-Net?"
            )
