"""Softmax attention with the log-sum-exp of its logits, by which parts of the keys are put together.

out = softmax(scale * q k^T + bias) v,    lse = log sum_k exp(scale * q k^T + bias)
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`(b, h, n, c)` and `(b, h, n)`, float32 or more; a query that may see nothing gives zeros and -inf.

    By torch's fused kernels where they say the log-sum-exp and no gradient is asked for, else by explicit products.
    """
    if torch.is_grad_enabled() or q.shape[-1] != v.shape[-1] or q.device.type not in ("cpu", "cuda"):
        return explicit(q, k, v, scale, bias)
    if q.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        full = None if bias is None else bias.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
        out, lse = flash(q, k, v, attn_mask=full, scale=scale)
    elif q.dtype == torch.float64:
        return explicit(q, k, v, scale, bias)
    else:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        full = None if bias is None else _aligned(bias.to(q.dtype)).expand(*q.shape[:-1], k.shape[-2])
        out, lse, *_ = efficient(q, k, v, full, True, scale=scale)
        lse = lse[..., : q.shape[-2]]
    if bias is not None:  # the kernels say 0 for a query that may see nothing
        lse = lse.masked_fill((bias == -torch.inf).all(-1), -torch.inf)
    return out, lse


def _aligned(bias: Tensor) -> Tensor:
    """The same with rows that begin at multiples of 8 numbers, as the kernel asks."""
    keys = bias.shape[-1]
    return F.pad(bias, (0, -keys % 8))[..., :keys]


def explicit(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The formula, in float32 or more."""
    number = torch.promote_types(q.dtype, torch.float32)
    logits = scale * (q.to(number) @ k.to(number).mT)
    if bias is not None:
        logits = logits + bias
    lse = logits.logsumexp(-1)
    weights = (logits - lse.clamp(min=torch.finfo(number).min)[..., None]).exp()
    return (weights @ v.to(number)).to(q.dtype), lse
