"""SLA and VSA block by block, as their papers and released codes say, without anything of the library."""

import itertools
import math

import torch
from torch import Tensor


def stretches(tokens: int, size: int) -> list[list[int]]:
    """Tokens in a row, `size` at a time."""
    return [list(range(low, min(low + size, tokens))) for low in range(0, tokens, size)]


def cubes(shape: tuple[int, int, int], sides: tuple[int, int, int]) -> list[list[int]]:
    """The cells of each box of a grid (frames, rows, columns)."""
    ranges = [stretches(size, side) for size, side in zip(shape, sides, strict=True)]
    return [
        [(f * shape[1] + y) * shape[2] + x for f in frames for y in rows for x in columns]
        for frames, rows, columns in itertools.product(*ranges)
    ]


def softmax_over(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One query's attention."""
    return (scale * k @ q).softmax(0) @ v


def sla_by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    share: float,
    asking: int = 128,
    tile: int = 64,
    over: str = "all",
    phi: str = "softmax",
) -> Tensor:
    """`(b, h, n, d)` for a sequence of nothing but cells."""
    maps = {
        "softmax": lambda x: x.softmax(-1),
        "elu": lambda x: torch.nn.functional.elu(x) + 1,
        "relu": torch.nn.functional.relu,
    }
    out = torch.zeros_like(v)
    blocks = stretches(k.shape[2], tile)
    count = max(1, int(share * len(blocks)))
    for sample, head in itertools.product(range(q.shape[0]), range(q.shape[1])):
        queries, keys, values = q[sample, head], k[sample, head], v[sample, head]
        smooth = keys - keys.mean(0)
        means = torch.stack([smooth[block].mean(0) for block in blocks])
        for own in stretches(q.shape[2], asking):
            chosen = (means @ queries[own].mean(0)).topk(count).indices.tolist()
            seen = sorted(cell for block in chosen for cell in blocks[block])
            left = [cell for cell in range(len(keys)) if cell not in seen] if over == "rest" else list(range(len(keys)))
            near, far = (keys[seen], values[seen]), (maps[phi](keys[left]), values[left])
            for query in own:
                exact = softmax_over(queries[query], *near, keys.shape[-1] ** -0.5)
                weights = far[0] @ maps[phi](queries[query])
                linear = weights @ far[1] / (1e-5 + weights.sum())
                branch = weight @ linear + bias
                out[sample, head, query] = exact if over == "rest" and not left else exact + branch
    return out


def vsa_by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    shape: tuple[int, int, int],
    *,
    share: float,
    sides: tuple[int, int, int] = (4, 4, 4),
) -> Tensor:
    """`(b, h, n, d)` for the cells of a grid; `gate` `(b, h, n, d)`."""
    out, blocks, scale = torch.zeros_like(v), cubes(shape, sides), q.shape[-1] ** -0.5
    count = math.ceil(share * len(blocks) - 1e-9)
    for sample, head in itertools.product(range(q.shape[0]), range(q.shape[1])):
        mean_q, mean_k, mean_v = (torch.stack([x[sample, head, b].mean(0) for b in blocks]) for x in (q, k, v))
        for number, own in enumerate(blocks):
            coarse = softmax_over(mean_q[number], mean_k, mean_v, scale)
            chosen = (mean_k @ mean_q[number]).topk(count).indices.tolist()
            seen = [cell for block in chosen for cell in blocks[block]]
            for query in own:
                exact = softmax_over(q[sample, head, query], k[sample, head, seen], v[sample, head, seen], scale)
                out[sample, head, query] = exact + gate[sample, head, query] * coarse
    return out
