"""FlexAttention on CUDA: the order and the blocks of a window, and the kernel's settings for a card.

Blocks: 128 queries, two neighbouring tiles of 64 cells, look at tiles of 64 keys; whole tiles of 64 cells without any
rule. Gradients: 128 x 128, which the backward kernels of every card take. The settings are those that
`tests/cuda_code` compiles: they fit the shared memory of a card, and spill few registers or none.
"""

import importlib.util
import os
import shutil
from typing import NamedTuple

import torch
from torch import Tensor

from .order import TileOrder, tile_shape, whole_tile
from .pattern import Pattern, Shape

QUERY_CELLS, KEY_CELLS = 128, 64
"""Cells of a block of queries and of a block of keys."""
LEAST_HEAD_DIM, MOST_HEAD_DIM = 16, 256
"""FlexAttention has no kernel for fewer; for more no settings were tried."""
LEAST_CAPABILITY = 8, 0
"""Of older cards no settings were tried."""
SMALL_SHARED = frozenset({(8, 6), (8, 7), (8, 9), (12, 0), (12, 1)})
"""Capabilities with 99 KiB of shared memory for a block of threads; the others have 163 or more."""
Options = tuple[tuple[str, int], ...]


def cuda_order(pattern: Pattern, shape: Shape, backward: bool) -> TileOrder:
    """The order in which a window touches few keys."""
    cells = QUERY_CELLS if backward else KEY_CELLS
    whole = whole_tile(pattern, shape, QUERY_CELLS, cells)
    if whole is not None:
        return TileOrder(shape, whole)
    return TileOrder(shape, tile_shape(pattern, shape, cells, blocks=True), paired=not backward)


class Tuning(NamedTuple):
    """Settings of a kernel: queries and keys of one step, warps, stages of its pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


def forward_tuning(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> Tuning:
    """For blocks of 128 queries.

    With 4 warps 128 x 64 fills all registers and doubles the instructions of a warp. Two stages on Hopper: the next
    block's keys arrive while one is computed, and what is left of the memory caches the coordinates. Two where three
    leave 2 KB of the shared memory, which the tables of a video and a mask may not find enough.
    """
    if dtype == torch.float32:
        return Tuning(64, 16, 8, 2) if head_dim <= 128 else Tuning(32, 16, 4, 1)
    if head_dim <= 64:
        return Tuning(128, 64, 8, 3)
    if head_dim <= 128:
        return Tuning(128, 64, 8, 2 if capability[0] == 9 or capability in SMALL_SHARED else 3)
    return Tuning(64, 32 if capability in SMALL_SHARED else 64, 8, 2)


def backward_tuning(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> Tuning | None:
    """For both of its loops; None: torch's own settings.

    With 4 warps, as torch has them, heads of 128 spill 420 bytes a thread on Ampere and Ada, with 8 warps none.
    """
    if dtype == torch.float32:
        return None
    if head_dim > 128:
        return Tuning(32, 32, 8, 1)
    if capability[0] == 10 or (head_dim > 64 and capability[0] != 9):
        return Tuning(64, 64, 8, 2)
    return None


def cuda_options(q: Tensor, size: tuple[int, int]) -> Options:
    """FlexAttention's `kernel_options` for blocks of `size` queries and keys."""
    card = torch.cuda.get_device_capability(q.device), q.dtype, q.shape[-1]
    forward, backward = forward_tuning(*card), backward_tuning(*card)
    queries = min(forward.queries, size[0])
    options = (
        ("fwd_BLOCK_M", queries),
        ("fwd_BLOCK_N", min(forward.keys, size[1])),
        ("fwd_num_warps", forward.warps if queries == forward.queries else 4),
        ("fwd_num_stages", forward.stages),
    )
    if backward is None:
        return options
    m, n, warps, stages = backward
    sides = (("bwd_BLOCK_M1", m), ("bwd_BLOCK_N1", n), ("bwd_BLOCK_M2", n), ("bwd_BLOCK_N2", m))
    return (*options, *sides, ("bwd_num_warps", warps), ("bwd_num_stages", stages))


def size_refused(q: Tensor, v: Tensor) -> str | None:
    """Why no kernel takes heads of this size; None where one does."""
    sizes = q.shape[-1], v.shape[-1]
    if min(sizes) >= LEAST_HEAD_DIM and max(sizes) <= MOST_HEAD_DIM:
        return None
    found = f"{sizes[0]}" if sizes[0] == sizes[1] else f"{sizes[0]} and {sizes[1]}"
    return f"its kernels take heads of {LEAST_HEAD_DIM} to {MOST_HEAD_DIM} numbers, and these have {found}"


def cuda_refuses(device: torch.device) -> str | None:
    """Why no kernel can be made for a card; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"Triton needs a C compiler, and none was found ({', '.join(compilers)})"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        least, own = (".".join(map(str, version)) for version in (LEAST_CAPABILITY, capability))
        return f"its settings are for cards of compute capability {least} or more, and this one has {own}"
    return None
