"""Readers of video transformers that see more than the frames they make: keyframes, references, earlier frames."""

import math
from collections.abc import Mapping

from torch import Tensor, nn

from .layout import Arguments, Layout
from .positions import first_video
from .readers import _common, _patch, _samples, _values, video


def ltx2(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """LTX-2's `video_coords` (b, 3, n, 2), else its num_frames, height and width; keyframes and references behind.

    With coordinates the model looks at nothing else, and some pipelines give nothing else.
    """
    if call["video_coords"] is not None:
        return _common(_first_video(bounds) for bounds in _samples(_values(call, "video_coords"), axes=3))
    sizes = [call[name] for name in ("num_frames", "height", "width")]
    if None in sizes:
        raise ValueError(
            "the grid is read from video_coords, or from num_frames, height and width, and this call of the model "
            "leaves out both"
        )
    patches = [_patch(module, name) for name in ("patch_size_t", "patch_size", "patch_size")]
    frames, height, width = (math.ceil(size / patch) for size, patch in zip(sizes, patches, strict=True))
    return (Layout(height, width, frames, before=0, after=None),)


def _first_video(bounds: Tensor) -> Layout:
    size = first_video(bounds)
    if size is None:
        raise ValueError(
            f"video_coords must begin with a video, frame by frame and row by row, and the first of their "
            f"{bounds.shape[1]} tokens are none; call diffattn.restore first"
        )
    frames, height, width = size
    return Layout(height, width, frames, before=0, after=None)


def framepack(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """FramePack: earlier frames before the cells; image and text behind."""
    patches = {"latents_clean": (1, 2, 2), "latents_history_2x": (2, 4, 4), "latents_history_4x": (4, 8, 8)}
    return video(2, before=_earlier(call, patches), after=None, patch_t="patch_size_t")(module, call)


def helios(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """Helios: earlier frames before the cells, which may be coarser than those."""
    patches = {
        f"latents_history_{age}": tuple(times * _patch(module, "patch_size", axis) for axis in range(3))
        for age, times in (("short", 1), ("mid", 2), ("long", 4))
    }
    return video(2, before=_earlier(call, patches), patch_t="patch_size")(module, call)


def _earlier(call: Arguments, patches: Mapping[str, tuple[int, ...]]) -> int:
    """Tokens of earlier frames, in patches that grow with their age: argument of the forward -> patch.

    The youngest are cut to whole patches, the others padded. They count where their indices are given too.
    """
    youngest, tokens = next(iter(patches)), 0
    for name, patch in patches.items():
        if call[name] is not None and call[f"indices_{name}"] is not None:
            padding = (0 if name == youngest else side - 1 for side in patch)
            sizes = zip(call[name].shape[-3:], patch, padding, strict=True)
            tokens += math.prod((size + more) // side for size, side, more in sizes)
    return tokens
