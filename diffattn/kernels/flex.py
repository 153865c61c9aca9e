"""FlexAttention on tokens in tile order, where a window touches few blocks, and those densely.

The queries of the cells go through FlexAttention, with the keys that every cell sees (text, pooled) in blocks of their
own behind the cells; the queries off the grid see everything and are one plain SDPA. The kernel is compiled once for
each (plan, shape, dtype) in a process, however many layers call it.

Time O(n (window + block) d). On a CPU it needs a C++ compiler and has no backward pass.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from .block_mask import FURTHER, Blocks, Rule, block_mask, check_padding, cuda_blocks, key_coordinates, tile_blocks
from .call import WindowCall
from .cuda import cuda_options, cuda_order, cuda_refuses
from .order import TileOrder, tile_shape, whole_tile
from .pattern import Pattern, Shape, cached

BLOCK_CELLS = 32
"""Cells of a block on a CPU: 4 x 8 beats 8 x 8 by 7% at radius 8 and equals it at 16."""
WHOLE_CELLS = 256
"""For a rule on tiles, the most cells of a block on a CPU: 8 x 8 is 1.2 times faster than 4 x 8, and 16 x 16 no slower
than its parts."""
MOST_CELLS = 2**23
"""Cells that the compiled rule counts exactly, in float32 and with room for padding."""


class Plan(NamedTuple):
    """What the calls of one model share: the order of the cells and the blocks each of them touches."""

    order: TileOrder
    further: int
    """Keys behind the cells, padding included."""
    blocks: Blocks
    looks_up: bool = False
    """Does the rule look coordinates up?"""


def plan(pattern: Pattern, shape: Shape, extra: int, device: torch.device, backward: bool = False) -> Plan:
    """The plan for a grid of `shape` (frames, rows, columns) with `extra` further keys that all cells see.

    On CUDA `backward` asks for the lists that gradients need.
    """
    return (
        cuda_plan(pattern, shape, extra, device, backward) if device.type == "cuda" else cpu_plan(pattern, shape, extra)
    )


@cached(32)
def cpu_plan(pattern: Pattern, shape: Shape, extra: int) -> Plan:
    """Exactly the keys there are: no kernel is as good on padding."""
    order = cpu_order(pattern, shape)
    return Plan(order, extra, tile_blocks(pattern, order, extra))


def cpu_order(pattern: Pattern, shape: Shape) -> TileOrder:
    """The order in which a window touches few keys."""
    tile = whole_tile(pattern, shape, WHOLE_CELLS)
    return TileOrder(shape, tile or tile_shape(pattern, shape, BLOCK_CELLS, blocks=True))


def order_of(call: WindowCall) -> TileOrder:
    """The order that the kernel puts the cells of a call in."""
    if call.q.device.type == "cuda":
        return cuda_order(call.pattern, call.grid.shape, call.needs_grad)
    return cpu_order(call.pattern, call.grid.shape)


def takes_order(call: WindowCall) -> bool:
    """Are the cells of a call in the kernel's own order?"""
    return call.mask is None and call.order == order_of(call)


def cuda_plan(pattern: Pattern, shape: Shape, extra: int, device: torch.device, backward: bool) -> Plan:
    """Further keys are padded, so that one kernel serves texts of many lengths."""
    padded = -(-extra // FURTHER) * FURTHER
    return _cuda_plan(pattern, shape, padded, padded == extra, device, backward)


@cached(32)
def _cuda_plan(pattern: Pattern, shape: Shape, further: int, whole: bool, device: torch.device, backward: bool) -> Plan:
    check_padding(pattern)
    order = cuda_order(pattern, shape, backward)
    blocks = cuda_blocks(pattern, order, further, whole=whole, backward=backward, device=device)
    return Plan(order, further, blocks, looks_up=True)


class Static(NamedTuple):
    """What a kernel is made for, beside shapes: all that is in its key and no tensor."""

    rule: Rule
    size: tuple[int, int]
    lengths: tuple[int, int]
    scale: float
    options: tuple[tuple[str, int], ...]


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: tuple[Tensor, ...],
    coordinates: tuple[Tensor, ...],
    bias: Tensor | None,
    static: Static,
) -> Tensor:
    """FlexAttention, with `bias` `(b, h, keys)` added to the logits."""

    def add_bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert bias is not None
        return score + bias[batch, head, key]

    options: Any = dict(static.options) or None
    mask = block_mask(lists, static.rule.mask_mod(coordinates), static.size, static.lengths)
    return flex_attention(
        q,
        k,
        v,
        score_mod=None if bias is None else add_bias,
        block_mask=mask,
        scale=static.scale,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=options,
    )


@functools.lru_cache(maxsize=256)
def _compiled(*key: object) -> Callable[..., Tensor]:
    """A compiled `_kernel` for `key` alone: with one for all, torch gives up compiling after its eighth shape."""
    own = types.FunctionType(_kernel.__code__.replace(), _kernel.__globals__, _kernel.__name__)
    return torch.compile(own, dynamic=False, fullgraph=True)


def run_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    *,
    scale: float,
    coordinates: tuple[Tensor, ...] = (),
    bias: Tensor | None = None,
    compiled: bool = True,
) -> Tensor:
    """FlexAttention of tensors already in the order of `blocks`. Keys and values may have fewer heads than queries.

    Args:
        coordinates: those of `key_coordinates`, for a rule that looks them up.
        bias: `(b, h, keys)`, added to the logits.
        compiled: False evaluates all scores: for tests. Inside a trace the outer compilation takes it in.
    """
    options = () if q.device.type != "cuda" else cuda_options(q, blocks.size)
    static = Static(blocks.rule, blocks.size, blocks.lengths, scale, options)
    tensors = q, k, v, blocks.tensors, coordinates, bias
    if torch.compiler.is_compiling() or not compiled:
        return _kernel(*tensors, static)
    layouts = tuple((x.shape, x.stride()) for x in (q, k, v, *blocks.tensors))
    kernel = _compiled(static, layouts, q.dtype, q.device, len(coordinates), bias is None)
    with tuned(q.device):
        return kernel(*tensors, static)


@cached(8)
def _coordinates(order: TileOrder, further: int, real: int, device: torch.device) -> tuple[Tensor, ...]:
    """Kept for the texts of a few calls: all layers ask for the same."""
    return key_coordinates(order, further, real, device)


@contextlib.contextmanager
def tuned(device: torch.device) -> Iterator[None]:
    """Let Inductor compile the CPU kernels better meanwhile. The sums are the same.

    Where torch has no such switches (other versions), nothing is changed. Register blocks: torch 2.13 multiplies one
    query by 16 keys at once, and spends most of q k^T on reading keys; 8 queries are 1.7 times faster at radius 8 and
    1.9 times at 16 with AVX-512, where 16 keys are a vector; AVX2 holds 8.
    """
    if device.type != "cpu":
        yield
        return
    template = _flex_template()
    config = importlib.import_module("torch._inductor.config")
    with contextlib.ExitStack() as stack:
        if hasattr(template, "GemmBlocking"):
            blocking, keys = template.GemmBlocking, 16 if has_avx512() else 8
            larger = lambda rows, columns, depth: blocking(max(rows, 8), keys, depth)  # noqa: E731
            stack.enter_context(mock.patch.object(template, "GemmBlocking", larger))
        if getattr(config.cpp, "march", "") is None and (moves := _wide_moves()):
            stack.enter_context(config.patch({"cpp.march": " ".join(["native", *moves])}))
        yield


@functools.cache
def _wide_moves() -> tuple[str, ...]:
    """Flags by which the compiler copies a whole vector in one move; none where it has no such flags (GCC from 12 on).

    torch loads the key indices of the rule through a copy; where that is cut in two, as GCC does for AMD's Zen 3, the
    load after it waits for both, and the kernel takes 1.3 times as long.
    """
    bits = 512 if has_avx512() else 256
    flags = f"-mmove-max={bits}", f"-mstore-max={bits}"
    compiler = importlib.import_module("torch._inductor.cpp_builder").get_cpp_compiler()
    asked = [compiler, "-march=native", *flags, "-x", "c++", "-E", os.devnull]
    known = subprocess.run(asked, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode == 0
    return flags if known else ()


def has_avx512() -> bool:
    """Whether torch's CPU kernels use AVX-512."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


@functools.cache
def _flex_template() -> types.ModuleType:
    """Inductor's template of the CPU kernel."""
    with warnings.catch_warnings():
        # Inductor's import runs torch.utils.mkldnn, which still decorates with torch's deprecated script_method.
        warnings.filterwarnings("ignore", r"`torch\.jit\.script_method` is deprecated", DeprecationWarning)
        importlib.import_module("torch._inductor.compile_fx")
    return importlib.import_module("torch._inductor.codegen.cpp_flex_attention_template")


def missing_compiler(device: torch.device) -> str | None:
    """Why torch.compile can't make FlexAttention's kernel for `device`; None where it can."""
    if device.type == "cuda":
        return cuda_refuses(device)
    if device.type != "cpu":
        return f"FlexAttention has no kernel for {device.type}"
    if sys.platform != "linux" or torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
        return "FlexAttention's CPU kernel needs Linux and AVX2"
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    return None if any(map(shutil.which, compilers)) else f"no C++ compiler found ({', '.join(compilers)})"


def key_bias(call: WindowCall, order: TileOrder, missing: int = 0) -> Tensor | None:
    """The model's mask on keys as numbers to add, in the order of the keys: `(b, h, cells + extra + missing)`."""
    masks = call.key_mask()
    if masks is None:
        return None
    cells, extra = (mask.transpose(2, 3) for mask in masks)  # b h keys 1
    bias = order.to_tiles(cells, extra, missing).squeeze(-1)
    if bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=call.q.dtype).masked_fill(~bias, -torch.inf)
    return bias.expand(call.q.shape[0], call.q.shape[1], -1)


class Ordered(NamedTuple):
    """A call whose tokens are in tile order."""

    order: TileOrder
    q: Tensor
    k: Tensor
    v: Tensor
    blocks: Blocks
    scale: float
    coordinates: tuple[Tensor, ...]
    bias: Tensor | None

    def attend(self, *, compiled: bool = True) -> Tensor:
        """The output of the cells, in tile order."""
        _, q, k, v, blocks, scale, coordinates, bias = self
        return run_flex(q, k, v, blocks, scale=scale, coordinates=coordinates, bias=bias, compiled=compiled)


def ordered_call(call: WindowCall) -> Ordered:
    """Put the tokens in tile order, the keys that every cell sees behind the cells."""
    grid, device = call.grid, call.q.device
    shared = plan(call.pattern, grid.shape, call.extra_keys, device, call.needs_grad)
    order, missing = shared.order, shared.further - call.extra_keys
    q, k, v = (grid.split(tensor)[0] for tensor in (call.q, call.k, call.v))
    extra_k, extra_v = call.extras()
    in_order = order.to_tiles if call.order is None else with_extra
    return Ordered(
        order,
        q if call.order is not None else order.to_tiles(q),
        in_order(k, extra_k, missing),
        in_order(v, extra_v, missing),
        shared.blocks,
        call.scale,
        _coordinates(order, shared.further, call.extra_keys, device) if shared.looks_up else (),
        key_bias(call, order, missing),
    )


def with_extra(cells: Tensor, extra: Tensor, missing: int) -> Tensor:
    """`TileOrder.to_tiles` for cells in the order already."""
    padding = extra.new_zeros(()).expand(*extra.shape[:2], missing, extra.shape[3])
    return torch.cat([cells, extra, padding], dim=2) if extra.shape[2] + missing else cells


def flex_window_attention(call: WindowCall, *, compiled: bool = True) -> Tensor:
    """Order the tokens by tile, attend, and put them back; cells that come in the order stay in it."""
    ordered = ordered_call(call)
    if call.order is not None:
        return call.join(ordered.attend(compiled=compiled))
    return call.join(ordered.order.from_tiles(ordered.attend(compiled=compiled)))
