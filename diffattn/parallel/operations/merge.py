"""Softmax attention from parts of the keys.

    lse_i = log sum_(k in part i) exp(scale q k^T),    out_i = attention to part i
    out   = sum_i exp(lse_i - lse) out_i,              lse = log sum_i exp(lse_i)

The parts may lie on different ranks: then their outputs travel, not the keys.
Cost of `merge_over_ranks`: one all-gather of b h n (c + 1) numbers of 4 bytes.

Source: Milakov, Gimelshein, Online normalizer calculation for softmax, https://arxiv.org/abs/1805.02867.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .collectives import all_gather
from .shares import FramePlan

KEY_CHUNK = 4096
"""Keys whose logits are held at once."""


def merge_attention(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Output `(b, h, n, c)` and lse `(b, h, n)` of all keys, from those of each part; parts may be empty (-inf)."""
    outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    lse = lses.logsumexp(0)
    # a query that sees no key at all gets zeros, not NaN
    weights = (lses - lse.masked_fill(lse == -torch.inf, 0.0)).exp()
    return (outs * weights[..., None].to(outs.dtype)).sum(0), lse


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of `q` `(b, h, n, d)` to some of its keys: output `(b, h, n, c)` and lse `(b, h, n)`, both float32.

    Args:
        mask: bool (True = may be seen) or additive, broadcastable to `(b, h, n, m)`.
    """
    parts = []
    for first in range(0, max(k.shape[2], 1), KEY_CHUNK):
        part = slice(first, first + KEY_CHUNK)
        logits = (q @ k[:, :, part].transpose(-1, -2)).float() * scale
        if mask is not None:
            own = mask[..., part]
            logits = logits.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else logits + own
        lse = logits.logsumexp(-1)
        weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
        parts.append(((weights.to(v.dtype) @ v[:, :, part]).float(), lse))
    return merge_attention(parts) if len(parts) > 1 else parts[0]


def merge_over_ranks(out: Tensor, lse: Tensor, plan: FramePlan, label: str = "merge") -> Tensor:
    """Attention to the keys of all ranks, `(b, h, n, c)`, the same on each, from every rank's `partial_attention`."""
    packed = all_gather(torch.cat([out, lse[..., None]], dim=-1), plan, label)
    return merge_attention([(part[..., :-1], part[..., -1]) for part in packed.unbind(0)])[0]
