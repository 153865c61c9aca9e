"""GroupNorm over a video whose frames lie on several ranks.

    y = (x - mean) / sqrt(M2 / n + eps) * weight + bias        for each sample and group, over all frames

Each rank computes mean_r and M2_r = sum (x - mean_r)^2 of its n_r numbers in float32; one all-gather brings them all
together, and they are merged as

    n = sum n_r,    mean = sum n_r mean_r / n,    M2 = sum M2_r + n_r (mean_r - mean)^2

which is exact whatever the lengths of the clips (n_r follows from them and is not sent).
Cost: 8 bytes sent for each sample and group, one collective.

Source: Chan, Golub, LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
Video-Infinity (https://arxiv.org/abs/2406.16260) averages means and then variances with equal weights, in two
all-reduces and the tensor's dtype: the same for clips of equal length, up to rounding.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .collectives import all_gather
from .shares import FramePlan


def distributed_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    plan: FramePlan,
    dim: int = 2,
    label: str = "norm",
) -> Tensor:
    """`F.group_norm` of the whole video, for this rank's frames of it; `x` is `(b, c, ...)` with frames along `dim`.

    Differentiable; every rank must then run the backward pass.
    """
    plan.check(x.shape[dim])
    if plan.ranks == 1:
        return F.group_norm(x, num_groups, weight, bias, eps)
    groups = x.float().unflatten(1, (num_groups, -1)).flatten(2)  # b g n
    variance, mean = torch.var_mean(groups, dim=2, correction=0)
    moments = all_gather(torch.stack([mean, variance * groups.shape[2]]), plan, label)  # ranks 2 b g
    frame_size = groups.shape[2] // plan.length
    mean, m2 = merge_moments(moments, [frame_size * length for length in plan.lengths])
    std = (m2 / (frame_size * plan.frames) + eps).sqrt()
    out = ((groups - mean[..., None]) / std[..., None]).view(x.shape)
    shape = (1, -1, *[1] * (x.dim() - 2))
    if weight is not None:
        out = out * weight.float().view(shape)
    if bias is not None:
        out = out + bias.float().view(shape)
    return out.to(x.dtype)


def merge_moments(moments: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and M2 of everything, from `(ranks, 2, ...)` means and M2 of `counts` numbers each."""
    means, m2s = moments.unbind(1)
    count = torch.tensor(counts, dtype=means.dtype, device=means.device).view(-1, *[1] * (means.dim() - 1))
    mean = (means * (count / sum(counts))).sum(0)
    return mean, (m2s + count * (means - mean) ** 2).sum(0)
