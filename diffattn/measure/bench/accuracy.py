"""How far a kernel's output lies from softmax attention in float64: at some queries, or on a smaller grid."""

import torch
from torch import Tensor

from diffattn.grid import TokenGrid
from diffattn.kernels.pattern import Cells, Pattern
from diffattn.mechanisms import Mechanism
from diffattn.mechanisms.softmax import softmax_reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest absolute error of an output, for unit-normal inputs."""

CHECKED_QUERIES = 64
REFERENCE_CELLS = 1024
"""Cells of the grid on which mechanisms that are no windows meet their reference."""


def error_of(mechanism: Mechanism, out: Tensor, grid: TokenGrid, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Largest absolute difference of a mechanism's output to float64, at some queries or on a smaller grid."""
    scaled = getattr(mechanism, "proportional", False)  # by other than 1/sqrt(d)
    if not mechanism.exact and (not mechanism.only_pattern or scaled):
        return error_on_small_grid(mechanism, grid, q)
    rows = checked_queries(grid)
    want = exact_rows(mechanism.pattern(grid), grid, rows, q, k, v)
    return difference(out[..., rows.to(out.device), :], want)


def checked_queries(grid: TokenGrid) -> Tensor:
    """Some queries, first, last and the grid's corners among them, spread by a stride that is no multiple of a side."""
    first, last = grid.before, grid.before + grid.cells - 1
    corners = [0, first, first + grid.width - 1, last - grid.width + 1, last, grid.tokens - 1]
    spread = torch.linspace(0, grid.tokens - 1, CHECKED_QUERIES).long()
    return torch.cat([torch.tensor(corners), spread]).unique()


def exact_rows(pattern: Pattern | None, grid: TokenGrid, rows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention in float64 of the queries `rows` under a window pattern (None: all keys)."""
    q, k, v = (tokens.double().cpu() for tokens in (q[..., rows.to(q.device), :], k, v))
    mask = None if pattern is None else mask_rows(pattern, grid, rows)
    return softmax_reference(q, k, v, mask=mask)


def mask_rows(pattern: Pattern, grid: TokenGrid, rows: Tensor) -> Tensor:
    """Some rows of the dense mask of a window pattern, `(rows, tokens)`."""
    mask = torch.ones(len(rows), grid.tokens, dtype=torch.bool)
    cells = rows - grid.before
    on_grid = (cells >= 0) & (cells < grid.cells)
    axes = grid.positions()
    query = Cells(*(axis[cells[on_grid]][:, None] for axis in axes))
    inside = torch.ones(len(query.row), grid.tokens, dtype=torch.bool)
    inside[:, grid.cell_slice] = pattern.allowed(query, Cells(*(axis[None] for axis in axes)))
    mask[on_grid] = inside
    return mask


def error_on_small_grid(mechanism: Mechanism, grid: TokenGrid, like: Tensor) -> float:
    """Largest absolute difference of `attend` to the mechanism's own reference in float64, on a smaller grid."""
    small = reduced(grid)
    generator = torch.Generator().manual_seed(0)
    shape = (1, like.shape[1], small.tokens, like.shape[-1])
    q, k, v = (torch.randn(shape, generator=generator).to(like.device, like.dtype) for _ in range(3))
    return difference(mechanism.attend(q, k, v, small), mechanism.reference(q.double(), k.double(), v.double(), small))


def reduced(grid: TokenGrid) -> TokenGrid:
    """`grid` with its sides halved until it has at most `REFERENCE_CELLS` cells, and at most 64 text tokens a side."""
    frames, height, width = grid.shape
    while frames * height * width > REFERENCE_CELLS:
        if frames > max(height, width):
            frames //= 2
        elif height >= width:
            height //= 2
        else:
            width //= 2
    return TokenGrid(height, width, frames, min(grid.before, 64), min(grid.after, 64))


def difference(out: Tensor, want: Tensor) -> float:
    """Largest absolute difference, in float64."""
    return float((out.to(want.device).double() - want.double()).abs().max())
