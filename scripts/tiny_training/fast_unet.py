"""The video U-Net arranged to train quickly on a CPU: it computes the same from the same weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet3DConditionModel
from diffusers.models.resnet import TemporalConvLayer
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from torch import Tensor, nn
from torch.nn import functional


class FrameConv(nn.Conv3d):
    """Convolution of 3 x 1 x 1 along the frames, computed in two dimensions, for which there is a fast kernel."""

    def forward(self, features: Tensor) -> Tensor:
        """Convolve (batch, channels, frames, rows, columns)."""
        flat = functional.conv2d(features.flatten(3), self.weight.squeeze(-1), self.bias, padding=(1, 0))
        return flat.unflatten(3, features.shape[3:])


def quicken(unet: UNet3DConditionModel) -> None:
    """Compute the convolutions along the frames as FrameConv, and drop no features in training."""
    for module in unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, TemporalConvLayer):
            for part in (module.conv1, module.conv2, module.conv3, module.conv4):
                part[-1] = frame_conv(part[-1])


def frame_conv(conv: nn.Conv3d) -> FrameConv:
    """The same convolution, with the same parameters, as a FrameConv."""
    with torch.device("meta"):
        fast = FrameConv(conv.in_channels, conv.out_channels, (3, 1, 1), padding=(1, 0, 0))
    fast.weight, fast.bias = conv.weight, conv.bias
    return fast


def temporal_layers(unet: UNet3DConditionModel) -> list[nn.Module]:
    """Every layer in which frames meet."""
    return [module for module in unet.modules() if isinstance(module, TemporalConvLayer | TransformerTemporalModel)]


def identity_temporal(unet: UNet3DConditionModel) -> None:
    """Start the temporal attention as the identity; the convolutions already are."""
    for layer in temporal_layers(unet):
        if isinstance(layer, TransformerTemporalModel):
            nn.init.zeros_(layer.proj_out.weight)
            nn.init.zeros_(layer.proj_out.bias)


@contextmanager
def without_temporal(unet: UNet3DConditionModel) -> Iterator[None]:
    """Let every temporal layer pass its input on."""
    layers = temporal_layers(unet)
    for layer in layers:
        layer.forward = pass_one if isinstance(layer, TransformerTemporalModel) else pass_on
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def pass_on(hidden_states: Tensor, num_frames: int = 1) -> Tensor:
    """The forward of a convolution along the frames that does nothing."""
    return hidden_states


def pass_one(hidden_states: Tensor, **options: object) -> tuple[Tensor]:
    """The forward of an attention over frames that does nothing."""
    return (hidden_states,)
