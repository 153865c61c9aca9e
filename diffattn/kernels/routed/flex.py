"""The chosen tiles by FlexAttention: lists of blocks as data, the other tokens and the blocks' means behind the cells.

    keys = [ cells by tile | other tokens | means of the blocks ]
    exact: the chosen tiles as whole blocks of keys; looked at by a rule: all that lies behind the cells

One kernel for each shape, whatever is chosen: the lists, the choice and the biases are its inputs. Time
O(n (blocks + chosen keys + others) d), memory beyond inputs and output 8 bytes for each tile of queries and tile of
keys, and a byte for each mean. No backward pass.
"""

import functools
import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from ..block_lists import BlockLists
from ..block_mask import FURTHER, block_mask
from ..cuda import KEY_CELLS, cuda_options, size_refused
from ..flex import MOST_CELLS, missing_compiler, tuned
from .call import RoutedCall
from .gather import choose_in_strips

MOST_LISTED = 2**28
"""Bytes of the lists of blocks."""


class Sizes(NamedTuple):
    """What a kernel is made for, beside shapes."""

    asking: int
    """Cells of a tile of queries."""
    tile: int
    """Cells of a tile of keys."""
    cells: int
    """Keys in tiles, padding included."""
    scale: float


class Prepared(NamedTuple):
    """The kernel's inputs. Keys: cells by tile, other tokens, means; on CUDA both latter padded, by keys unseen."""

    q: Tensor  # 1 g queries d
    k: Tensor  # 1 g keys d
    v: Tensor  # 1 g keys c
    bias: Tensor  # g keys: log of the weight of a key
    seen: Tensor  # g query-tiles keys, int8: which of the keys behind the cells count
    lists: BlockLists
    sizes: Sizes

    def attend(self) -> Tensor:
        """`(g, queries, c)`."""
        shapes = tuple(tensor.shape for tensor in (self.q, self.k, self.v, *self.lists))
        options = cuda_options(self.q, (self.sizes.asking, self.sizes.tile)) if self.q.device.type == "cuda" else ()
        kernel = _compiled(self.sizes, options, shapes, self.q.dtype, self.q.device)
        with tuned(self.q.device):
            out: Tensor = kernel(*self, options)[0]
        return out


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
    if device.type == "cuda" and (cells % KEY_CELLS or wide % KEY_CELLS):
        return f"on CUDA tiles need multiples of {KEY_CELLS} cells, and have {cells} and {wide}"
    if call.tiles * cells > MOST_CELLS:
        return f"its compiled rule counts up to {MOST_CELLS} cells, and the grid has {call.tiles * cells}"
    listed = call.q.shape[0] * call.q.shape[1] * (8 * -(-_keys(call) // cells) + call.block_k.shape[1])
    if listed > MOST_LISTED:
        return f"its lists of blocks would be {listed / 2**20:.0f} MiB; larger tiles need less"
    refused = size_refused(call.q, call.v) if device.type == "cuda" else None
    return refused or missing_compiler(device)


def _keys(call: RoutedCall) -> int:
    return call.tiles * call.k.shape[2] + call.other_k.shape[1] + call.block_k.shape[1]


def route_flex(call: RoutedCall, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output `(g, query tiles, cells, c)` and the chosen tiles `(g, query tiles, chosen)`, as `gather.route`."""
    if chosen is None:
        chosen = choose_in_strips(call) if call.lists is None else call.lists.tiles.expand(call.q.shape[0], -1, -1)
    return prepare(call, chosen, call.q.device.type == "cuda").attend().unflatten(1, call.q.shape[1:3]), chosen


def prepare(call: RoutedCall, chosen: Tensor, cuda: bool) -> Prepared:
    """Lay the kernel's inputs out; for CUDA with padding and lists no wider than needed."""
    tile, others, means = call.k.shape[2], call.other_k.shape[1], call.block_k.shape[1]
    pads = _pads(others, means, tile) if cuda else (0, 0)
    parts = [(call.k.flatten(1, 2), call.other_k, call.block_k), (call.v.flatten(1, 2), call.other_v, call.block_v)]
    k, v = (
        torch.cat([cells, F.pad(other, (0, 0, 0, pads[0])), F.pad(mean.to(cells.dtype), (0, 0, 0, pads[1]))], dim=1)
        for cells, other, mean in parts
    )
    sizes = Sizes(call.q.shape[2], tile, call.tiles * tile, call.scale)
    lists = _lists(call, chosen, -(-k.shape[1] // tile), narrow=cuda)
    return Prepared(
        call.q.flatten(1, 2)[None], k[None], v[None], _bias(call, pads), _seen(call, chosen, pads), lists, sizes
    )


def _pads(others: int, means: int, tile: int) -> tuple[int, int]:
    """Keys of padding behind the other tokens and behind the means: one kernel for texts of many lengths."""
    step = math.lcm(FURTHER, tile)
    first = -others % FURTHER
    return first, -(others + first + means) % step


def _seen(call: RoutedCall, chosen: Tensor, pads: tuple[int, int]) -> Tensor:
    """Which keys behind the cells count, `(g, query tiles, keys)`: all others, and the means of no chosen tile."""
    seen = torch.ones(*chosen.shape[:2], call.tiles + 1, dtype=torch.int8, device=chosen.device)
    seen = seen.scatter_(-1, chosen, 0)[..., : call.tiles].repeat_interleave(call.blocks_per_tile, dim=-1)
    return F.pad(F.pad(seen, pads), (call.other_k.shape[1], 0), value=1)


def _bias(call: RoutedCall, pads: tuple[int, int]) -> Tensor:
    """What is added to the logits of every key, `(g, keys)`: log of its weight."""
    heads, number = call.q.shape[0], call.block_bias.dtype
    cells = call.q.new_zeros(1, call.tiles * call.k.shape[2], dtype=number) if call.bias is None else call.bias
    others = call.q.new_zeros(1, call.other_k.shape[1], dtype=number) if call.other_bias is None else call.other_bias
    parts = cells.flatten(1), F.pad(others, (0, pads[0])), F.pad(call.block_bias, (0, pads[1]))
    return torch.cat([part.to(number).expand(heads, -1) for part in parts], dim=1)


def _lists(call: RoutedCall, chosen: Tensor, total: int, narrow: bool) -> BlockLists:
    """The chosen tiles as whole blocks; a rule is asked about all blocks behind the cells."""
    heads, tiles, count = chosen.shape
    behind = torch.arange(call.tiles, total, dtype=torch.int32, device=chosen.device)
    width = max(count, behind.numel()) if narrow else total
    whole = torch.zeros(1, heads, tiles, width, dtype=torch.int32, device=chosen.device)
    whole[0, :, :, :count] = chosen
    asked = F.pad(behind, (0, width - behind.numel())).expand(1, heads, tiles, -1).contiguous()
    some = asked.new_full((1, heads, tiles), behind.numel())
    return BlockLists(some, asked, (chosen < call.tiles).sum(-1, dtype=torch.int32)[None], whole)


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    seen: Tensor,
    lists: BlockLists,
    sizes: Sizes,
    options: tuple[tuple[str, int], ...],
) -> Tensor:
    """FlexAttention of tiles in a row."""

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return seen[head, query // sizes.asking, (key - sizes.cells).clamp(min=0)] != 0

    def weigh(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[head, key]

    blocks = block_mask(tuple(lists), rule, (sizes.asking, sizes.tile), (q.shape[2], k.shape[2]))
    more: Any = dict(options) or None
    return flex_attention(q, k, v, score_mod=weigh, block_mask=blocks, scale=sizes.scale, kernel_options=more)


@functools.lru_cache(maxsize=256)
def _compiled(sizes: Sizes, *key: object) -> Callable[..., Tensor]:
    """A compiled `_kernel` for one shape."""
    own = types.FunctionType(_kernel.__code__.replace(), _kernel.__globals__, _kernel.__name__)
    return torch.compile(own, dynamic=False, fullgraph=True)
