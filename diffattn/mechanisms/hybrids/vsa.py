"""VSA: every cube sees the cubes that matter most exactly, and all of them by their means, through a trained gate.

    C_I,j = scale * (mean of q in cube I) (mean of k in cube j)
    o_q   = softmax over the tokens of S_I of (scale * q k^T) v  +  G_q * sum_j softmax_j(C_I,j) (mean of v in cube j)
    S_I   = the ceil(share * cubes) cubes j of the largest C_I,j          G = gate of the layer's hidden states

Cubes are boxes of 4 x 4 x 4 tokens, those at the ends of the grid smaller. The two parts are not normalised together: a
chosen cube is in both. `G` has a number for each token, head and channel: a linear layer on what the attention module
is given (the block's normed and modulated hidden states), zero before training, when what is in no chosen cube is not
seen at all: so a pretrained model needs training after the swap.

Source: Zhang et al., VSA: Faster Video Diffusion with Trainable Sparse Attention, https://arxiv.org/abs/2505.13389, and
the released code for Wan. Differences: other tokens (text) are in no cube; all cells see them exactly, and they see all
and have no gate (Wan's self-attention has none; the code for MiniMax-H3 cuts them into tiles of their own, which are in
the means too: weights for it are refused). Masks over the keys, also in the means. Products of means are taken in
float32 at least, where the code takes the dtype of the inputs.

`diffattn.load` reads published weights (`diffattn/adapters/published`).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...config import register
from ...grid import TokenGrid
from ...kernels.routed import RoutedCall
from ...kernels.routed.call import places
from ...options import Must, at_least
from ..base import Context, Mechanism, Seen, default_scale
from ..linear import key_mask
from ..parts.axes import PerAxis, per_axis, sizes
from ..parts.exact_tiles import members, only_densely
from ..parts.linear_branch import weights_of_cells
from ..softmax import softmax_reference
from .branched import ZeroLinear
from .chosen_tiles import ChosenTiles, hidden_tiles, mean_queries

SHARE = Must("a number above 0 and at most 1", lambda share: 0 < share <= 1)


class VSAWeights(nn.Module):
    """One layer's gate, zero at first. Names and shapes are those of published files."""

    def __init__(self, channels: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.to_gate_compress = ZeroLinear(channels, heads * head_dim)

    def gates(self, hidden: Tensor, heads: int) -> Tensor:
        """G of hidden states `(b, n, channels)`, `(b, h, n, c)`, in their dtype."""
        weight, bias = self.to_gate_compress.weight.to(hidden), self.to_gate_compress.bias.to(hidden)
        return F.linear(hidden, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)


@register("vsa")
@dataclass(frozen=True, kw_only=True)
class VideoSparseAttention(Mechanism):
    """Exact attention to chosen cubes, and all cubes by their means through a gate. Time O(share n^2 d).

    >>> VideoSparseAttention(top_share=0.2).part.exact_tiles(TokenGrid(30, 52, frames=21))
    125
    """

    one_mask: ClassVar[bool] = True

    top_share: Annotated[float, SHARE] = 0.2
    """Of the cubes, rounded up: those that each cube sees exactly; 1 less the published sparsity."""
    tile: Annotated[PerAxis, sizes(1)] = 4
    """Sides of a cube in tokens: (rows, columns), (frames, rows, columns), or one int for all of them."""
    channels: Annotated[int | None, at_least(1)] = None
    """Of the hidden states that the gate sees; None: as many as all heads have together."""

    chosen_tiles: ClassVar[ChosenTiles]
    """What each is without the gate; made once, as a compiler cannot trace the checks of options."""

    def __post_init__(self) -> None:
        super().__post_init__()
        tile = per_axis(self.tile, 1)
        object.__setattr__(self, "chosen_tiles", ChosenTiles(share=self.top_share, up=True, tile=tile, asking=tile))

    @property
    def part(self) -> ChosenTiles:
        """The exact attention."""
        return self.chosen_tiles

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"hidden"})

    @property
    def scales(self) -> bool:
        return True

    @property
    def backends(self) -> tuple[str, ...]:
        return self.part.backends

    def explain_backend(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, backend: str, context: Context) -> str:
        return self.part.explain_backend(q, k, v, grid, backend, context)

    def check(self, grid: TokenGrid, *, context: Context = Context()) -> None:
        if grid.frames > 1 and isinstance(self.tile, tuple) and len(self.tile) == 2:
            raise ValueError(
                f"vsa: tile={self.tile} says nothing of frames, and the grid {grid} has {grid.frames}; give (frames, "
                f"rows, columns), such as tile={(1, *self.tile)} to keep frames apart"
            )

    def weights(self, heads: int, head_dim: int) -> VSAWeights:
        return VSAWeights(self.channels or heads * head_dim, heads, head_dim)

    def _gates(self, q: Tensor, grid: TokenGrid, context: Context) -> Tensor | None:
        """G of the cells, `(b, h, cells, c)`; None: no layer was given, and cubes are not seen by their means."""
        key_mask(context.mask)
        if context.weights is None:
            return None
        if not isinstance(context.weights, VSAWeights):
            raise ValueError(
                f"vsa: Context.weights must come from mechanism.weights(heads, head_dim), got a "
                f"{type(context.weights).__name__}"
            )
        if context.hidden is None:
            raise ValueError(
                "vsa: the gate sees what the attention module is given, and Context.hidden is missing; where gradient "
                "checkpointing computes a layer alone, use the model's own enable_gradient_checkpointing"
            )
        hidden = hidden_of_cells(context.hidden, grid)
        own, given = context.weights.to_gate_compress.in_features, hidden.shape[-1]
        if own != given:
            raise ValueError(
                f"vsa: hidden states have {given} channels, and the gate sees {own}: give channels={given}"
            )
        return context.weights.gates(hidden, q.shape[1])

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
        self.check_backend(backend)
        self.check(grid)
        grid.check(q, k)
        gates, own = self._gates(q, grid, context), replace(context, weights=None)
        if gates is not None and (backend == "dense" or only_densely(context.mask) is not None):
            number = torch.promote_types(q.dtype, torch.float32)
            asking, keys, values = (x.to(number) for x in (q, k, v))
            return self.reference(asking, keys, values, grid, scale=scale, context=context).to(q.dtype)
        beside = None if gates is None else partial(self._beside, gates=gates, grid=grid)
        return self.part.attend(q, k, v, grid, scale=scale, backend=backend, context=own, beside=beside)

    def _beside(self, call: RoutedCall, chosen: Tensor, *, gates: Tensor, grid: TokenGrid) -> Tensor:
        """What all cubes give by their means, `(g, cubes, cells, c)`."""
        logits = call.scale * (mean_queries(call) @ call.block_k.mT)
        hidden = hidden_tiles(call)
        if hidden is not None:  # where all is hidden, there is nothing to weigh
            logits = logits.masked_fill((hidden & ~hidden.all(-1, keepdim=True))[:, None], -torch.inf)
        coarse = logits.softmax(-1) @ call.block_v
        if hidden is not None:
            coarse = coarse.masked_fill(hidden.all(-1)[:, None, None], 0)
        slots = places(grid.shape, call.asking, call.asking, gates.device).slots.clamp(min=0)
        return coarse[:, :, None] * gates.flatten(0, 1)[:, slots].to(coarse.dtype)

    def choose(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, scale: float | None = None, context: Context = Context()
    ) -> Tensor:
        """The chosen cubes `(b, h, cubes, chosen)`."""
        return self.part.choose(q, k, v, grid, scale, context)

    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        context: Context = Context(),
        chosen: Tensor | None = None,
    ) -> Tensor:
        """Dense masks and means by products with who is in which cube. Memory O(n^2)."""
        self.check(grid)
        gates = self._gates(q, grid, context)
        out = self.part.reference(q, k, v, grid, scale=scale, context=context, chosen=chosen)
        if gates is None:
            return out
        more = gates.to(q.dtype) * self._coarse(q, k, v, grid, scale, context)
        return out + F.pad(more, (0, 0, grid.before, grid.after))

    def _coarse(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, scale: float | None, context: Context
    ) -> Tensor:
        """What the cells get of the means of all cubes, `(b, h, cells, c)`."""
        cubes = members(q, grid, self.part.sides(grid), None)[0]  # 1 1 cubes cells
        asking, keys, values = (x[..., grid.cell_slice, :] for x in (q, k, v))
        weights = weights_of_cells(context.mask, grid, q.dtype)
        counted = cubes if weights is None else cubes * weights.mT
        total = counted.sum(-1, keepdim=True)
        shares = counted / torch.where(total == 0, torch.ones_like(total), total)
        mean_q = cubes / cubes.sum(-1, keepdim=True) @ asking
        bias = torch.zeros_like(total).masked_fill(total == 0, -torch.inf).mT
        scale = default_scale(q) if scale is None else scale
        coarse = softmax_reference(mean_q, shares @ keys, shares @ values, scale=scale, mask=bias)
        return cubes.mT @ coarse

    def seen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        context: Context = Context(),
    ) -> Seen:
        """What each query sees exactly."""
        return self.part.seen(q, k, v, grid, scale=scale, context=context)

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, *, context: Context = Context()) -> int:
        """Of the exact attention; and of the means and the gate, though an untrained call has none."""
        cubes, channels = self.part.tiles_in(grid), self.channels or heads * head_dim
        own = self.part.flops(grid, heads, head_dim, context=context)
        return own + heads * head_dim * (4 * cubes**2 + 2 * grid.cells * channels)


def hidden_of_cells(hidden: Tensor, grid: TokenGrid) -> Tensor:
    """The cells of hidden states `(b, n, channels)`, or of an image's `(b, channels, rows, columns)`.

    The tokens are all of the sequence, those that ask, the cells alone, or all but a text on one side: of references
    and text before the cells the text may be missing, as only one side has room for it.
    """
    if hidden.dim() == 4:
        return hidden.flatten(2).mT
    missing = grid.tokens - hidden.shape[1]
    places = {
        **({hidden.shape[1]: grid.before - missing} if grid.after < missing <= grid.before else {}),
        **({hidden.shape[1]: grid.before} if grid.before < missing <= grid.after else {}),
        grid.tokens: grid.before,
        grid.tokens - grid.before: 0,
        grid.tokens - grid.after: grid.before,
        grid.queries: grid.before - grid.silent[0],
        grid.cells: 0,
    }
    first = places.get(hidden.shape[1])
    twice = grid.before == grid.after > 0 and hidden.shape[1] == grid.tokens - grid.before
    if first is None or twice:
        raise ValueError(
            f"vsa: expected hidden states of {grid.cells} cells, or of all {grid.tokens} tokens, or of all but a text "
            f"on one side of {grid}; got {hidden.shape[1]}; leave this layer out by layers="
        )
    return hidden[:, first : first + grid.cells]
