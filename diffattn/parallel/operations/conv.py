"""Convolutions along the frames of a video whose frames lie on several ranks.

`halo_conv` gives a convolution the frames around the clip and crops them from its output: for a kernel of 3 frames one
on either side. At the ends of the video there are none, and the convolution's own padding with zeros applies there, so
the result is that of the whole video.

`padded_layer` is what Video-Infinity (https://arxiv.org/abs/2406.16260; code, default settings) does with a layer of
four such convolutions with GroupNorms between: one halo of four frames for all, zeros beyond the ends, and GroupNorm
over clip and halo. The zeros become other numbers in the first GroupNorm, and its statistics are those of one clip:
the result depends on the split, and is not that of the whole video even on one rank.

Cost: an inner rank sends 2 `halo` frames of the input, and computes as many more.
"""

from collections.abc import Callable

from torch import Tensor

from .halo import halo_exchange, pad_frames
from .shares import FramePlan

LAYER_HALO = 4
"""Frames that four convolutions with kernels of 3 frames reach on either side."""


def halo_conv(x: Tensor, conv: Callable[[Tensor], Tensor], plan: FramePlan, halo: int = 1, dim: int = 2) -> Tensor:
    """`conv` of the whole video, for this rank's frames `x` along `dim`, as in (b, c, f, h, w); it keeps their number.

    Differentiable; every rank must then run the backward pass.
    """
    window, frames = halo_exchange(x, halo, halo, dim, plan, "conv")
    return crop_frames(conv(window), frames, dim, plan)


def padded_layer(
    x: Tensor, layer: Callable[[Tensor], Tensor], plan: FramePlan, halo: int = LAYER_HALO, dim: int = 2
) -> Tensor:
    """`layer` of the clip `x`, as in (b, c, f, h, w), with `halo` frames on either side, zeros beyond the video."""
    window, frames = halo_exchange(x, halo, halo, dim, plan, "conv")
    wanted = range(plan.own.start - halo, plan.own.stop + halo)
    return crop_frames(layer(pad_frames(window, frames, wanted, dim)), wanted, dim, plan)


def crop_frames(x: Tensor, frames: range, dim: int, plan: FramePlan) -> Tensor:
    """This rank's clip out of `x`, which holds `frames`."""
    return x.narrow(dim, plan.own.start - frames.start, plan.length)
