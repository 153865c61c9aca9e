"""From pixels and frames to tokens, by the configs of a model and its VAE."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...grid import TokenGrid
from ...swap.apply import Handle


def pixels_per_token(model: nn.Module, vae: Mapping[str, Any]) -> int:
    """Pixels of the image that one token of the model's finest grid stands for, along a side.

    The VAE's reduction times the side of a patch, which is `patch_size`, or what the pipeline packs into the channels.
    """
    config: Any = model.config
    size = config.get("patch_size") or 1
    patch = size[-1] if isinstance(size, (tuple, list)) else size
    latent = vae.get("latent_channels") or vae.get("z_dim") or config.get("in_channels") or 1
    packed = math.isqrt(max(1, (config.get("in_channels") or 1) // latent))
    levels = (
        2 ** (len(vae["block_out_channels"]) - 1) if isinstance(vae.get("block_out_channels"), (list, tuple)) else 8
    )
    reduction = vae.get("spatial_compression_ratio") or vae.get("scale_factor_spatial") or levels
    return int(reduction * max(patch, packed))


def latent_frames(model: nn.Module, vae: Mapping[str, Any], frames: int) -> int:
    """Frames of the token grid for `frames` of a video; a video VAE encodes the first frame by itself."""
    config: Any = model.config
    ratio = vae.get("temporal_compression_ratio") or vae.get("scale_factor_temporal") or 1
    size = config.get("patch_size_t") or config.get("patch_size") or 1
    patch = size[0] if isinstance(size, (tuple, list)) and len(size) == 3 else config.get("patch_size_t") or 1
    return max(1, ((frames - 1) // ratio + 1) // patch)


def grid_of(
    model: nn.Module, vae: Mapping[str, Any], height: int, width: int, frames: int = 1, text: int = 0, name: str = ""
) -> TokenGrid:
    """Tokens of the finest grid for a size in pixels, with `text` before them.

    Raises `ValueError` for sides that a token does not divide.
    """
    pixels = pixels_per_token(model, vae)
    if height % pixels or width % pixels:
        what = name or type(model).__name__
        raise ValueError(f"a token of {what} is {pixels} x {pixels} pixels, which does not divide {height} x {width}")
    return TokenGrid(height // pixels, width // pixels, latent_frames(model, vae, frames), before=text)


def assume_grid(model: nn.Module, handle: Handle, grid: TokenGrid, like: Tensor) -> None:
    """Tell the swapped layers of `model` what a forward would: a UNet halves the grid from level to level.

    `like` has the device and dtype of the queries.
    """
    for layer in handle.layers:
        factor = 2 ** _level(model, layer.name)
        rows, columns = -(-grid.height // factor), -(-grid.width // factor)
        if layer.kind == "temporal":
            own = TokenGrid(1, 1, grid.frames)
        else:
            frames = 1 if hasattr(model, "down_blocks") else grid.frames
            own = TokenGrid(rows, columns, frames, grid.before, grid.after)
        module: Any = layer.module
        shape = (1, module.heads, own.tokens, module.inner_dim // module.heads)
        layer.assume(own, like.new_empty(()).expand(shape))


def _level(model: nn.Module, name: str) -> int:
    """How many times a UNet has halved its image before this layer; 0 for transformers."""
    blocks = getattr(model, "down_blocks", None)
    place = re.match(r"(down|up)_blocks\.(\d+)|(mid)_block", name)
    if blocks is None or place is None:
        return 0
    bottom = len(blocks) - 1
    return bottom if place[3] else int(place[2]) if place[1] == "down" else bottom - int(place[2])
