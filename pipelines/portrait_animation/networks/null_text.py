"""The text embedding of the empty prompt, in the place of a text encoder: X-Portrait has no other prompt."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

# `from_pretrained` of a pipeline looks in a component's module for the base class that says how to load it.
__all__ = ["ModelMixin", "NullText"]


class NullText(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """What CLIP's text encoder, 123 M weights, makes of "": one embedding, kept."""

    @register_to_config
    def __init__(self, tokens: int = 77, width: int = 768) -> None:
        """Zeros, until it is loaded."""
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(1, tokens, width), requires_grad=False)

    def forward(self) -> Tensor:
        """(1, tokens, width)."""
        return self.embedding.clone()  # offloading takes the parameter itself away after the call
