"""Timesteps and the first latents."""

from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor


def official_timesteps(steps: int, trained: int = 1000) -> list[int]:
    """The official timesteps, from noise to image: 1, 1 + c, 1 + 2c, .. < trained in reverse, c = trained // steps.

    These are more than `steps` where that does not divide `trained`. Where they reach `trained` itself, which is no
    timestep, the released code fails; here that one is left out.

    >>> official_timesteps(4), official_timesteps(6), official_timesteps(3)
    ([751, 501, 251, 1], [997, 831, 665, 499, 333, 167, 1], [667, 334, 1])
    """
    if not 1 <= steps <= trained:
        raise ValueError(f"expected from 1 to {trained} steps; got {steps}; 25 to 30 are usual")
    return list(reversed(range(1, trained, trained // steps)))


def set_timesteps(scheduler: Any, steps: int, device: torch.device | str) -> None:
    """Official timesteps for DDIM; other schedulers have their own."""
    official = official_timesteps(steps, scheduler.config.num_train_timesteps)
    scheduler.set_timesteps(steps, device=device)
    if isinstance(scheduler, DDIMScheduler):
        scheduler.timesteps = torch.tensor(official, device=device)


def noisy_start(latents: Tensor, noise: Tensor, scheduler: Any) -> Tensor:
    """The reference under the noise of the last timestep T of training.

        x = sqrt(abar_T) z + sqrt(1 - abar_T) n          0.0683 z + 0.9977 n in Stable Diffusion's schedule

    Args:
        latents: z of the reference, scaled, (1, 4, rows, columns).
        noise: n, one for each frame, (frames, 4, rows, columns).
        scheduler: with `alphas_cumprod`.
    """
    kept = scheduler.alphas_cumprod[-1].double()
    return float(kept.sqrt()) * latents + float((1.0 - kept).sqrt()) * noise
