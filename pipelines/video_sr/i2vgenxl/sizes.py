"""All sizes of a run: the clip's, those of its latents, and the windows and tiles that they are worked through in."""

from dataclasses import dataclass

import torch

from diffattn.media.windows import Tile, ramp_weights, starts

from ..clips.chunks import Window, plan_windows
from .networks.unet import legal_size
from .padding import Padding, official_padding, tight_padding
from .settings import CELL, UpscaleSettings
from .tiles import spread_tiles

OFFICIAL_DECODE_CHUNK = 3
"""Frames that the released code decodes together."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `plan_upscaling` works out."""

    frames: int
    source: tuple[int, int]
    """Height and width of the given frames, in pixels."""
    target: tuple[int, int]
    """Height and width of the result."""
    padding: Padding
    """Around the result, for the networks."""
    latent: tuple[int, int]
    """Rows and columns of the padded result's latents."""
    windows: tuple[Window, ...]
    """Frames that the networks see together."""
    tiles: tuple[Tile, ...]
    """Latent cells that they see together."""
    decode_windows: tuple[Window, ...]
    """Frames that the VAE's decoder sees together."""
    decode_tiles: tuple[Tile, ...]
    """Latent cells that it sees together."""
    steps: int
    """Evaluations of the networks for each frame of a window."""


def plan_upscaling(
    frames: int,
    height: int,
    width: int,
    upscale: float,
    settings: UpscaleSettings,
    *,
    steps: int,
    downsamplings: int = 3,
) -> Plan:
    """Work out all sizes.

    >>> plan = plan_upscaling(72, 240, 426, 4, UpscaleSettings(), steps=14)
    >>> plan.target, plan.latent, [(window.begin, window.end) for window in plan.windows]
    ((960, 1704), (122, 216), [(0, 32), (16, 48), (32, 64), (40, 72)])

    Args:
        height, width: of the given frames.
        upscale: factor of both sides, at least 1; the sides of the result are rounded.
        steps: of the scheduler.
        downsamplings: of the networks.

    Raises:
        ValueError: no frame, no pixel or an upscale below 1.
    """
    if min(frames, height, width) < 1:
        raise ValueError(
            f"expected at least 1 frame of 1 x 1 pixels; got {frames} of {height} x {width}; check how they were read"
        )
    if not 1 <= upscale < float("inf"):
        raise ValueError(f"expected an upscale of at least 1; got {upscale}; 4 is usual")
    target = round(height * upscale), round(width * upscale)
    padding = official_padding(*target) if settings.official else tight_padding(*target, downsamplings)
    rows = (target[0] + padding.top + padding.bottom) // CELL
    columns = (target[1] + padding.left + padding.right) // CELL
    return Plan(
        frames=frames,
        source=(height, width),
        target=target,
        padding=padding,
        latent=(rows, columns),
        windows=tuple(plan_windows(frames, settings.window, settings.overlap, official=settings.official)),
        tiles=_tiles(rows, columns, settings, downsamplings),
        decode_windows=_decode_windows(frames, settings),
        decode_tiles=_decode_tiles(rows, columns, settings),
        steps=steps,
    )


def _tiles(rows: int, columns: int, settings: UpscaleSettings, downsamplings: int) -> tuple[Tile, ...]:
    if settings.tile is None:
        return (Tile(0, 0, rows, columns),)
    side = _cells(settings.tile)
    legal = legal_size(side, side, downsamplings)
    return tuple(spread_tiles(rows, columns, *legal, _cells(settings.tile_overlap)))


def _decode_tiles(rows: int, columns: int, settings: UpscaleSettings) -> tuple[Tile, ...]:
    if settings.decode_tile is None:
        return (Tile(0, 0, rows, columns),)
    side = _cells(settings.decode_tile)
    return tuple(spread_tiles(rows, columns, side, side, _cells(settings.tile_overlap)))


def _cells(pixels: int) -> int:
    return -(-pixels // CELL)


def _decode_windows(frames: int, settings: UpscaleSettings) -> tuple[Window, ...]:
    """Spread evenly: short overlaps fade the better, the less one of them is shifted more than the others."""
    if settings.official:
        size, begins = OFFICIAL_DECODE_CHUNK, list(range(0, frames, OFFICIAL_DECODE_CHUNK))
        weights = torch.ones(len(begins), size, dtype=torch.float64)
    else:
        size = settings.decode_chunk
        begins = starts(frames, size, settings.decode_overlap, even=True)
        weights = ramp_weights(begins, size, frames)
    ends = [min(begin + size, frames) for begin in begins]
    return tuple(Window(b, e, share[: e - b]) for b, e, share in zip(begins, ends, weights, strict=True))
