"""Noise a batch as the model's scheduler does, and say what the model ought to answer.

Flow matching (Flux, SD3, Wan): x = (1 - sigma) latents + sigma noise, target = noise - latents.
DDPM (Stable Diffusion, PixArt, CogVideoX): x = sqrt(a) latents + sqrt(1 - a) noise, target = noise (`epsilon`) or
sqrt(a) noise - sqrt(1 - a) latents (`v_prediction`), a the scheduler's `alphas_cumprod`.

The level is uniform over the scheduler's own training grid, before any shift for a picture's size, in float32: rounding
sigma to bfloat16, as CLEAR's released code does, moves it by up to 0.004.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .data.samples import Batch


@dataclass(frozen=True)
class Noised:
    """A batch as the model sees it."""

    latents: Tensor
    timestep: Tensor
    """(b,) in the scheduler's own units, 0 ... 1000."""
    level: Tensor
    """(b,) share of noise in [0, 1]: sigma, or sqrt(1 - a)."""
    target: Tensor


def add_noise(scheduler: Any, batch: Batch) -> Noised:
    """Noise every sample of a batch to the level its uniform number chooses."""
    steps = int(scheduler.config.num_train_timesteps)
    index = (batch.uniform * steps).long().clamp(max=steps - 1)
    if hasattr(scheduler, "alphas_cumprod"):
        return _diffused(scheduler, batch, index)
    if hasattr(scheduler, "sigma_max"):
        return _flowing(scheduler, batch, index)
    raise ValueError(
        f"{type(scheduler).__name__} is neither a flow-matching nor a DDPM scheduler: no target is known for it"
    )


def _flowing(scheduler: Any, batch: Batch, index: Tensor) -> Noised:
    levels = type(scheduler).from_config(scheduler.config).sigmas.to(batch.latents.device, torch.float32)
    sigma = levels[index]
    share = _spread(sigma, batch.latents)
    latents = (1 - share) * batch.latents + share * batch.noise
    return Noised(latents, sigma * scheduler.config.num_train_timesteps, sigma, batch.noise - batch.latents)


def _diffused(scheduler: Any, batch: Batch, index: Tensor) -> Noised:
    kept = scheduler.alphas_cumprod.to(batch.latents.device, torch.float32)[index]
    signal, noise = _spread(kept.sqrt(), batch.latents), _spread((1 - kept).sqrt(), batch.latents)
    latents = signal * batch.latents + noise * batch.noise
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        target = batch.noise
    elif kind == "v_prediction":
        target = signal * batch.noise - noise * batch.latents
    else:
        raise ValueError(f"prediction_type {kind!r} has no target here; epsilon and v_prediction do")
    return Noised(latents, index, (1 - kept).sqrt(), target)


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """(b,) as (b, 1, 1, ...) with the axes of `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))
