"""The two ways tensors move between the ranks of a plan, with gradients; both count their bytes.

Every rank of the plan takes part in every call, forward and backward, in the same order. So a loss must reach the
output on every rank; gradients of a sum over ranks come out as in a single process. A rank that may not use what it got
binds it to its output by `tie`.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .shares import FramePlan


def leave_group() -> None:
    """Leave the processes' group, if there is one, together: every rank comes here when its work is done.

    A rank that leaves while another is still in its last collective can abort that one at its exit ("terminate called
    without an active exception", seen in 3 of 50 exits on gloo, in none of 150 with the barrier).
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def all_gather(x: Tensor, plan: FramePlan, label: str) -> Tensor:
    """`x` of every rank, equal in shape: `(ranks, *x.shape)`. One collective; without others a view."""
    if plan.ranks == 1:
        return x[None]
    plan.check_group()
    gathered: Tensor = _AllGather.apply(x, plan, label)
    return gathered


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: FramePlan, label: str) -> Tensor:
        ctx.plan, ctx.label = plan, label
        out = x.new_empty(plan.ranks, x.numel())
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13
        gather(out, x.reshape(1, -1).contiguous(), group=plan.group)
        own = x.numel() * x.element_size()
        plan.traffic.count(label, own, own * (plan.ranks - 1))
        return out.view(plan.ranks, *x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        plan: FramePlan = ctx.plan
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=plan.group)
        size = total.numel() * total.element_size()
        plan.traffic.count(ctx.label, size, size)
        return total[plan.rank], None, None


def all_sum(x: Tensor, plan: FramePlan, label: str) -> Tensor:
    """The sum of `x` over the ranks, on each of them. One collective; without others `x` itself."""
    if plan.ranks == 1:
        return x
    plan.check_group()
    total: Tensor = _AllSum.apply(x, plan, label)
    return total


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: FramePlan, label: str) -> Tensor:
        ctx.plan, ctx.label = plan, label
        return _summed(x, plan, label)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _summed(grad, ctx.plan, ctx.label), None, None


def _summed(x: Tensor, plan: FramePlan, label: str) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=plan.group)
    size = total.numel() * total.element_size()
    plan.traffic.count(label, size, size)
    return total


def exchange(
    parts: dict[int, Tensor], sizes: dict[int, int], like: Tensor, plan: FramePlan, label: str
) -> dict[int, Tensor]:
    """Send `parts[rank]` to each rank, receive as many numbers from each as `sizes` says; flat, in the dtype of `like`.

    All messages are under way at once; no gradients.
    """
    plan.check_group()
    if not parts and not sizes:
        return {}
    received = {rank: like.new_empty(size) for rank, size in sizes.items()}
    sends = [dist.P2POp(dist.isend, part, group=plan.group, group_peer=rank) for rank, part in parts.items()]
    receives = [dist.P2POp(dist.irecv, part, group=plan.group, group_peer=rank) for rank, part in received.items()]
    for work in dist.batch_isend_irecv(sends + receives):
        work.wait()
    sent, got = (sum(x.numel() * x.element_size() for x in table.values()) for table in (parts, received))
    plan.traffic.count(label, sent, got)
    return received


def tie(out: Tensor, received: Iterable[Tensor]) -> Tensor:
    """`out`, with a backward pass of every exchange that gave `received`, used or not: other ranks wait for it."""
    received = [x for x in received if x.requires_grad]
    tied: Tensor = _Tie.apply(out, *received) if received else out
    return tied


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, *received: Tensor) -> Tensor:
        ctx.shapes = [x.shape for x in received]
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(grad.new_zeros(()).expand(shape) for shape in ctx.shapes)
