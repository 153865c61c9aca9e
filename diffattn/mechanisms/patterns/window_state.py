"""A local window, and gated linear states along rows and columns for what lies outside; to be trained.

    out_q = softmax_k(scale * q k^T) v  +  sum_axis mix_axis * state_axis(q)
    k in { text } + { k : |position(q) - position(k)| < radius } + { means of other blocks, with `pool` }

The window is that of `clear`: text queries see all, and text is in the softmax alone. `state_axis(q)` reads, for a
cell, a sum over the cells of its own row (column, line of frames), each weighed by learned features of query and key
and by the gates between them, and divided by the sum of weights (`parts/line_states.py`). With `scan="grid"` the state
does not end with the line: row by row (column by column) it runs through all cells. `mix`, for each axis, head and
channel, is zero before training, and the result is the window's.

A model's mask m over the keys, the same for all queries, weighs cells in the state by exp(m); hidden ones are left out.

Source: Fu et al., LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local Attention and Mamba,
https://arxiv.org/abs/2408.02615, whose blocks have a scan with data-dependent decay in four directions (VMamba's: rows
and columns, there and back, through the whole image) and attention in windows. Differences: both are parts of one
attention layer with the model's own q, k, v, added up, where the paper has two sublayers in series with projections of
their own; a linear attention with one gate for each head and token in place of Mamba's discretised system, its
convolution and its output gate, and its output divided by the sum of weights; a round window in place of shifted tiles
with a position bias; text, masks, frames.

Time O(n (radius^2 + others) d + n min(length, 64) d) where `length` is that of a line. States are in float32 at least.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...config import register
from ...grid import TokenGrid
from ...options import POSITIVE, Must
from ..base import Context, Mechanism, default_scale
from ..clear import ClearAttention
from ..linear import weights_of_keys
from ..parts.axes import PerAxis, sizes
from ..parts.line_states import (
    AXES,
    StateWeights,
    as_cells,
    as_lines,
    operations,
    read_lines,
    read_lines_reference,
)

SCANS = ("lines", "grid")


@register("window_state")
@dataclass(frozen=True, kw_only=True)
class WindowStateAttention(Mechanism):
    """A round window and trained states along the lines of the grid.

    >>> WindowStateAttention(radius=8).flops(TokenGrid(64, 64, before=512), heads=24, head_dim=128) / 1e9
    68.091297792
    """

    one_mask: ClassVar[bool] = True

    radius: Annotated[float, POSITIVE]
    """Image tokens strictly nearer than this many tokens are seen by the softmax."""
    radius_t: Annotated[float | None, POSITIVE] = None
    """Radius along the frames; None makes the window a ball."""
    pool: Annotated[PerAxis | None, sizes(1)] = None
    """Sides of the blocks whose means stand for the cells outside the window, as in `clear`; None: not seen."""
    axes: Annotated[
        tuple[str, ...],
        Must(
            "some of rows, columns, frames, each once",
            lambda axes: 0 < len(axes) == len(set(axes)) and set(axes) <= AXES.keys(),
        ),
    ] = ("rows", "columns")
    """What states run along, there and back; add frames for videos."""
    scan: str = "lines"
    """Where a state ends: with its line, or with the grid, which it runs through line by line."""
    features: Annotated[int, Must("an int from 1 to 4096", lambda features: 1 <= features <= 4096)] = 16
    """Size of a state: features of queries and keys, at most the head dimension."""
    eps: Annotated[float, POSITIVE] = 1e-15
    """Added to the sum of weights that is divided by, so that a line whose cells are all hidden gives 0."""

    window: ClassVar[ClearAttention]
    """What each is without states; made once, as a compiler cannot trace the checks of options."""

    def __post_init__(self) -> None:
        super().__post_init__()
        window = ClearAttention(radius=self.radius, radius_t=self.radius_t, pool=self.pool)
        object.__setattr__(self, "window", window)
        if self.scan not in SCANS:
            raise ValueError(f"window_state: scan must be one of {', '.join(SCANS)}, got {self.scan!r}")

    @property
    def approximates(self) -> bool:
        return self.window.approximates

    @property
    def backends(self) -> tuple[str, ...]:
        """Those of the window; states are computed in one way."""
        return self.window.backends

    def explain_backend(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, backend: str, context: Context) -> str:
        return self.window.explain_backend(q, k, v, grid, backend, context)

    def check(self, grid: TokenGrid, *, context: Context = Context()) -> None:
        try:
            self.window.check(grid, context=context)
        except ValueError as error:
            raise ValueError(str(error).replace("clear:", f"{self.type}:", 1)) from error

    def weights(self, heads: int, head_dim: int) -> StateWeights:
        return StateWeights(heads, head_dim, axes=len(self.axes), features=min(self.features, head_dim))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        backend: str = "auto",
        context: Context = Context(),
    ) -> Tensor:
        weights, visible = self._weights(context), self._visible(context, q, grid)
        self.check(grid)
        self.check_backend(backend)
        local = self.window.attend(q, k, v, grid, scale=scale, backend=backend, context=context)
        if weights is None:
            return local
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        # autocast would take the sums in half precision again
        with torch.autocast(q.device.type, enabled=False):
            fine_q, fine_k, fine_v = (tensor[..., grid.cell_slice, :].to(dtype) for tensor in (q, k, v))
            states = self._states(fine_q, fine_k, fine_v, grid, scale, weights, visible, fast=True)
            return (local.to(dtype) + F.pad(states, (0, 0, grid.before, grid.after))).to(q.dtype)

    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        context: Context = Context(),
    ) -> Tensor:
        """The window by a dense mask, the states by their recurrence."""
        weights, visible = self._weights(context), self._visible(context, q, grid)
        self.check(grid)
        local = self.window.reference(q, k, v, grid, scale=scale, context=context)
        if weights is None:
            return local
        q, k, v = (tensor[..., grid.cell_slice, :] for tensor in (q, k, v))
        states = self._states(q, k, v, grid, scale, weights, visible, fast=False)
        return local + F.pad(states, (0, 0, grid.before, grid.after))

    def _weights(self, context: Context) -> StateWeights | None:
        """The layer's weights, after making sure that the mask is one for all queries; None: no state is added."""
        mask, weights = context.mask, context.weights
        if mask is not None and mask.dim() > 1 and mask.shape[-2] != 1:
            raise ValueError(
                f"window_state: a state is one for all queries, so a mask must be the same for all of them, "
                f"(b, 1, 1, keys), got {tuple(mask.shape)}; leave layers with such a mask out with layers="
            )
        if weights is not None and not isinstance(weights, StateWeights):
            raise ValueError(
                f"window_state: Context.weights must come from mechanism.weights(heads, head_dim), got a "
                f"{type(weights).__name__}"
            )
        return weights

    def _visible(self, context: Context, q: Tensor, grid: TokenGrid) -> Tensor | None:
        """What the mask lets count of each cell, `(b|1, h|1, cells, 1)`."""
        kept = weights_of_keys(context.mask, q)
        if kept is None:
            return None
        kept = kept[(None,) * (4 - kept.dim())]
        return kept.expand(-1, -1, grid.tokens, -1)[..., grid.cell_slice, :]

    def _states(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        scale: float | None,
        weights: StateWeights,
        visible: Tensor | None,
        *,
        fast: bool,
    ) -> Tensor:
        """What is added to the cells, `(b, h, cells, c)`."""
        scale = default_scale(q) if scale is None else scale
        if scale < 0:
            raise ValueError(
                f"window_state: scale goes to the features of queries and keys by its square root and must be at least "
                f"0, got {scale}"
            )
        root = math.sqrt(scale)
        read, whole = read_lines if fast else read_lines_reference, self.scan == "grid"
        f, g = weights.features(q * root, k * root)
        values = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        if visible is not None:
            g = g * visible
        out = torch.zeros_like(v)
        for number, name in enumerate(self.axes):
            logs = weights.log_gates(k * root, number).mT  # b h n 2
            if visible is not None:
                logs = torch.where(visible > 0, logs, torch.zeros_like(logs))
            lines = (as_lines(x, grid, AXES[name], whole) for x in (f, g, values, logs))
            sums = as_cells(read(*lines), grid, AXES[name])
            state = sums[..., :-1] / (sums[..., -1:] + self.eps)
            out = out + state * weights.mix[number, :, None].to(state)
        return out

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, *, context: Context = Context()) -> int:
        """Of the window; and of features, gates, states and their mix, though an untrained call has none."""
        features, cells = min(self.features, head_dim), grid.cells
        states = 4 * cells * head_dim * features
        for name in self.axes:
            length = cells if self.scan == "grid" else grid.shape[AXES[name]]
            states += cells // length * operations(length, features, head_dim + 1) + 6 * cells * head_dim
        return self.window.flops(grid, heads, head_dim, context=context) + states * heads
