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
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .block_mask import tile_block_mask
from .call import WindowCall
from .order import TileOrder, tile_shape, whole_tile
from .pattern import Pattern, cached

BLOCK_CELLS = {"cpu": 32, "cuda": 128}
"""Cells of a block. CPU: 4 x 8 beats 8 x 8 by 7% at radius 8 and equals it at 16. CUDA wants multiples of 128."""
WHOLE_CELLS = {"cpu": (256, 1), "cuda": (128, 128)}
"""For a rule on tiles: the most cells of a block, and the number that must divide them. On CPUs 8 x 8 is 1.2 times
faster than 4 x 8, and 16 x 16 no slower than its parts."""
MOST_CELLS = 2**23
"""Cells that the compiled rule counts exactly, in float32 and with room for padding."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What the calls of one model share: the order of the cells and the blocks each of them touches."""

    order: TileOrder
    extra: int
    """Keys behind the cells that every cell sees."""
    block_mask: BlockMask


@cached(32)
def plan(
    pattern: Pattern, shape: tuple[int, int, int], extra: int, device: torch.device, block: int | None = None
) -> Plan:
    """The plan for a grid of `shape` (frames, rows, columns) with `extra` further keys."""
    tile = None if block else whole_tile(pattern, shape, *WHOLE_CELLS.get(device.type, (128, 128)))
    if tile is None:
        tile = tile_shape(pattern, shape, block or BLOCK_CELLS.get(device.type, 128), blocks=True)
    order = TileOrder(shape, tile)
    return Plan(order, extra, tile_block_mask(pattern, order, extra, device))


def _kernel(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float, bias: Tensor | None) -> Tensor:
    """FlexAttention, with `bias` `(b, h, keys)` added to the logits."""
    if bias is None:
        return flex_attention(q, k, v, block_mask=block_mask, scale=scale)

    def add_bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[batch, head, key]

    return flex_attention(q, k, v, score_mod=add_bias, block_mask=block_mask, scale=scale)


@functools.lru_cache(maxsize=256)
def _compiled(*key: object) -> Callable[..., Tensor]:
    """A compiled `_kernel` for `key` alone: with one for all, torch gives up compiling after its eighth shape."""
    own = types.FunctionType(_kernel.__code__.replace(), _kernel.__globals__, _kernel.__name__)
    return torch.compile(own, dynamic=False, fullgraph=True)


def run_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    *,
    scale: float,
    bias: Tensor | None = None,
    compiled: bool = True,
) -> Tensor:
    """FlexAttention of tensors already in the order of `block_mask`.

    `compiled=False` evaluates all scores: for tests. Inside a trace the outer compilation takes it in.
    """
    if torch.compiler.is_compiling() or not compiled:
        return _kernel(q, k, v, block_mask, scale, bias)
    static = (q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, scale, bias is None)
    kernel = _compiled(id(block_mask), *static)
    with tuned(q.device):
        return kernel(q, k, v, block_mask, scale, bias)


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
        return None if importlib.util.find_spec("triton") else "Triton is not installed"
    if device.type != "cpu":
        return f"FlexAttention has no kernel for {device.type}"
    if sys.platform != "linux" or torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
        return "FlexAttention's CPU kernel needs Linux and AVX2"
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    return None if any(map(shutil.which, compilers)) else f"no C++ compiler found ({', '.join(compilers)})"


def key_bias(call: WindowCall, order: TileOrder) -> Tensor | None:
    """The model's mask on keys as numbers to add, in the order of the keys: `(b, h, cells + extra)`."""
    masks = call.key_mask()
    if masks is None:
        return None
    cells, extra = (mask.transpose(2, 3) for mask in masks)  # b h keys 1
    bias = order.to_tiles(cells, extra).squeeze(-1)
    if bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=call.q.dtype).masked_fill(~bias, -torch.inf)
    return bias.expand(call.q.shape[0], call.q.shape[1], -1)


def flex_window_attention(call: WindowCall, *, compiled: bool = True, block: int | None = None) -> Tensor:
    """Order the tokens by tile, attend, and put them back."""
    grid = call.grid
    shared = plan(call.pattern, grid.shape, call.extra_keys, call.q.device, block)
    order = shared.order
    q, k, v = (grid.split(tensor)[0] for tensor in (call.q, call.k, call.v))
    extra_k, extra_v = call.extras()
    cells = run_flex(
        order.to_tiles(q),
        order.to_tiles(k, extra_k),
        order.to_tiles(v, extra_v),
        shared.block_mask,
        scale=call.scale,
        bias=key_bias(call, order),
        compiled=compiled,
    )
    return call.join(order.from_tiles(cells))
