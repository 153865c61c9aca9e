"""The appearance network of X-Portrait: a U-Net of Stable Diffusion that is run for its inner features alone."""

import functools
from typing import Any

from diffusers import ModelMixin, UNet2DConditionModel
from torch import nn

# `from_pretrained` of a pipeline looks in a component's module for the base class that says how to load it.
__all__ = ["ModelMixin", "XPortraitReferenceUNet"]


class XPortraitReferenceUNet(UNet2DConditionModel):  # type: ignore[misc]
    """`UNet2DConditionModel` without its last norm and convolution, which no reference needs.

    Returns the features of the last up block; `ReferenceBank.write` takes those of its transformers.
    """

    # diffusers reads the signature for the configuration
    @functools.wraps(UNet2DConditionModel.__init__, assigned=())  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build it untrained."""
        super().__init__(*args, **kwargs)
        self.conv_norm_out, self.conv_out = None, nn.Identity()
