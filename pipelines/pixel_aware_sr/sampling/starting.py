"""The latents that restoration starts from: the low-resolution picture's own, in noise.

    z1 = sqrt(abar_T) z + sqrt(1 - abar_T) n1        z: latents of the image; T: the first timestep
    z2 = sqrt(abar_a) z1 + sqrt(1 - abar_a) n2       a: `level`, 900 in PASD

so that z weighs sqrt(abar_T abar_a) = 0.0081 with Stable Diffusion's schedule: too little to copy noise from, and
enough that dark areas stay dark (PASD, "adjustable noise schedule", https://arxiv.org/abs/2308.14469).
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None

XL_SHARE = 0.005
"""Share of the picture's latents in the start of SDXL, where it is asked for."""


def draw(like: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise of the same shape; with a generator for each image, each draws its own."""
    noise: Tensor = randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return noise


def add_noise_twice(
    latents: Tensor, noises: tuple[Tensor, Tensor], scheduler: Any, level: int, *, official: bool = False
) -> Tensor:
    """z2 of the formula above, after `scheduler.set_timesteps`.

    Args:
        latents: z, (batch, 4, rows, columns), scaled.
        noises: n1 and n2.
        scheduler: with `alphas_cumprod`.
        level: a, a timestep of training, from 0.
        official: with a level that is not one of the timesteps, the released code adds the noise of the last timestep
            instead, and z weighs 8 times as much.
    """
    timesteps = scheduler.timesteps.long().tolist()
    if official and level not in timesteps:
        level = timesteps[-1]
    for noise, timestep in zip(noises, (timesteps[0], level), strict=True):
        kept = scheduler.alphas_cumprod[timestep].double()
        latents = float(kept.sqrt()) * latents + float((1.0 - kept).sqrt()) * noise
    return latents


def mix(latents: Tensor, noise: Tensor, share: float = XL_SHARE) -> Tensor:
    """`share` of the picture's latents and the rest of noise: the start of SDXL."""
    return share * latents + (1.0 - share) * noise
