"""The chosen tiles by FlexAttention: lists of blocks as data, the other tokens and the blocks' means behind the cells.

    keys = [ cells by tile | other tokens | means of the blocks ]
    exact: the chosen tiles as whole blocks of keys; looked at by a rule: all that lies behind the cells

One kernel for each shape, whatever is chosen: the lists, the choice and the biases are its inputs. Time
O(n (blocks + chosen keys + others) d), memory beyond inputs and output 8 bytes for each tile of queries and tile of
keys, and a byte for each mean. No backward pass.
"""

import functools
import types
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..flex import MOST_CELLS, missing_compiler, tuned
from .call import RoutedCall
from .gather import choose_in_strips

MOST_LISTED = 2**28
"""Bytes of the lists of blocks."""
CUDA_CELLS = 128
"""Cells of a tile, and of a tile of queries, are multiples of this on CUDA."""


class Sizes(NamedTuple):
    """What a kernel is made for, beside shapes."""

    asking: int
    """Cells of a tile of queries."""
    tile: int
    """Cells of a tile of keys."""
    cells: int
    """Keys in tiles, padding included."""
    scale: float


def flex_refuses(call: RoutedCall) -> str | None:
    """Why FlexAttention can't compute a call; None where it can."""
    device, cells, wide = call.q.device, call.k.shape[2], call.q.shape[2]
    if device.type not in ("cpu", "cuda"):
        return f"it runs on cpu, cuda, and the tensors are on {device.type}"
    if call.q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it has no kernel for {call.q.dtype}"
    if call.needs_grad:
        return "it has no backward pass"
    if torch.compiler.is_compiling():
        return "an outer torch.compile is tracing"
    if device.type == "cuda" and (cells % CUDA_CELLS or wide % CUDA_CELLS):
        return f"on CUDA tiles need multiples of {CUDA_CELLS} cells, and have {cells} and {wide}"
    if call.tiles * cells > MOST_CELLS:
        return f"its compiled rule counts up to {MOST_CELLS} cells, and the grid has {call.tiles * cells}"
    listed = call.q.shape[0] * call.q.shape[1] * (8 * -(-_keys(call) // cells) + call.block_k.shape[1])
    if listed > MOST_LISTED:
        return f"its lists of blocks would be {listed / 2**20:.0f} MiB; larger tiles need less"
    return missing_compiler(device)


def _keys(call: RoutedCall) -> int:
    return call.tiles * call.k.shape[2] + call.other_k.shape[1] + call.block_k.shape[1]


def route_flex(call: RoutedCall, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output `(g, query tiles, cells, c)` and the chosen tiles `(g, query tiles, chosen)`, as `gather.route`."""
    if chosen is None:
        chosen = choose_in_strips(call) if call.lists is None else call.lists.tiles.expand(call.q.shape[0], -1, -1)
    q = call.q.flatten(1, 2)[None]
    k = torch.cat([call.k.flatten(1, 2), call.other_k, call.block_k.to(call.k.dtype)], dim=1)[None]
    v = torch.cat([call.v.flatten(1, 2), call.other_v, call.block_v.to(call.v.dtype)], dim=1)[None]
    sizes = Sizes(call.q.shape[2], call.k.shape[2], call.tiles * call.k.shape[2], call.scale)
    kernel = _compiled(sizes, q.shape, k.shape, v.shape, q.dtype, q.device)
    with tuned(q.device):
        out = kernel(q, k, v, _bias(call), _seen(call, chosen), *_lists(call, chosen), sizes=sizes)
    return out[0].unflatten(1, call.q.shape[1:3]), chosen


def _seen(call: RoutedCall, chosen: Tensor) -> Tensor:
    """Which keys behind the cells count, `(g, query tiles, keys)`: all others, and the means of no chosen tile."""
    seen = torch.ones(*chosen.shape[:2], call.tiles + 1, dtype=torch.int8, device=chosen.device)
    seen = seen.scatter_(-1, chosen, 0)[..., : call.tiles].repeat_interleave(call.blocks_per_tile, dim=-1)
    return F.pad(seen, (call.other_k.shape[1], 0), value=1)


def _bias(call: RoutedCall) -> Tensor:
    """What is added to the logits of every key, `(g, keys)`: log of its weight."""
    heads, number = call.q.shape[0], call.block_bias.dtype
    cells = call.q.new_zeros(1, call.tiles * call.k.shape[2], dtype=number) if call.bias is None else call.bias
    others = call.q.new_zeros(1, call.other_k.shape[1], dtype=number) if call.other_bias is None else call.other_bias
    parts = cells.flatten(1), others, call.block_bias
    return torch.cat([part.to(number).expand(heads, -1) for part in parts], dim=1)


def _lists(call: RoutedCall, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FlexAttention's counts and numbers of the blocks of keys that a rule is asked about, and of the whole ones."""
    heads, tiles, count = chosen.shape
    total = -(-_keys(call) // call.k.shape[2])
    whole = torch.zeros(1, heads, tiles, total, dtype=torch.int32, device=chosen.device)
    whole[0, :, :, :count] = chosen
    behind = torch.arange(call.tiles, total, dtype=torch.int32, device=chosen.device)
    asked = F.pad(behind, (0, total - behind.numel())).expand(1, heads, tiles, -1).contiguous()
    some = asked.new_full((1, heads, tiles), behind.numel())
    exact = (chosen < call.tiles).sum(-1, dtype=torch.int32)[None]
    return some, asked, exact, whole


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    seen: Tensor,
    asked_count: Tensor,
    asked: Tensor,
    whole_count: Tensor,
    whole: Tensor,
    *,
    sizes: Sizes,
) -> Tensor:
    """FlexAttention of tiles in a row; `seen` says which keys behind the cells, `(g, query tiles, keys)`."""

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return seen[head, query // sizes.asking, (key - sizes.cells).clamp(min=0)] != 0

    def weigh(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[head, key]

    blocks = BlockMask.from_kv_blocks(
        asked_count,
        asked,
        whole_count,
        whole,
        BLOCK_SIZE=(sizes.asking, sizes.tile),
        mask_mod=rule,
        seq_lengths=(q.shape[2], k.shape[2]),
        compute_q_blocks=False,
    )
    return flex_attention(q, k, v, score_mod=weigh, block_mask=blocks, scale=sizes.scale)


@functools.lru_cache(maxsize=256)
def _compiled(sizes: Sizes, *key: object) -> Callable[..., Tensor]:
    """A compiled `_kernel` for one shape."""
    own = types.FunctionType(_kernel.__code__.replace(), _kernel.__globals__, _kernel.__name__)
    return torch.compile(own, dynamic=False, fullgraph=True)
