"""The chosen tiles gathered for SDPA, the blocks' means beside them, strip by strip: never tokens x tokens.

Where each query chooses, for a strip of query tiles: exponentials of the logits of blocks and other tokens; from them
the choice (`select.py`); SDPA of the chosen tiles with its log-sum-exp; the blocks that are left and the other tokens
by two products; and both put together. Where the tile chooses, by its mean query, or nothing is chosen, nobody else
needs those exponentials: then one SDPA has it all (`strip_at_once`).

Time O(n (blocks + chosen keys + others) d), memory beyond inputs and output `STRIP` + `GATHERED` bytes, or
twice `GATHERED` for one SDPA.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..lse import attend_with_lse
from .call import RoutedCall
from .select import first_tiles, mean_weights, tile_errors, weights_of_mean

STRIP = {"cpu": 2**22}
"""Bytes of block logits at once. CPU: they stay in its cache."""
GATHERED = {"cpu": 2**24}
"""Bytes of gathered keys and values at once."""
LARGE = 2**28
"""The same on all other devices."""


class Strip(NamedTuple):
    """What is computed at once."""

    part: slice
    """Heads."""
    rows: slice
    """Tiles of queries."""
    exact: int
    """Tiles of keys that each of them has exactly."""


def strips(call: RoutedCall) -> Iterator[Strip]:
    """All heads and tiles of queries, in parts that fit a cache."""
    device = call.q.device.type
    heads, tiles, cells, d = call.q.shape
    beside = call.block_k.shape[1] + call.other_k.shape[1]
    logits = 1 if call.at_once else cells * call.block_k.shape[1] * call.block_k.element_size()
    first = 0
    for exact, same in itertools.groupby((call.chosen,) * tiles if call.lists is None else call.lists.counts):
        count = len(list(same))
        seen = exact * call.k.shape[2] + (beside if call.at_once else 0)
        keys = seen * (d + call.v.shape[-1]) * call.k.element_size()
        most = max(1, min(STRIP.get(device, LARGE) // logits, GATHERED.get(device, LARGE) // keys))
        several = max(1, most // count)
        for part in range(0, heads, several):
            for row in range(first, first + count, most):
                rows = slice(row, min(row + most, first + count))
                yield Strip(slice(part, min(part + several, heads)), rows, exact)
        first += count


def route(call: RoutedCall, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output `(g, query tiles, cells, c)` and the chosen tiles `(g, query tiles, chosen)`.

    With `chosen` nothing is chosen anew. Gradients flow through everything but the choice and the mask.
    """
    if chosen is None and call.lists is not None:
        chosen = call.lists.tiles.expand(call.q.shape[0], -1, -1)
    if call.needs_grad:
        chosen = choose_in_strips(call) if chosen is None else chosen
        tensors = (call.q, call.k, call.v, call.block_k, call.block_v, call.block_bias, call.other_k, call.other_v)
        out: Tensor = _Route.apply(call, chosen, *tensors)
        return out, chosen
    with torch.no_grad():
        return _route(call, chosen)


@torch.no_grad()
def choose_in_strips(call: RoutedCall) -> Tensor:
    """The choice alone, `(g, query tiles, chosen)`."""
    chosen = call.q.new_empty(*call.q.shape[:2], call.chosen, dtype=torch.long)
    for part, rows, _ in strips(call):
        if call.by_mean:
            chosen[part, rows] = choice_by_mean(call, part, rows)
        else:
            blocks, others, _ = exponentials(call, part, call.q[part, rows])
            chosen[part, rows] = choice(call, part, rows, blocks, others)
    return chosen


def _route(call: RoutedCall, given: Tensor | None) -> tuple[Tensor, Tensor]:
    heads, tiles, cells, _ = call.q.shape
    out = call.v.new_empty(heads, tiles, cells, call.v.shape[-1])
    chosen = call.q.new_empty(heads, tiles, call.chosen, dtype=torch.long) if given is None else given
    for part, rows, exact in strips(call):
        own = None if given is None else given[part, rows, :exact]
        out[part, rows], found = strip(call, part, rows, own)
        if given is None:
            chosen[part, rows] = found
    return out, chosen


def strip(call: RoutedCall, part: slice, rows: slice, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """Some query tiles of some heads."""
    if call.at_once:
        given = choice_by_mean(call, part, rows) if given is None else given
        return strip_at_once(call, part, rows, given), given
    q = call.q[part, rows]
    blocks, others, peak = exponentials(call, part, q)
    if given is None:
        given = choice_by_mean(call, part, rows) if call.by_mean else choice(call, part, rows, blocks, others)
    exact, lse = attend_chosen(call, part, q, given)
    blocks = blocks.masked_fill(hidden_blocks(call, given)[:, :, None], 0)
    mean = blocks.flatten(1, 2) @ call.block_v[part] + others.flatten(1, 2) @ call.other_v[part].to(blocks.dtype)
    total = blocks.sum(-1) + others.sum(-1)
    top = torch.maximum(peak, lse.to(peak.dtype))
    here, there = (lse.to(peak.dtype) - top).exp(), (peak - top).exp()
    mean = mean.unflatten(1, q.shape[1:3])
    weight = (here + there * total).clamp(min=torch.finfo(mean.dtype).tiny)  # 0 where all is hidden: so is the sum
    out = (here[..., None] * exact.to(mean.dtype) + there[..., None] * mean) / weight[..., None]
    return out.to(call.v.dtype), given


def strip_at_once(call: RoutedCall, part: slice, rows: slice, chosen: Tensor) -> Tensor:
    """Some query tiles of some heads by one SDPA: over the chosen tiles, the blocks of the others and other tokens."""
    q = call.q[part, rows]
    shape, count = q.shape[:2], q.shape[0] * q.shape[1]

    def keys(tiles: Tensor, blocks: Tensor, others: Tensor) -> Tensor:
        beside = torch.cat([blocks[part], others[part]], dim=1)
        beside = beside[:, None].expand(-1, shape[1], -1, -1).flatten(0, 1)
        return torch.cat([gathered(tiles[part], chosen).view(count, -1, tiles.shape[-1]), beside], dim=1)

    k, v = keys(call.k, call.block_k, call.other_k), keys(call.v, call.block_v, call.other_v)
    bias = bias_at_once(call, part, chosen).to(k.dtype).view(1, count, 1, -1)
    out = F.scaled_dot_product_attention(q.flatten(0, 1)[None], k[None], v[None], attn_mask=bias, scale=call.scale)
    return out[0].unflatten(0, shape)


def bias_at_once(call: RoutedCall, part: slice, chosen: Tensor) -> Tensor:
    """Log of the weights of the keys of `strip_at_once`, `(g, query tiles, keys)`; -inf where one is hidden."""
    shape = chosen.shape[:2]
    own = call.q.new_zeros(*shape, chosen.shape[2] * call.k.shape[2])
    if call.bias is not None:
        own = gathered(call.bias[part], chosen).view_as(own)
    blocks = call.bias_of_blocks(part)[:, None].expand(*shape, -1).masked_fill(hidden_blocks(call, chosen), -torch.inf)
    others = call.q.new_zeros(*shape, call.other_k.shape[1])
    if call.other_bias is not None:
        others = call.other_bias[part][:, None].expand_as(others)
    return torch.cat([own, blocks, others], dim=-1)


def choice(call: RoutedCall, part: slice, rows: slice, blocks: Tensor, others: Tensor) -> Tensor:
    """The chosen tiles of some query tiles, from the exponentials of their logits."""
    totals = blocks.sum(-1) + others.sum(-1)
    errors = tile_errors(call, part, rows, mean_weights(call, rows, blocks, totals))
    return first_tiles(call, rows, errors)


def choice_by_mean(call: RoutedCall, part: slice, rows: slice) -> Tensor:
    """The chosen tiles of some query tiles, from the logits of their mean queries."""
    return first_tiles(call, rows, tile_errors(call, part, rows, weights_of_mean(call, part, rows)))


def exponentials(call: RoutedCall, part: slice, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logit - peak) of the blocks and of the other tokens, `(g, query tiles, cells, keys)`, and the peaks."""
    rows = q.flatten(1, 2).to(call.block_k.dtype)
    blocks = torch.baddbmm(call.bias_of_blocks(part)[:, None], rows, call.block_k[part].mT, alpha=call.scale)
    others = (rows @ call.other_k[part].to(rows.dtype).mT) * call.scale
    if call.other_bias is not None:
        others = others + call.other_bias[part][:, None]
    peak = blocks.amax(-1)
    if others.shape[-1]:
        peak = torch.maximum(peak, others.amax(-1))
    peak = peak.clamp(min=torch.finfo(peak.dtype).min)  # where all is hidden
    blocks, others = (
        (logits - peak.detach()[..., None]).exp().unflatten(1, q.shape[1:3]) for logits in (blocks, others)
    )
    return blocks, others, peak.detach().unflatten(1, q.shape[1:3])


def attend_chosen(call: RoutedCall, part: slice, q: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the chosen tiles, `(g, query tiles, cells, c)`, and its log-sum-exp `(g, query tiles, cells)`."""
    shape = (1, chosen.shape[0] * chosen.shape[1], -1)
    k, v = (gathered(x[part], chosen).reshape(*shape, x.shape[-1]) for x in (call.k, call.v))
    bias = None if call.bias is None else gathered(call.bias[part], chosen).reshape(shape)[:, :, None]
    out, lse = attend_with_lse(q.flatten(0, 1)[None], k, v, call.scale, bias)
    return out[0].unflatten(0, q.shape[:2]), lse[0].unflatten(0, q.shape[:2])


def gathered(tiles: Tensor, chosen: Tensor) -> Tensor:
    """The chosen ones of `(g, tiles, ...)`, `(g * query tiles * chosen, ...)`."""
    first = torch.arange(tiles.shape[0], device=chosen.device)[:, None, None] * tiles.shape[1]
    return tiles.flatten(0, 1).index_select(0, (chosen + first).flatten())


def hidden_blocks(call: RoutedCall, chosen: Tensor) -> Tensor:
    """The blocks of the chosen tiles, bool `(g, query tiles, blocks)`."""
    tiles = torch.zeros(*chosen.shape[:2], call.tiles, dtype=torch.bool, device=chosen.device)
    return tiles.scatter_(-1, chosen, True).repeat_interleave(call.blocks_per_tile, dim=-1)


class _Route(torch.autograd.Function):
    """`route` that keeps its inputs alone and computes every strip again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, call: RoutedCall, chosen: Tensor, *tensors: Tensor) -> Tensor:
        ctx.call, ctx.chosen = call, chosen
        ctx.save_for_backward(*tensors)
        return _route(call, chosen)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = [tensor.detach() for tensor in ctx.saved_tensors]
        wanted = ctx.needs_input_grad[2:]
        totals = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
        for part, rows, exact in strips(ctx.call):
            q, *keys = tensors
            own = [q[part, rows], *(key if key.shape[0] == 1 else key[part] for key in keys)]
            leaves = [tensor.clone().requires_grad_(want) for tensor, want in zip(own, wanted, strict=True)]
            asked = [leaf for leaf in leaves if leaf.requires_grad]
            with torch.enable_grad():
                call = _call_of(ctx.call, part, rows, leaves)
                out = strip(call, slice(None), slice(None), ctx.chosen[part, rows, :exact])[0]
            found = torch.autograd.grad(out, asked, grad[part, rows], allow_unused=True, materialize_grads=True)
            numbers = [number for number, want in enumerate(wanted) if want]
            for number, one in zip(numbers, found, strict=True):
                place = (part, rows) if number == 0 else part if totals[number].shape[0] > 1 else slice(None)
                totals[number][place] += one
        return None, None, *(total if want else None for total, want in zip(totals, wanted, strict=True))


def _call_of(call: RoutedCall, part: slice, rows: slice, leaves: list[Tensor]) -> RoutedCall:
    """A call of some query tiles of some heads, on other tensors."""
    q, k, v, block_k, block_v, block_bias, other_k, other_v = leaves
    return call._replace(
        q=q,
        k=k,
        v=v,
        bias=None if call.bias is None else call.bias[part],
        block_k=block_k,
        block_v=block_v,
        block_bias=block_bias,
        other_k=other_k,
        other_v=other_v,
        other_bias=None if call.other_bias is None else call.other_bias[part],
        real=None if call.real is None else call.real[rows],
    )
