"""Readers of models that pack text, references and what they make into one sequence."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .layout import Arguments, Layout
from .positions import video_size
from .readers import _values

SLOT = 4
"""Tokens of the latent image in a place that Qwen-Image 2.1's text encoder keeps for an image: 2 x 2."""


def minimax_h3(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """MiniMax-H3: text, references and audio, then the video, the same for the whole batch.

    The video's are the tokens of `video_indices` with the timestep of the last one; references have one of their own.
    `position_ids` (n, 3) are time, row and column of every token.
    """
    places, ids, timesteps = (_values(call, name) for name in ("video_indices", "position_ids", "timestep_indices"))
    own = places[timesteps[places] == timesteps[places[-1:]]]
    size = _one_video(own, ids[own])
    if size is None:
        raise ValueError(
            f"the tokens of video_indices with the timestep of the last one must lie side by side and be one video by "
            f"position_ids, frame by frame and row by row, each frame later than the one before; these {len(own)} are "
            f"not; call diffattn.restore first"
        )
    first, frames, height, width = int(own[0]), *size
    return (Layout(height, width, frames, before=first, after=len(ids) - first - len(own)),)


def _one_video(places: Tensor, ids: Tensor) -> tuple[int, int, int] | None:
    """Frames, height and width of tokens at `places` (n,) with `ids` (n, 3) that are a video and nothing else."""
    if not len(ids) or (places[1:] != places[:-1] + 1).any():
        return None
    times, rows, columns = ids.unbind(1)
    size = video_size(torch.stack([times - times[0], rows, columns]))
    if size is None:
        return None
    frames, height, width = size[:3]
    times = times[:: height * width]
    return (frames, height, width) if bool((times[1:] > times[:-1]).all()) else None


def qwen_image21(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """Qwen-Image 2.1: text and condition images, then the image that is made, the last of `img_shapes`.

    `img_mask` (b, n) says where the text encoder keeps places for images, of `SLOT` tokens each; all samples have the
    layout of the first. The image alone asks of all tokens; text and condition images ask of those up to their own, in
    calls apart.
    """
    shapes: Any = call["img_shapes"]
    frames, height, width = shapes[0][-1]
    cells, places = math.prod(shapes[0][-1]), _values(call, "img_mask")[0].bool()
    own = cells // SLOT
    if cells % SLOT or int(places[-own:].sum()) != own:
        raise ValueError(
            f"img_mask must end with the {cells / SLOT:g} places of the image that is made, {height} x {width} tokens "
            f"by img_shapes, and does not; call diffattn.restore first"
        )
    tokens = len(places) + (SLOT - 1) * int(places.sum())
    return (Layout(height, width, frames, before=tokens - cells, apart=True),)
