"""Training of the tiny VAE: absolute error plus a small pull of the latents towards a standard normal."""

import logging
from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional
from tqdm import trange

from diffattn.tiny.shapes import SIDE, Scene, pixels, scenes

logger = logging.getLogger(__name__)

KL_WEIGHT = 3e-4
WORLD = tuple(scenes())
CROP = 64
"""Side in pixels of the random crops that most training steps see; the last tenth sees whole images."""


Draw = Callable[[int, np.random.Generator], torch.Tensor]
"""Draws so many random images, float32 (batch, 3, side, side) in -1..1."""


def mixed_precision() -> torch.autocast:
    """Bfloat16 where the processor computes in it, else float32: without instructions for it bfloat16 is far slower."""
    return torch.autocast("cpu", torch.bfloat16, enabled="AVX512" in torch.backends.cpu.get_cpu_capability())


def draw_pictures(count: int, rng: np.random.Generator) -> torch.Tensor:
    """Jittered images of `count` random scenes, float32 (batch, 3, side, side) in -1..1."""
    return pixels([WORLD[index] for index in rng.integers(len(WORLD), size=count)], rng)


def crop(pictures: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """One random CROP x CROP window of a batch of images (batch, 3, side, side)."""
    top, left = rng.integers(SIDE - CROP + 1, size=2)
    return pictures[:, :, top : top + CROP, left : left + CROP].contiguous()


def fit_vae(vae: AutoencoderKL, *, steps: int, batch_size: int, rate: float, seed: int) -> None:
    """Train `vae` in place on images of every scene, then set its scale and shift from measured latents.

    Minimises mean |decode(z) - x| + KL_WEIGHT * mean KL(q(z|x) || N(0, 1)), both means over elements.
    """
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.05)
    vae.train()
    progress = trange(steps, desc="vae", mininterval=5.0)
    for step in progress:
        target = draw_pictures(batch_size, rng)
        if step < 0.9 * steps:
            target = crop(target, rng)
        with mixed_precision():
            posterior = vae.encode(target).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
        error = functional.l1_loss(decoded.float(), target)
        loss = error + KL_WEIGHT * divergence
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(error=f"{error.item():.4f}", kl=f"{divergence.item():.2f}")
    vae.eval()
    measure_latents(vae, rng)


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, rng: np.random.Generator, count: int = 512) -> None:
    """Set `shift_factor` to the mean and `scaling_factor` to 1 / deviation of the latents of `count` images."""
    batches = rng.choice(len(WORLD), size=(count // 32, 32), replace=False)
    means = torch.cat([vae.encode(pixels([WORLD[i] for i in row], rng)).latent_dist.mean for row in batches])
    vae.register_to_config(shift_factor=means.mean().item(), scaling_factor=1.0 / means.std().item())
    channels = means.std(dim=(0, 2, 3)).tolist()
    logger.info("latent mean %.3f, deviation %.3f, by channel %s", means.mean(), means.std(), channels)


def encode_scenes(vae: AutoencoderKL, batch: list[Scene], rng: np.random.Generator, side: int = SIDE) -> torch.Tensor:
    """Normalised posterior means, float32 (batch, channels, side / 4, side / 4), of jittered images.

    Images of a smaller side are the native ones, area-averaged.
    """
    return encode(vae, functional.interpolate(pixels(batch, rng), size=(side, side), mode="area"))


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Normalised posterior means, float32, of images (batch, 3, rows, columns) in -1..1."""
    with mixed_precision():
        means = vae.encode(pictures).latent_dist.mean.float()
    return (means - vae.config.shift_factor) * vae.config.scaling_factor


def refine_decoder(
    vae: AutoencoderKL, draw: Draw = draw_pictures, *, steps: int, batch_size: int, rate: float, seed: int
) -> None:
    """Train the decoder on, on images of `draw`; the encoder is fixed, so that latents already encoded stay valid.

    Minimises mean |d| + 2 d^2 with d = decode(z + noise) - x; the square weighs the few wrong pixels of small shapes,
    and the noise, a tenth of the latents' deviation, stands for the imprecision of generated latents.
    """
    rng = np.random.default_rng([seed, 1])
    parameters = list(vae.decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.1)
    progress = trange(steps, desc="decoder", mininterval=5.0)
    for _ in progress:
        target = draw(batch_size, rng)
        with mixed_precision():
            with torch.no_grad():
                latents = vae.encode(target).latent_dist.mean
                latents = latents + 0.1 / vae.config.scaling_factor * torch.randn_like(latents)
            decoded = vae.decode(latents).sample.float()
        loss = functional.l1_loss(decoded, target) + 2.0 * functional.mse_loss(decoded, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
