"""Linear attention beside an exact part: over all cells, or over those that a query does not see exactly.

    l_i = sum_{j in R(i)} w_j (f_i g_j) v_j / (sum_{j in R(i)} w_j (f_i g_j) + eps),    f_i = phi(q_i),  g_j = phi(k_j)

`w_j` is the exponential of a mask m over the keys, 1 without one, and 0 for hidden ones. phi is one of

    softmax    softmax over the channels of x
    elu        elu(x) + 1
    relu       max(x, 0)
    learned    softmax over [W x, -W x], one W per head for queries and one for keys, trained (`linear_weights.py`)

Where R(i) are whole tiles, the tiles of keys are summed up once, and for each tile of queries the sums of those that it
does not see exactly: sums of positive numbers, never one less another. Time O(n d^2 + (n / tile)^2 d^2).

Sources: softmax, and the tiles: Zhang et al., SLA, https://arxiv.org/abs/2509.24006. learned: Zhang et al., The
Hedgehog & the Porcupine, https://arxiv.org/abs/2402.04347, here divided by the sum over the features, so that no key
outweighs the others without bound.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from diffattn.grid import TokenGrid
from diffattn.kernels.routed import RoutedCall

from .linear_weights import LinearWeights

FEATURE_MAPS = ("softmax", "elu", "relu", "learned")
LARGEST = 2**26
"""Bytes of the sums of several heads at once."""


def features_of(name: str, x: Tensor, matrix: Tensor | None) -> Tensor:
    """phi(x) `(b, h, n, features)`; `matrix` `(h, d, d)` is W, None the identity."""
    if name == "softmax":
        return x.softmax(-1)
    if name == "learned":
        x = x if matrix is None else x @ matrix.to(x)
        return torch.cat([x, -x], dim=-1).softmax(-1)
    return F.elu(x) + 1 if name == "elu" else F.relu(x)


def matrices(weights: LinearWeights | None) -> tuple[Tensor | None, Tensor | None]:
    """W of queries and of keys."""
    return (None, None) if weights is None else (weights.q_map, weights.k_map)


def weights_of_cells(mask: Tensor | None, grid: TokenGrid, dtype: torch.dtype) -> Tensor | None:
    """w of the cells, `(b|1, h|1, cells, 1)`, the greatest 1; `mask` is one for all queries."""
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask.expand(*mask.shape[:-1], grid.tokens)[..., grid.cell_slice].mT
    return mask.to(dtype) if mask.dtype == torch.bool else _relative(mask.to(dtype), -2)


def _relative(logs: Tensor, *axes: int) -> Tensor:
    """exp(x - max x)."""
    return (logs - logs.amax(axes, keepdim=True).clamp(min=torch.finfo(logs.dtype).min)).exp()


def over_all(
    f: Tensor, g: Tensor, v: Tensor, weights: Tensor | None, eps: float, project: Callable[[Tensor], Tensor]
) -> Tensor:
    """P l over all cells, `(b, h, cells, c)`, from features and values of the cells; P is put on the sum."""
    g = g if weights is None else g * weights
    return f @ project(g.mT @ v) / (f @ g.sum(-2).unsqueeze(-1) + eps)


def over_rest(
    call: RoutedCall, chosen: Tensor, name: str, maps: LinearWeights | None, heads: int, eps: float
) -> Tensor:
    """l over the tiles that are not exact, `(g, query tiles, cells, c)`.

    Args:
        chosen: the exact tiles `(g, query tiles, tiles)`; the number of tiles stands for none.
        heads: of the layer.
    """
    number = torch.promote_types(call.q.dtype, torch.float32)

    def features(tiles: Tensor, matrix: Tensor | None) -> Tensor:
        by_head = tiles.to(number).flatten(1, 2).unflatten(0, (-1, heads))
        return features_of(name, by_head, matrix).flatten(0, 1).unflatten(1, tiles.shape[1:3])

    f, g = (features(x, matrix) for x, matrix in zip((call.q, call.k), matrices(maps), strict=True))
    if call.bias is not None:
        g = g * _relative(call.bias.to(number), 1, 2)[..., None]
    left = torch.ones(*chosen.shape[:2], call.tiles + 1, dtype=number, device=chosen.device)
    left = left.scatter_(-1, chosen, 0)[..., : call.tiles]
    sums, totals = g.mT @ call.v.to(number), g.sum(2)  # g tiles features c, g tiles features
    bytes_of_head = chosen.shape[1] * sums[0, 0].numel() * sums.element_size()
    step = max(1, LARGEST // bytes_of_head)
    parts = []
    for first in range(0, len(f), step):
        part = slice(first, first + step)
        summed = (left[part] @ sums[part].flatten(2)).unflatten(2, sums.shape[2:])
        total = (left[part] @ totals[part]).unsqueeze(-1)
        parts.append(f[part] @ summed / (f[part] @ total + eps))
    return torch.cat(parts)


def branch_reference(f: Tensor, g: Tensor, v: Tensor, weights: Tensor | None, seen: Tensor, eps: float) -> Tensor:
    """l by all pairs of cells; `seen` bool `(b|1, h|1, cells, cells)` says which are in R."""
    pairs = f @ g.mT * seen
    pairs = pairs if weights is None else pairs * weights.mT
    return pairs @ v / (pairs.sum(-1, keepdim=True) + eps)


def operations(cells: int, head_dim: int, name: str, tiles: tuple[int, int] | None) -> int:
    """Of one head: products of maps, sums, queries and P; `tiles` of queries and keys where R are whole tiles."""
    features = 2 * head_dim if name == "learned" else head_dim
    maps = 4 * cells * head_dim**2 if name == "learned" else 0
    if tiles is None:
        return maps + 4 * cells * features * head_dim + 2 * cells * features + 2 * features * head_dim**2
    rest = 2 * cells * head_dim**2 + 2 * tiles[0] * tiles[1] * features * (head_dim + 1)
    return maps + 4 * cells * features * head_dim + 2 * cells * features + rest
