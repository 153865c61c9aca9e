"""The formula of agent attention on tensors, for given agents.

Source: Han et al., Agent Attention, https://arxiv.org/abs/2312.08874.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from diffattn.grid import TokenGrid
from diffattn.kernels.call import attend_others


def key_mask(mask: Tensor | None) -> Tensor | None:
    """`mask`, after making sure that it is the same for all queries."""
    if mask is not None and mask.dim() > 1 and mask.shape[-2] != 1:
        raise ValueError(
            f"agent: an agent stands for many queries, so a mask must be the same for all of them, (b, 1, 1, keys), "
            f"got {tuple(mask.shape)}; leave layers with such a mask out with layers="
        )
    return mask


def add_mask(bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The additive `bias` under a boolean or additive `mask`."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    grid: TokenGrid,
    *,
    scale: float,
    scale2: float,
    shortcut: float = 0.0,
    others_ask: bool = False,
    mask: Tensor | None = None,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """The module's formula for given `agents` `(b, h, m, d)`.

    `biases` are B1 `(1, h, m, n)` and B2 `(1, h, asking, m)`; those who ask are the cells, or all if `others_ask`.
    """
    mask = key_mask(mask)
    # b h m c
    gathered = F.scaled_dot_product_attention(agents, k, v, attn_mask=add_mask(biases[0], mask), scale=scale)
    asking, values = (q, v) if others_ask else (q[..., grid.cell_slice, :], v[..., grid.cell_slice, :])
    out = F.scaled_dot_product_attention(asking, agents, gathered, attn_mask=biases[1], scale=scale2)
    if shortcut:
        out = out + shortcut * values
    if others_ask or not grid.others:
        return out
    return grid.join(out, attend_others(q, k, v, grid, mask=mask, scale=scale))
