"""Frames of the low-resolution clip as latents of the result's size."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .padding import pad
from .sizes import Plan


def enlarge(frames: Tensor, target: tuple[int, int]) -> Tensor:
    """Bilinear, without antialiasing, to (height, width)."""
    return F.interpolate(frames, size=target, mode="bilinear", align_corners=False)


def prepare(frames: Tensor, plan: Plan, *, official: bool) -> Tensor:
    """Frames (n, 3, rows, columns) in 0..1, enlarged and padded for the VAE's encoder, in -1..1."""
    return pad(2 * enlarge(frames.float(), plan.target) - 1, plan.padding, official=official)


def encode(vae: Any, pictures: Tensor, noise: Tensor | None) -> Tensor:
    """Scaled latents of images (n, 3, rows, columns) in -1..1, float32 on the CPU.

    Args:
        noise: unit normal, of the latents' shape, for a sample of the VAE's distribution; None for its mean.
    """
    posterior = vae.encode(pictures.to(vae.dtype)).latent_dist
    latents = posterior.mean.float().cpu()
    if noise is not None:
        latents += posterior.std.float().cpu() * noise
    return latents * float(vae.config.scaling_factor)


@contextlib.contextmanager
def widened(vae: Any) -> Iterator[None]:
    """The VAE in float32 inside the block, where it is in float16 and its configuration says that it overflows there.

    No weight changes: float32 holds every float16.
    """
    narrow = vae.dtype == torch.float16 and vae.config.force_upcast
    if narrow:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if narrow:
            vae.to(torch.float16)
