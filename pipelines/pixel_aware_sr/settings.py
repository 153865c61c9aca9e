"""What a run may be set to, checked before anything is computed."""

from dataclasses import dataclass
from typing import Any

STARTS = ("lr", "noise")
COLOR_FIXES = ("wavelet", "adain", None)
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CELL = 8
"""Pixels of a latent cell."""


@dataclass(frozen=True)
class Defaults:
    """What the authors recommend for one base model."""

    process_size: int
    num_inference_steps: int
    guidance_scale: float
    conditioning_scale: float
    start: str


SD15 = Defaults(process_size=768, num_inference_steps=20, guidance_scale=9.0, conditioning_scale=1.0, start="lr")
SDXL = Defaults(process_size=1280, num_inference_steps=25, guidance_scale=7.0, conditioning_scale=0.8, start="noise")


def check_choices(*, start: str, color_fix: str | None, output_type: str) -> None:
    """Raise `ValueError` for a name that there is not."""
    for name, value, known in (
        ("start", start, STARTS),
        ("color_fix", color_fix, COLOR_FIXES),
        ("output_type", output_type, OUTPUT_TYPES),
    ):
        if value not in known:
            raise ValueError(f"expected {name} to be one of {', '.join(map(repr, known))}; got {value!r}")


def check_tiles(tile_size: int, tile_overlap: int, tile_batch: int) -> None:
    """Raise `ValueError` for tiles that are no whole number of latent cells, or that their overlap fills."""
    if tile_size < CELL or tile_size % CELL or tile_overlap % CELL or not 0 <= tile_overlap < tile_size:
        raise ValueError(
            f"expected a tile_size and a smaller tile_overlap in pixels, both multiples of {CELL}; got {tile_size} and "
            f"{tile_overlap}; 1024 and 128 are usual"
        )
    if tile_batch < 1:
        raise ValueError(f"expected a tile_batch of at least 1; got {tile_batch}")


def check_level(level: int, scheduler: Any) -> None:
    """Raise `ValueError` for a noise level that is not a timestep of training."""
    timesteps = scheduler.config.num_train_timesteps
    if not 0 <= level < timesteps:
        raise ValueError(f"expected an added_noise_level from 0 to {timesteps - 1}; got {level}; 900 is usual")
