"""Settings of the two networks of STAR's I2VGen-XL variant, and the networks untrained."""

from dataclasses import dataclass
from typing import Any

from .controlnet import STARControlNetModel
from .unet import STARUNet3DConditionModel


@dataclass(frozen=True, kw_only=True)
class STARSizes:
    """Sizes of the networks; the defaults are STAR's, those of I2VGen-XL."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Of each level, the finest first."""
    attention: tuple[bool, ...] = (True, True, True, False)
    """Whether a level has transformers; the middle always has."""
    layers: int = 2
    """Residual blocks of each level, down; one more up."""
    head_width: int = 64
    first_heads: int = 8
    """Attention heads of the first temporal transformer; the others have as many as fill their level's channels."""
    text_width: int = 1024
    latent_channels: int = 4
    groups: int = 32
    """Of every group norm."""

    def __post_init__(self) -> None:
        if len(self.attention) != len(self.channels):
            raise ValueError(f"expected attention yes or no for {len(self.channels)} levels; got {self.attention}")

    def controlnet(self) -> dict[str, Any]:
        """Settings of `STARControlNetModel`; those of `STARUNet3DConditionModel` include them."""
        return {
            "in_channels": self.latent_channels,
            "down_block_types": tuple("CrossAttnDownBlock3D" if yes else "DownBlock3D" for yes in self.attention),
            "block_out_channels": self.channels,
            "layers_per_block": self.layers,
            "norm_num_groups": self.groups,
            "cross_attention_dim": self.text_width,
            "attention_head_dim": self.head_width,
            "transformer_in_heads": self.first_heads,
        }

    def unet(self) -> dict[str, Any]:
        """Settings of `STARUNet3DConditionModel`."""
        up = tuple("CrossAttnUpBlock3D" if yes else "UpBlock3D" for yes in reversed(self.attention))
        return {**self.controlnet(), "out_channels": self.latent_channels, "up_block_types": up}


def build_networks(sizes: STARSizes) -> dict[str, Any]:
    """`unet` and `controlnet`, untrained."""
    hint = {"conditioning_channels": sizes.latent_channels}
    return {
        "unet": STARUNet3DConditionModel(**sizes.unet()),
        "controlnet": STARControlNetModel(**sizes.controlnet(), **hint),
    }
