"""What runs in a benchmark: CLEAR by every kernel, the released code's order of the tokens, and other mechanisms."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from diffattn.grid import TokenGrid
from diffattn.kernels import BACKENDS, window_attention
from diffattn.kernels.call import WindowCall
from diffattn.kernels.dense import dense_bytes, free_bytes
from diffattn.kernels.flex import ordered_call, run_flex
from diffattn.mechanisms import ClearAttention, Mechanism

from ..cost import as_in_a_model
from .results import ROWS
from .row_major import row_major_blocks

DENSE_SHARE = 0.5
"""Share of the free memory that the dense mask may take."""
DENSE_TOKENS = 8192
"""Tokens beyond which the dense mask, far slower than full attention, runs only when asked for by name."""


def _unchanged(out: Any) -> Any:
    return out


@dataclass(frozen=True)
class Contestant:
    """One kernel on given tensors."""

    name: str
    mechanism: Mechanism
    run: Callable[[], Any]
    finish: Callable[[Any], Tensor] = field(default=_unchanged)
    """Brings what `run` returns to `(1, h, n, d)` in the order of the tokens; not timed."""


def others(mechanism: Mechanism, grid: TokenGrid, q: Tensor, k: Tensor, v: Tensor) -> Contestant:
    """A mechanism as a model would call it, with fresh weights where it has some."""
    mechanism.check(grid)
    run = partial(mechanism.attend, q, k, v, grid, context=as_in_a_model(mechanism, q))
    return Contestant(str(mechanism), mechanism, run)


def windows(
    rows: tuple[str, ...] | None, grid: TokenGrid, mechanism: ClearAttention, q: Tensor, k: Tensor, v: Tensor
) -> tuple[list[Contestant], list[str]]:
    """The asked-for rows of CLEAR (None: all that are worth their time), and why others do not run."""
    call = WindowCall(q, k, v, grid, mechanism.pattern(grid), q.shape[-1] ** -0.5)
    chosen, skipped = select(rows, call)
    found = [Contestant(ROWS[row], mechanism, *_functions(row, call)) for row in chosen]
    return found, [f"{ROWS[row]} of {mechanism} on {grid}: {reason}" for row, reason in skipped.items()]


def select(rows: tuple[str, ...] | None, call: WindowCall) -> tuple[list[str], dict[str, str]]:
    """The rows that run, and the others with the reason."""
    skipped = {}
    for row in ROWS if rows is None else rows:
        reason = refusal(row, call)
        if reason is None and rows is None and row == "dense" and call.grid.tokens > DENSE_TOKENS:
            reason = "it takes many times full attention's time; --backends dense runs it"
        if reason is not None:
            skipped[row] = reason
    return [row for row in (ROWS if rows is None else rows) if row not in skipped], skipped


def refusal(row: str, call: WindowCall) -> str | None:
    """Why a row cannot run; None where it can."""
    if row == "dense":
        free = free_bytes(call.q.device)
        if free is not None and dense_bytes(call) > DENSE_SHARE * free:
            return f"its mask needs {dense_bytes(call) / 2**30:.1f} GiB of the {free / 2**30:.1f} GiB that are free"
    return BACKENDS[row if row in BACKENDS else "flex"].refuses(call)


def _functions(row: str, call: WindowCall) -> tuple[Callable[[], Any], Callable[[Any], Tensor]]:
    """What is timed, and what brings its result into the order of the tokens."""
    q, k, v, grid, pattern, scale = call.q, call.k, call.v, call.grid, call.pattern, call.scale
    if row == "tile-once":
        return _permuted_once(call)
    if row == "official":
        blocks = row_major_blocks(pattern, grid, q.device)
        return partial(_released_kernel(), q, k, v, block_mask=blocks.mask(), scale=scale), _unchanged
    if row == "row-major":
        blocks = row_major_blocks(pattern, grid, q.device, released=False)
        return partial(run_flex, q, k, v, blocks, scale=scale), _unchanged
    backend = "flex" if row == "tile" else row
    return partial(window_attention, q, k, v, grid, pattern, scale=scale, backend=backend), _unchanged


def _released_kernel() -> Callable[..., Tensor]:
    """FlexAttention as the released code compiles it: stock settings.

    Kept out of Inductor's cache, which cannot tell it from our kernel of other register tiles on the same graph.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return flex_attention(q, k, v, **options)

    return torch.compile(attention, dynamic=False, options={"fx_graph_cache": False})


def _permuted_once(call: WindowCall) -> tuple[Callable[[], Any], Callable[[Any], Tensor]]:
    """The tile order on tensors that are in it already, as in a model that permutes once for all its layers."""
    grid = call.grid
    ordered = ordered_call(call)

    def run() -> tuple[Tensor, Tensor | None]:
        return ordered.attend(), call.attend_others() if grid.others else None

    def finish(out: tuple[Tensor, Tensor | None]) -> Tensor:
        cells, rest = ordered.order.from_tiles(out[0]), out[1]
        return cells if rest is None else grid.join(cells, rest)

    return run, finish
