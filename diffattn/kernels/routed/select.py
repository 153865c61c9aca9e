"""Which tiles of keys a tile of queries has exactly: those whose means would be furthest from right.

    P_I,b = mean over q in I of softmax(L_q,b joined with l_q,others), or that softmax for the mean of the q in I
    W_I,j = sum over the blocks b of tile j of  P_I,b * sqrt(scale^2 * mean_q(q^2) . var_k(b)) * sd_v(b)
    S_I   = the tiles that I lies on, then those of the largest W_I,j; among equals the one that comes first

W is the error that the means make in the output, to first order: the weight of the block times how far its logits
spread times how far its values do.
"""

import torch
from torch import Tensor

from .call import RoutedCall


def tile_errors(call: RoutedCall, part: slice, rows: slice, weights: Tensor) -> Tensor:
    """W of some query tiles, `(g, query tiles, tiles)`, from P `(g, query tiles, blocks)`."""
    assert call.spread_k is not None and call.spread_v is not None
    q = call.q[part, rows]
    squares = q.to(weights.dtype).square()
    if call.real is not None:
        real = call.real[rows].to(weights.dtype)[..., None]
        squares = (squares * real).sum(2) / real.sum(1).clamp(min=1)
    else:
        squares = squares.mean(2)
    spread = squares @ call.spread_k[part].to(weights.dtype).mT
    errors = weights * spread.clamp_(min=0).sqrt_().mul_(call.scale) * call.spread_v[part][:, None].to(weights.dtype)
    return errors.unflatten(-1, (call.tiles, -1)).sum(-1)


def first_tiles(call: RoutedCall, rows: slice, errors: Tensor) -> Tensor:
    """The chosen tiles of some query tiles, `(g, query tiles, chosen)`, the own ones first."""
    if call.own is not None:
        errors = errors.masked_fill(call.own[rows], torch.inf)
    return errors.sort(dim=-1, descending=True, stable=True).indices[..., : call.chosen]


def mean_weights(call: RoutedCall, rows: slice, exponentials: Tensor, totals: Tensor) -> Tensor:
    """P: `(g, query tiles, blocks)` from exp(L - peak) `(g, query tiles, cells, blocks)` and the sums of their rows."""
    shares = totals.clamp(min=torch.finfo(totals.dtype).tiny).reciprocal()
    if call.real is not None:
        real = call.real[rows].to(shares.dtype)
        shares = shares * real / real.sum(-1, keepdim=True).clamp(min=1)
    else:
        shares = shares / shares.shape[-1]
    return (shares[..., None, :] @ exponentials).squeeze(-2)


def weights_of_mean(call: RoutedCall, part: slice, rows: slice) -> Tensor:
    """P by the mean query of each tile, `(g, query tiles, blocks)`."""
    q = call.q[part, rows].to(call.block_k.dtype)
    if call.real is None:
        mean = q.mean(2)
    else:
        real = call.real[rows].to(q.dtype)[..., None]
        mean = (q * real).sum(2) / real.sum(1).clamp(min=1)
    bias = call.block_bias if call.block_bias.shape[0] == 1 else call.block_bias[part]
    blocks = call.scale * (mean @ call.block_k[part].mT) + bias[:, None]
    others = call.scale * (mean @ call.other_k[part].to(mean.dtype).mT)
    if call.other_bias is not None:
        others = others + call.other_bias[part][:, None]
    logits = torch.cat([blocks, others], dim=-1)
    hidden = (logits == -torch.inf).all(-1, keepdim=True)  # nothing to weigh
    return logits.masked_fill(hidden, 0).softmax(-1)[..., : blocks.shape[-1]]


@torch.no_grad()
def choose_tiles(call: RoutedCall) -> Tensor:
    """The choice alone, `(g, query tiles, chosen)`, written the plain way: memory for all queries times all blocks."""
    everything = slice(None)
    if call.by_mean:
        return first_tiles(
            call, everything, tile_errors(call, everything, everything, weights_of_mean(call, everything, everything))
        )
    logits = call.scale * (call.q.flatten(1, 2).to(call.block_k.dtype) @ call.block_k.mT) + call.block_bias[:, None]
    others = call.scale * (call.q.flatten(1, 2).to(call.block_k.dtype) @ call.other_k.to(call.block_k.dtype).mT)
    if call.other_bias is not None:
        others = others + call.other_bias[:, None]
    weights = torch.cat([logits, others], dim=-1).softmax(-1)[..., : logits.shape[-1]]
    weights = weights.unflatten(1, call.q.shape[1:3])
    if call.real is None:
        mean = weights.mean(2)
    else:
        real = call.real.to(weights.dtype)[..., None]
        mean = (weights * real).sum(2) / real.sum(1).clamp(min=1)
    return first_tiles(call, everything, tile_errors(call, everything, everything, mean))
