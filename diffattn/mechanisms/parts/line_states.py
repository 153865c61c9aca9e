"""Gated linear recurrences along the lines of a grid, both ways, and their trained weights.

    S_t = a_t S_{t-1} + w_t g_t v_t^T     z_t = a_t z_{t-1} + w_t g_t     along a line, likewise from its end (b_t)
    out_t = (f_t S_t + f_t b_t S'_{t+1}) / (f_t z_t + f_t b_t z'_{t+1} + eps)

with f = softmax(sqrt(scale) q W_q) and g = softmax(sqrt(scale) k W_k) over few features for each head, gates
a_t = sigmoid(u k_t + e), b_t likewise, and w_t the weight that a mask gives key t (1 without). A cell counts once in
its own output, by the first direction. A hidden cell (w = 0) is passed over: its gates are 1.

Multiplied out, key j weighs f_i g_j exp(G_i - G_j) for j <= i, G being the sums of log a, and likewise behind. Lines of
more than `UNCUT` cells are cut into chunks of `CHUNK`: within one all pairs are computed, and from one to the next
states are handed on. No exponent is positive but by rounding.

Sources: the chunks are those of Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training,
https://arxiv.org/abs/2312.06635; one gate for each head and token as in Dao and Gu, Transformers are SSMs,
https://arxiv.org/abs/2405.21060.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffattn.grid import TokenGrid

AXES = {"frames": 0, "rows": 2, "columns": 1}
"""Axis of (frames, rows, columns) that a state runs along: along a row the columns change."""
UNCUT, CHUNK = 64, 32
"""Cells of the longest line that is not cut, and of a chunk: beyond, states cost fewer operations than pairs."""
LARGEST = 2**24
"""Weights of pairs that are held at once, over samples, heads and lines."""


class StateWeights(nn.Module):
    """One layer's weights. `mix` is zero at first, so that no state is added."""

    def __init__(self, heads: int, head_dim: int, *, axes: int, features: int) -> None:
        super().__init__()
        basis = cosines(head_dim, features)
        self.q_map = nn.Parameter(basis.repeat(heads, 1, 1))
        self.k_map = nn.Parameter(basis.repeat(heads, 1, 1))
        self.gate_weight = nn.Parameter(torch.zeros(axes, 2, heads, head_dim))
        # a from 0.73 in the first head to 0.98 in the last: states of 4 to 50 cells
        self.gate_bias = nn.Parameter(torch.linspace(1, 4, heads).expand(axes, 2, heads).clone())
        self.mix = nn.Parameter(torch.zeros(axes, heads, head_dim))

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """f and g `(b, h, n, features)` of queries and keys times the root of the scale."""
        return (q @ self.q_map.to(q)).softmax(dim=-1), (k @ self.k_map.to(k)).softmax(dim=-1)

    def log_gates(self, k: Tensor, axis: int) -> Tensor:
        """Logarithms of the gates along one of the axes, there and back, `(b, h, 2, n)`."""
        weight, bias = self.gate_weight[axis].to(k), self.gate_bias[axis].to(k)  # 2 h d, 2 h
        return F.logsigmoid(torch.einsum("bhnd,ehd->bhen", k, weight) + bias.T[None, :, :, None])


def cosines(head_dim: int, features: int) -> Tensor:
    """Orthonormal columns `(head_dim, features)`, without random numbers."""
    place, wave = torch.arange(head_dim) + 0.5, torch.arange(1, features + 1)
    basis = torch.cos(math.pi / head_dim * place[:, None] * wave) * math.sqrt(2 / head_dim)
    return basis if features < head_dim else torch.cat([basis[:, :-1], torch.full((head_dim, 1), head_dim**-0.5)], 1)


def as_lines(cells: Tensor, grid: TokenGrid, axis: int, whole: bool) -> Tensor:
    """Lines `(b, h, lines, length, ...)` along an axis of `(b, h, cells, ...)`; `whole`: one that runs through them."""
    lines = cells.unflatten(2, grid.shape).movedim(2 + axis, 4)
    return lines.flatten(2, 4).unsqueeze(2) if whole else lines.flatten(2, 3)


def as_cells(lines: Tensor, grid: TokenGrid, axis: int) -> Tensor:
    """Undo `as_lines`."""
    shape = [size for other, size in enumerate(grid.shape) if other != axis] + [grid.shape[axis]]
    return lines.flatten(2, 3).unflatten(2, shape).movedim(4, 2 + axis).flatten(2, 4)


def chunk_of(length: int) -> int:
    """Cells of a chunk of a line."""
    return length if length <= UNCUT else CHUNK


def read_lines(f: Tensor, g: Tensor, v: Tensor, logs: Tensor) -> Tensor:
    """Weighted sums of `v` `(b, h, lines, length, c)`, for f and g `(..., length, r)`, log gates `(..., length, 2)`."""
    side = chunk_of(f.shape[3])
    at_once = max(1, LARGEST // (f.shape[0] * f.shape[1] * side * side))
    parts = zip(*(x.split(at_once, dim=2) for x in (f, g, v, logs)), strict=True)
    return torch.cat([_read_chunks(*part) for part in parts], dim=2)


def _read_chunks(f: Tensor, g: Tensor, v: Tensor, logs: Tensor) -> Tensor:
    """`read_lines` of as many lines as are computed at once."""
    side = chunk_of(f.shape[3])
    chunks = list(zip(*(x.split(side, dim=3) for x in (f, g, v)), *_sums(logs, side), strict=True))
    if len(chunks) == 1:
        return _within(*chunks[0][:5])
    nothing = f.new_zeros(*f.shape[:3], f.shape[4], v.shape[4])
    behind = [nothing]
    for _, keys, values, _, before, total in reversed(chunks[1:]):
        weighted = keys * before.exp().unsqueeze(-1)
        behind.append(total[..., 1].exp()[..., None, None] * behind[-1] + weighted.mT @ values)
    ahead, out = nothing, []
    for queries, keys, values, until, before, total in chunks:
        own = _within(queries, keys, values, until, before)
        own = own + until.exp().unsqueeze(-1) * (queries @ ahead)
        own = own + (total[..., 1:] - before).exp().unsqueeze(-1) * (queries @ behind.pop())
        out.append(own)
        if len(out) < len(chunks):
            weighted = keys * (total[..., :1] - until).exp().unsqueeze(-1)
            ahead = total[..., 0].exp()[..., None, None] * ahead + weighted.mT @ values
    return torch.cat(out, dim=3)


def _sums(logs: Tensor, side: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """For each chunk: sums of the log gates up to a cell, of those back from before it, and of all `(..., 2)`."""
    chunks = logs.split(side, dim=3)
    sums = [chunk.cumsum(dim=3) for chunk in chunks]
    before = [own[..., 1] - chunk[..., 1] for own, chunk in zip(sums, chunks, strict=True)]
    return [own[..., 0] for own in sums], before, [own[..., -1, :] for own in sums]


def _within(f: Tensor, g: Tensor, v: Tensor, until: Tensor, before: Tensor) -> Tensor:
    """All pairs of a chunk: keys at or before a query by the gates ahead, those behind it by the gates back."""
    seen = torch.ones(f.shape[3], f.shape[3], dtype=torch.bool, device=f.device).tril()
    decay = torch.where(seen, until.unsqueeze(-1) - until.unsqueeze(-2), before.unsqueeze(-2) - before.unsqueeze(-1))
    return (f @ g.mT * decay.exp()) @ v


def read_lines_reference(f: Tensor, g: Tensor, v: Tensor, logs: Tensor) -> Tensor:
    """The same by the recurrence, cell by cell."""
    gates, length = logs.exp(), f.shape[3]
    out: list[Tensor] = []
    state = f.new_zeros(*f.shape[:3], f.shape[4], v.shape[4])
    for t in range(length):
        state = gates[..., t, 0, None, None] * state + g[..., t, :, None] * v[..., t, None, :]
        out.append((f[..., t, None, :] @ state).squeeze(-2))
    state = torch.zeros_like(state)
    for t in reversed(range(length)):
        state = gates[..., t, 1, None, None] * state
        out[t] = out[t] + (f[..., t, None, :] @ state).squeeze(-2)
        state = state + g[..., t, :, None] * v[..., t, None, :]
    return torch.stack(out, dim=3)


def operations(length: int, features: int, width: int) -> int:
    """Floating-point operations of `read_lines` for one line of one head, with values of `width`."""
    side = chunk_of(length)
    sizes = [min(side, length - start) for start in range(0, length, side)]
    pairs = sum(size * size for size in sizes)
    handed_on = 2 * length + 2 * length - sizes[0] - sizes[-1] if len(sizes) > 1 else 0
    return 2 * pairs * (features + width) + 2 * handed_on * features * width
