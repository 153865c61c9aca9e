"""Latents as frames, and their colours."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffattn.media.color import adain_fix, wavelet_fix
from diffattn.media.windows import Tile

from .encoding import enlarge
from .settings import CELL
from .tiles import run_in_tiles


def decode(vae: Any, latents: Tensor, tiles: Sequence[Tile], device: torch.device) -> Tensor:
    """Frames around 0..1, float32 on the CPU, of scaled latents (n, 4, rows, columns) that the decoder sees together.

    The decoder convolves along the frames, so the same frame comes out a little different in another chunk.

    Args:
        tiles: that the decoder sees together. Its group norms take the statistics of one tile.
    """
    z = latents / float(vae.config.scaling_factor)

    def call(tile: Tile) -> Tensor:
        part = z[..., *tile.slices].to(device, vae.dtype)
        pictures: Tensor = vae.decode(part, num_frames=len(part), return_dict=False)[0]
        return pictures.float().cpu()

    return run_in_tiles(call, tiles, CELL) / 2 + 0.5


def fix_colors(frames: Tensor, source: Tensor, how: str | None) -> Tensor:
    """Frames in 0..1 with the colours of the low-resolution ones: their mean and deviation, or low frequencies."""
    if how == "adain":
        frames = adain_fix(frames, source.float())
    elif how == "wavelet":
        height, width = frames.shape[-2:]
        frames = wavelet_fix(frames, enlarge(source.float(), (height, width)))
    return frames.clamp(0, 1)
