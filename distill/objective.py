"""Noise a batch as the model's scheduler does, and say what the model ought to answer.

Flow matching (Flux, SD3, Wan): x = (1 - sigma) latents + sigma noise, target = noise - latents.
DDPM (Stable Diffusion, PixArt, CogVideoX): x = sqrt(a) latents + sqrt(1 - a) noise, target = noise (`epsilon`) or
sqrt(a) noise - sqrt(1 - a) latents (`v_prediction`), a the scheduler's `alphas_cumprod`.

Solvers such as UniPC, which Wan's checkpoints have, are of the former kind where they use flow sigmas.

The level is uniform over the scheduler's own training grid, before any shift for a picture's size, in float32: rounding
sigma to bfloat16, as CLEAR's released code does, moves it by up to 0.004. A `Span` limits the levels to those of one
of several models.
"""

import math
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


@dataclass(frozen=True)
class Span:
    """A scheduler at some of its noise levels: those of timesteps from `least` to `below`."""

    scheduler: Any
    least: float = 0.0
    below: float = math.inf

    def draw(self, timesteps: Tensor, uniform: Tensor) -> Tensor:
        """For each uniform number the place of a timestep of the span, all equally likely."""
        places = ((self.least <= timesteps) & (timesteps < self.below)).nonzero()[:, 0]
        if not len(places):
            raise ValueError(
                f"no timestep of {type(self.scheduler).__name__} lies from {self.least:g} to {self.below:g}: its model "
                f"is never called, train the other one"
            )
        return places[(uniform * len(places)).long().clamp(max=len(places) - 1)]


def add_noise(scheduler: Any, batch: Batch) -> Noised:
    """Noise every sample of a batch to the level its uniform number chooses, by a scheduler or a `Span` of one."""
    span = scheduler if isinstance(scheduler, Span) else Span(scheduler)
    scheduler = span.scheduler
    if scheduler.config.get("use_flow_sigmas") or not hasattr(scheduler, "alphas_cumprod"):
        return _flowing(span, batch)
    return _diffused(span, batch)


def flow_levels(scheduler: Any) -> tuple[Tensor, Tensor]:
    """The sigmas of a flow-matching scheduler's training grid, from 1 down, and the timesteps that it calls them."""
    config, steps = scheduler.config, scheduler.config.num_train_timesteps
    if not config.get("use_flow_sigmas"):
        if not hasattr(scheduler, "sigma_max"):
            raise ValueError(
                f"{type(scheduler).__name__} is neither a flow-matching nor a DDPM scheduler: no target is known for it"
            )
        own = type(scheduler).from_config(config).sigmas.float()
        return own, own * steps
    if config.prediction_type != "flow_prediction":
        raise ValueError(
            f"{type(scheduler).__name__} has flow sigmas and prediction_type {config.prediction_type!r}, expected "
            f"flow_prediction: no other target is known for them"
        )
    linear = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
    shift = 1.0 if config.get("use_dynamic_shifting") else config.flow_shift
    sigmas = shift * linear / (1 + (shift - 1) * linear)
    return sigmas.float(), (sigmas * steps).floor().float()  # solvers round timesteps down


def _flowing(span: Span, batch: Batch) -> Noised:
    sigmas, timesteps = (values.to(batch.latents.device) for values in flow_levels(span.scheduler))
    index = span.draw(timesteps, batch.uniform)
    share = _spread(sigmas[index], batch.latents)
    latents = (1 - share) * batch.latents + share * batch.noise
    return Noised(latents, timesteps[index], sigmas[index], batch.noise - batch.latents)


def _diffused(span: Span, batch: Batch) -> Noised:
    scheduler = span.scheduler
    steps = torch.arange(scheduler.config.num_train_timesteps, device=batch.uniform.device)
    index = span.draw(steps, batch.uniform)
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
