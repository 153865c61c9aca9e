"""Halo exchange: every rank gets the frames around its clip.

    window_r = frames  first_r - left ... last_r + right,  as far as the video goes

Each frame goes straight from the rank that holds it to every rank that needs it, in one message for each pair of ranks,
several tensors (keys and values) packed together. So a clip may be shorter than the halo, which then comes from several
ranks, and clips may differ in length. `right=0` is the halo of a causal layer.

Cost: an inner rank sends and receives (left + right) frames of every tensor, whatever the number of ranks.
The method is that of any stencil on a distributed grid; for video, Tan et al., Video-Infinity,
https://arxiv.org/abs/2406.16260, who take equal clips, direct neighbours alone, and zeros beyond the ends of the video.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from .collectives import exchange
from .shares import FramePlan


@overload
def halo_exchange(
    x: Tensor, left: int, right: int, dim: int, plan: FramePlan, label: str = "halo"
) -> tuple[Tensor, range]: ...
@overload
def halo_exchange(
    x: Sequence[Tensor], left: int, right: int, dim: int, plan: FramePlan, label: str = "halo"
) -> tuple[tuple[Tensor, ...], range]: ...
def halo_exchange(
    x: Tensor | Sequence[Tensor], left: int, right: int, dim: int, plan: FramePlan, label: str = "halo"
) -> tuple[Tensor | tuple[Tensor, ...], range]:
    """`x` with `left` and `right` frames of the neighbours along `dim`, and the numbers of the frames it then holds.

    There is nothing beyond the ends of the video: the window is shorter there, and the caller masks, or pads by
    `pad_frames`. Differentiable; every rank must then run the backward pass.

    Args:
        x: this rank's clip, or several tensors of one dtype that travel together, as `(k, v)`.
        label: the name under which `plan.traffic` counts it.
    """
    tensors = (x,) if isinstance(x, Tensor) else tuple(x)
    befores, afters = halo_parts(tensors, left, right, dim, plan, label)
    out = tensors if plan.ranks == 1 else tuple(map(_joined(dim), befores, tensors, afters))
    return (out[0] if isinstance(x, Tensor) else out), plan.window(left, right)


def halo_parts(
    tensors: Sequence[Tensor], left: int, right: int, dim: int, plan: FramePlan, label: str = "halo"
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The frames before the clip and those after it, without a copy of the clip, for each of `tensors`."""
    for tensor in tensors:
        plan.check(tensor.shape[dim])
        if tensor.dtype != tensors[0].dtype:
            raise ValueError(f"tensors that travel together need one dtype, got {tensors[0].dtype} and {tensor.dtype}")
    if left < 0 or right < 0:
        raise ValueError(f"a halo has at least 0 frames on either side, got left={left}, right={right}")
    if plan.ranks == 1:
        nothing = tuple(tensor.narrow(dim, 0, 0) for tensor in tensors)
        return nothing, nothing
    parts = _Halo.apply(plan, left, right, dim, label, *tensors)
    return parts[: len(tensors)], parts[len(tensors) :]


def _joined(dim: int) -> Callable[..., Tensor]:
    return lambda *parts: torch.cat(parts, dim)


def pad_frames(x: Tensor, frames: range, wanted: range, dim: int) -> Tensor:
    """Zeros in `x`, which holds `frames` along `dim` of any shape, for those of `wanted` before and after them."""
    before, after = frames.start - wanted.start, wanted.stop - frames.stop
    return F.pad(x, [0, 0] * (x.dim() - 1 - dim % x.dim()) + [before, after]) if before or after else x


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: FramePlan, left: int, right: int, dim: int, label: str, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.settings = plan, left, right, dim, label
        sending, coming = _transfers(plan, left, right)
        parts = {rank: _pack(tensors, frames, plan.own, dim) for rank, frames in sending.items()}
        frame_size = sum(tensor.numel() for tensor in tensors) // plan.length
        sizes = {rank: len(frames) * frame_size for rank, frames in coming.items()}
        received = exchange(parts, sizes, tensors[0], plan, label)
        around = {rank: list(_unpack(received[rank], tensors, len(frames), dim)) for rank, frames in coming.items()}
        sides = [[rank for rank in around if rank < plan.rank], [rank for rank in around if rank > plan.rank]]
        return tuple(
            torch.cat([around[rank][i] for rank in side], dim) if side else tensor.narrow(dim, 0, 0).clone()
            for side in sides
            for i, tensor in enumerate(tensors)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, left, right, dim, label = ctx.settings
        back, sent = _transfers(plan, left, right)[::-1]
        window, count = plan.window(left, right), len(grads) // 2
        befores, afters = grads[:count], grads[count:]
        parts = {
            rank: _pack(befores, frames, range(window.start, plan.own.start), dim)
            if rank < plan.rank
            else _pack(afters, frames, range(plan.own.stop, window.stop), dim)
            for rank, frames in back.items()
        }
        own = [_frames_of(grad, plan.length, dim).zero_() for grad in befores]
        frame_size = sum(total.numel() for total in own) // plan.length
        sizes = {rank: len(frames) * frame_size for rank, frames in sent.items()}
        received = exchange(parts, sizes, grads[0], plan, label)
        for rank, frames in sent.items():
            for total, part in zip(own, _unpack(received[rank], own, len(frames), dim), strict=True):
                total.narrow(dim, frames.start - plan.own.start, len(frames)).add_(part)
        return None, None, None, None, None, *own


def _frames_of(like: Tensor, frames: int, dim: int) -> Tensor:
    shape = list(like.shape)
    shape[dim] = frames
    return like.new_empty(shape)


def _transfers(plan: FramePlan, left: int, right: int) -> tuple[dict[int, range], dict[int, range]]:
    """Frames that go to each other rank, and those that come from each."""
    others = [rank for rank in range(plan.ranks) if rank != plan.rank]
    window = plan.window(left, right)
    sending = {rank: _overlap(plan.own, plan.window(left, right, rank)) for rank in others}
    coming = {rank: _overlap(plan.clip(rank), window) for rank in others}
    return {r: f for r, f in sending.items() if f}, {r: f for r, f in coming.items() if f}


def _overlap(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _pack(tensors: Sequence[Tensor], frames: range, held: range, dim: int) -> Tensor:
    return torch.cat([x.narrow(dim, frames.start - held.start, len(frames)).reshape(-1) for x in tensors])


def _unpack(flat: Tensor, like: Sequence[Tensor], frames: int, dim: int) -> Iterator[Tensor]:
    shapes = [(*x.shape[: dim % x.dim()], frames, *x.shape[dim % x.dim() + 1 :]) for x in like]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    for part, shape in zip(flat.split(sizes), shapes, strict=True):
        yield part.view(shape)
