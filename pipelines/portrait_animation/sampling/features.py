"""What the ControlNets' condition encoders make of control images: it depends on neither step nor window.

    features = encode_once(net.controlnet_cond_embedding, images, device, dtype)      once a run
    features = EncodedWhenRead(net.controlnet_cond_embedding, images, device, dtype)  at every step, kept nowhere
    with features_given(controlnet):
        controlnet(sample, timestep, text, [features[frames], ...], scales)

Memory: X-Portrait's features of a frame of 512 x 512 are 320 x 64 x 64 numbers for each ControlNet, 2.6 MB in half
precision, 1.7 times the pixels in the same. Encoding them is 2 % of a step's work at that size.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import MultiControlNetModel
from torch import Tensor, nn

CELL = 8
"""Pixels of a latent cell."""


class Frames(Protocol):
    """Something for each frame by their numbers: a tensor, or what reads it when it is asked for."""

    def __getitem__(self, frames: list[int], /) -> Tensor:
        """(frames, channels, rows, columns), on any device."""
        ...


@dataclass(frozen=True)
class EncodedWhenRead:
    """Features of images (frames, 3, 8 rows, 8 columns) in -1..1, computed whenever they are read."""

    encoder: nn.Module
    pictures: Frames
    device: torch.device
    dtype: torch.dtype

    def __getitem__(self, frames: list[int]) -> Tensor:
        features: Tensor = self.encoder(self.pictures[frames].to(self.device, self.dtype))
        return features


def encode_once(encoder: nn.Module, pictures: Tensor, device: torch.device, dtype: torch.dtype, chunk: int) -> Tensor:
    """Features of all images on the CPU, computed `chunk` at a time."""
    return torch.cat([encoder(part.to(device, dtype)).cpu() for part in pictures.split(chunk)])


@contextlib.contextmanager
def features_given(controlnet: MultiControlNetModel) -> Iterator[None]:
    """In this block, the ControlNets take features for `controlnet_cond`."""
    encoders: list[Any] = [net.controlnet_cond_embedding for net in controlnet.nets]
    try:
        for net in controlnet.nets:
            net.controlnet_cond_embedding = nn.Identity()
        yield
    finally:
        for net, encoder in zip(controlnet.nets, encoders, strict=True):
            net.controlnet_cond_embedding = encoder
