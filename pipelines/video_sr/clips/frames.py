"""Frames of any number and size for CogVideoX's VAE and transformer, and back.

The VAE turns 8 k + 1 frames into 2 k + 1 latent ones, and 8 x 8 pixels into a cell; the transformer joins 2 x 2 cells.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor

Video = Tensor | Sequence[Image.Image] | Any
"""Tensor (frames, 3, rows, columns) in 0..1, array (frames, rows, columns, 3) in 0..1 or uint8, or list of frames."""


def read_video(video: Video, processor: VideoProcessor) -> Tensor:
    """Frames (n, 3, rows, columns), float32 in 0..1 on the CPU.

    Args:
        processor: that neither resizes nor normalises.

    Raises `ValueError` for what is no video of RGB frames of one size.
    """
    given = _listed(video)
    try:
        frames: Tensor = processor.preprocess_video(given)
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(f"expected frames of one size in video; got {type(video).__name__}: {error}") from error
    if len(frames) != 1 or frames.shape[1] != 3 or 0 in frames.shape:
        raise ValueError(f"expected one video of RGB frames; got (b, c, f, h, w) = {tuple(frames.shape)}; convert it")
    clip = frames[0].transpose(0, 1).float().cpu()
    if not bool(((clip >= 0) & (clip <= 1)).all()):
        raise ValueError(
            f"expected frames in 0..1; got {float(clip.min()):.3g} to {float(clip.max()):.3g}; divide bytes by 255, or "
            "give them as uint8 arrays"
        )
    return clip


def _listed(video: Video) -> Any:
    """What diffusers' processor takes for a single video, images in RGB."""
    if isinstance(video, np.ndarray) and video.dtype == np.uint8:
        return video.astype(np.float32) / 255
    if isinstance(video, list | tuple) and video and isinstance(video[0], Image.Image):
        return [frame.convert("RGB") for frame in video]
    if isinstance(video, list | tuple) and video and isinstance(video[0], np.ndarray) and video[0].dtype == np.uint8:
        return [frame.astype(np.float32) / 255 for frame in video]
    return list(video) if isinstance(video, tuple) else video


def enlarge(frames: Tensor, factor: float) -> Tensor:
    """Bicubic, in 0..1; sides are rounded."""
    size = [max(1, round(side * factor)) for side in frames.shape[-2:]]
    if size == list(frames.shape[-2:]):
        return frames
    return F.interpolate(frames, size=size, mode="bicubic", align_corners=False).clamp_(0, 1)


def pad(frames: Tensor, multiple: int, period: int) -> Tensor:
    """Frames on a grid of pixels and of time: sides a multiple of `multiple`, as many frames as `period` k + 1.

    Rows and columns are reflected at the lower and right edge, over and over where a side is short; the last frame is
    repeated. The first rows, columns and frames of the result are the given ones.
    """
    count, _, rows, columns = frames.shape
    more = -(count - 1) % period
    longer = torch.cat([frames, frames[-1:].expand(more, -1, -1, -1)])
    tall = longer.index_select(2, _reflected(rows, -(-rows // multiple) * multiple))
    return tall.index_select(3, _reflected(columns, -(-columns // multiple) * multiple))


def _reflected(side: int, size: int) -> Tensor:
    """Indices 0, 1, .. side - 1, side - 2, .. 0, 1, .. of `size` places."""
    turn = max(1, 2 * (side - 1))
    place = torch.arange(size) % turn
    return torch.minimum(place, turn - place).clamp_max(side - 1)
