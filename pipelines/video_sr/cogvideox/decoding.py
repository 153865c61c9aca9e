"""CogVideoX's VAE on a long clip, chunk by chunk of latent frames, in memory that does not grow with the clip.

Latent frame 0 stands for frame 0, and latent frame j for the p frames p (j - 1) + 1 .. p j, p = 4. A chunk of latent
frames b .. e - 1 is encoded from the frames p b .. p (e - 1), and decoded to as many. The VAE is causal in time and
takes the chunk's first latent frame for the beginning of a clip, which stands for one frame. In the middle of a clip
it is a warm-up and is dropped; the chunk before has its frames. Where two chunks have the rest of their overlap they
cross-fade: pixels in decoding, mean and log-variance in encoding, from which the whole clip's sample is drawn.

The VAE takes three latent frames and then pairs of them, with group norms of their own. It gives an even number of
latent frames p frames for the first one too, and a clip that begins p - 1 frames early. So all numbers are odd: of the
clip's latent frames, of a chunk's and of an overlap's. Chunks then begin where a pair ends, and have the pairs of the
whole clip.
"""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from diffattn.media.windows import ramp_weights, starts

from ..clips.chunks import Window
from ..clips.streaming import finished


def plan_chunks(count: int, size: int | None, overlap: int) -> list[tuple[int, int]]:
    """Chunks (begin, end) of `count` latent frames.

    >>> plan_chunks(13, 7, 3), plan_chunks(15, 7, 3), plan_chunks(15, None, 3)
    ([(0, 7), (4, 11), (6, 13)], [(0, 7), (4, 11), (8, 15)], [(0, 15)])

    Args:
        size: latent frames in a chunk; None: all.
        overlap: least number of latent frames that neighbours share; the later one drops the first of them.

    Raises:
        ValueError: an even `count`.
    """
    if count % 2 == 0:
        raise ValueError(f"expected an odd number of latent frames; got {count}; pad the clip to 8 k + 1 frames")
    if size is None or size >= count:
        return [(0, count)]
    return [(begin, begin + size) for begin in starts(count, size, overlap)]


def fades(chunks: list[tuple[int, int]], period: int) -> list[Window]:
    """Where the parts of chunks lie and their weights, which sum to 1; without the latent frames that are dropped.

    >>> [(part.begin, part.end) for part in fades([(0, 5), (2, 7)], 4)]
    [(0, 17), (9, 25)]

    Args:
        period: places of a latent frame, 1 in latent frames and p in frames; the very first one has a single place.
    """
    size, count = chunks[0][1], chunks[-1][1]
    if len(chunks) == 1:
        places = period * (count - 1) + 1
        return [Window(0, places, torch.ones(places, dtype=torch.float64))]
    weights = ramp_weights([period * begin for begin, _ in chunks], period * (size - 1), period * (count - 1))
    first, *others = [
        Window(period * begin + 1, period * (end - 1) + 1, share)
        for (begin, end), share in zip(chunks, weights, strict=True)
    ]
    return [Window(0, first.end, torch.cat([first.weights.new_ones(1), first.weights])), *others]


def decode(
    vae: Any, latents: Tensor, size: int | None, overlap: int, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Finished frames (n, 3, rows, columns) around 0..1, float32 on the CPU, and the number of the first, in order.

    Args:
        latents: scaled, (1, latent frames, channels, rows, columns).
        size: see `plan_chunks`; so is `overlap`.
        device: that the VAE runs on.
    """
    chunks = plan_chunks(latents.shape[1], size, overlap)

    def parts() -> Iterator[Tensor]:
        for begin, end in chunks:
            z = latents[:, begin:end].transpose(1, 2) / vae.config.scaling_factor
            clip = vae.decode(z.to(device, vae.dtype), return_dict=False)[0][0].float().cpu()
            yield clip.transpose(0, 1)[int(begin > 0) :] / 2 + 0.5

    return finished(fades(chunks, int(vae.config.temporal_compression_ratio)), parts())


def encode(
    vae: Any, frames: Tensor, size: int | None, overlap: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Scaled latents (1, latent frames, channels, rows, columns), a sample of the VAE's distribution, on the device.

    Args:
        frames: (8 k + 1, 3, rows, columns) in 0..1, on the CPU.
        size: see `plan_chunks`; so is `overlap`.
        generator: of the sample.
        device: that the VAE runs on.
    """
    period = int(vae.config.temporal_compression_ratio)
    chunks = plan_chunks((len(frames) - 1) // period + 1, size, overlap)

    def parts() -> Iterator[Tensor]:
        for begin, end in chunks:
            clip = 2 * frames[period * begin : period * (end - 1) + 1] - 1
            posterior = vae.encode(clip.transpose(0, 1)[None].to(device, vae.dtype)).latent_dist
            yield posterior.parameters[0].float().cpu().transpose(0, 1)[int(begin > 0) :]

    moments = torch.cat([part for _, part in finished(fades(chunks, 1), parts())])
    posterior = DiagonalGaussianDistribution(moments.transpose(0, 1)[None].to(device, vae.dtype))
    latents: Tensor = posterior.sample(generator) * vae.config.scaling_factor
    return latents.transpose(1, 2)
