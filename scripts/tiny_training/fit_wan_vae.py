"""Training of the tiny VAE of Wan's class on clips of the moving world, and the measured statistics of its latents."""

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.nn import functional
from tqdm import trange

from diffattn.tiny import moving
from diffattn.tiny.shapes import to_tensor
from tiny_training.fit_vae import KL_WEIGHT, mixed_precision
from tiny_training.wan_parts import FRAMES

WORLD = tuple(moving.scenes())
CLIP = 9
"""Frames of most training clips; 5 and 1 are mixed in."""
DECODED_NOISE = 0.1
"""Deviation of the noise that the decoder learns to bear, since sampled latents are not quite those of videos."""


def draw_clips(count: int, frames: int, rng: np.random.Generator) -> Tensor:
    """Random clips, float32 (count, 3, frames, side, side) in -1..1."""
    clips = []
    for index in rng.integers(len(WORLD), size=count):
        scene = WORLD[index]
        clips.append(to_tensor(moving.render(scene, moving.draw_course(scene, rng), frames)).transpose(0, 1))
    return torch.stack(clips)


def fit_wan_vae(vae: AutoencoderKLWan, *, steps: int, batch_size: int, rate: float, seed: int) -> None:
    """Train `vae` in place, then set the mean and deviation of each latent channel.

    Minimises mean |d| + 2 mean d^2 + KL_WEIGHT mean KL(q(z|x) || N(0, 1)) with d = decode(z) - x; the square weighs the
    few wrong pixels of outlines.
    """
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.05)
    vae.train()
    progress = trange(steps, desc="vae", mininterval=15.0)
    for _ in progress:
        frames = int(rng.choice((1, 5, CLIP), p=(0.2, 0.3, 0.5)))
        target = draw_clips(batch_size * (3 if frames == 1 else 1), frames, rng)
        with mixed_precision():
            posterior = vae.encode(target).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
        error = functional.l1_loss(decoded, target)
        loss = error + 2.0 * functional.mse_loss(decoded, target) + KL_WEIGHT * divergence
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(error=f"{error.item():.4f}", kl=f"{divergence.item():.2f}", refresh=False)
    vae.eval()
    measure_latents(vae, rng)


def refine_wan_decoder(vae: AutoencoderKLWan, *, steps: int, batch_size: int, rate: float, seed: int) -> None:
    """Train the decoder of `vae` on in place, on whole clips of 33 frames; latents stay as they are.

    After the first `CLIP` frames its convolutions over time are where the first training never was.
    """
    rng = np.random.default_rng([seed, 1])
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.1)
    progress = trange(steps, desc="decoder", mininterval=15.0)
    for _ in progress:
        target = draw_clips(batch_size, FRAMES, rng)
        with mixed_precision():
            with torch.no_grad():
                latents = vae.encode(target).latent_dist.mean
            decoded = vae.decode(latents + DECODED_NOISE * torch.randn_like(latents)).sample.float()
        error = functional.l1_loss(decoded, target)
        optimizer.zero_grad(set_to_none=True)
        (error + 2.0 * functional.mse_loss(decoded, target)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(error=f"{error.item():.4f}", refresh=False)


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, rng: np.random.Generator, count: int = 64) -> None:
    """Set `latents_mean` and `latents_std` to those of the latents of `count` clips of 33 frames."""
    means = torch.cat([vae.encode(draw_clips(4, FRAMES, rng)).latent_dist.mean for _ in range(count // 4)])
    channels = means.transpose(0, 1).flatten(1)
    vae.register_to_config(latents_mean=channels.mean(1).tolist(), latents_std=channels.std(1).tolist())


@torch.no_grad()
def encode(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """Normalised latents, float32 (batch, channels, latent frames, rows, columns), of clips in -1..1."""
    with mixed_precision():
        latents = vae.encode(clips).latent_dist.mean.float()
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return (latents - mean) / std
