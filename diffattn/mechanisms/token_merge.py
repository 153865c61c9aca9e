"""Token merging: exact attention over fewer tokens, because similar cells of the grid share one.

    q', k', v' = means of q, k, v over groups of similar cells        (`merging.py` says how groups are found)
    out_i      = (softmax(scale * q' k'^T + log s) v')_{group of i}    s: 1, or the group's size if `proportional`

A share `ratio` of the cells is merged away. Other tokens (text) are never merged. Compared is the block's input before
its norm, or the keys, heads side by side, where `Context.features` is None.

With two numbers, `stride` is (rows, columns) and every frame is merged by itself; with three, (frames, rows, columns),
cells merge across frames. Along an axis shorter than its stride, one block takes the whole axis. A block holds one cell
that others merge into: its first, or one drawn anew for every layer and denoising step from `seed`. The draw knows
nothing of the batch: an image is drawn alike alone and in company, and the halves of classifier-free guidance alike.

A model's mask over the keys may hide other tokens. One that touches cells is refused, because merging would mix hidden
with visible ones; so is one that differs between queries.

Source: Bolya & Hoffman, Token Merging for Fast Stable Diffusion, https://arxiv.org/abs/2303.17604; proportional
attention: Bolya et al., Token Merging: Your ViT But Faster, equation 1, https://arxiv.org/abs/2210.09461.
Differences: the paper merges the input of the projections, this their results. That is the same where q, k and v are
linear in the tokens, as in Stable Diffusion; where the model normalises or rotates q and k (most diffusion
transformers) q' and k' are means of turned vectors, shorter than those of a merged token would be. Frames, and the
differences in `merging.py`.

Time O(m^2 d + src dst h d) for m merged tokens, memory O(n d) and a bounded piece of the similarities.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import register
from ..grid import TokenGrid
from ..options import Must, at_least
from .base import Context, Mechanism
from .parts import merging
from .parts.merging import Merging, at_least_float32
from .softmax import softmax_reference

STRIDE = Must(
    "([frames,] rows, columns), ints of at least 1",
    lambda stride: len(stride) in (2, 3) and all(side >= 1 for side in stride),
)


@register("token_merge")
@dataclass(frozen=True, kw_only=True)
class TokenMergeAttention(Mechanism):
    """Exact attention after similar cells are merged. Time O(((1 - ratio) n)^2 d) and the search for similar cells.

    >>> TokenMergeAttention(ratio=0.5).merged(TokenGrid(64, 64, before=512))
    2048
    """

    one_mask: ClassVar[bool] = True

    ratio: float = 0.5
    """Share of the cells merged away, at most 1 - 1 / (cells of a block): 0.75 for stride (2, 2)."""
    stride: Annotated[tuple[int, ...], STRIDE] = (2, 2)
    """Block that holds one destination: (rows, columns), frame by frame, or (frames, rows, columns)."""
    use_rand: bool = True
    """Draw each block's destination, anew for every layer and step, else take its first cell."""
    seed: Annotated[int, at_least(0)] = 0
    """What the draws depend on beside layer and step."""
    proportional: bool = False
    """Count a merged key as often as it has members."""
    max_downsample: Annotated[int | None, at_least(1)] = None
    """Layers coarser than this, against the latent image, stay exact; None: no limit. 1 in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        stride = self.stride
        most = 1 - 1 / math.prod(stride)
        if most == 0:
            raise ValueError(f"token_merge: a block of stride {stride} has nothing to merge; use (2, 2), for example")
        ratio = self.ratio
        if not 0 < ratio <= most:
            raise ValueError(
                f"token_merge: ratio must lie above 0 and be at most {most:g}, because each block of stride {stride} "
                f"keeps a cell, got {ratio!r}; use a smaller ratio or a larger stride"
            )

    @property
    def needs(self) -> frozenset[str]:
        needs = {"features"}
        needs |= {"downsample"} if self.max_downsample is not None else set()
        needs |= {"call_index", "progress"} if self.use_rand else set()
        return frozenset(needs)

    @property
    def backends(self) -> tuple[str, ...]:
        """Both are `scaled_dot_product_attention` on the merged tokens."""
        return "auto", "dense"

    def part(self, grid: TokenGrid) -> TokenGrid:
        """The cells that are merged by themselves: one frame, or all frames."""
        return TokenGrid(grid.height, grid.width, grid.frames if len(self.stride) == 3 else 1)

    def block(self, grid: TokenGrid) -> tuple[int, int, int]:
        """Frames, rows and columns of a block, no longer than the grid."""
        frames, rows, columns = (1, *self.stride)[-3:]
        return min(frames, grid.frames), min(rows, grid.height), min(columns, grid.width)

    def check(self, grid: TokenGrid, *, context: Context = Context()) -> None:
        is_line = grid.frames == grid.height == 1 and grid.width > 1
        if is_line and math.prod(self.block(grid)) == 1 and not self._too_coarse(context):
            raise ValueError(
                f"token_merge: a block of stride {self.stride} is a single cell of the grid {grid}, with nothing to "
                "merge; give a stride with several columns, such as (1, 4)"
            )

    def merged(self, grid: TokenGrid, context: Context = Context()) -> int:
        """How many cells one call merges away."""
        if self._too_coarse(context):
            return 0
        part, (st, sy, sx) = self.part(grid), self.block(grid)
        return grid.cells // part.cells * merging.count_merged(part, sx, sy, self.ratio, st)

    def _too_coarse(self, context: Context) -> bool:
        return self.max_downsample is not None and context.downsample > self.max_downsample

    def destinations(self, grid: TokenGrid, context: Context) -> Tensor:
        """Cells of `part(grid)` that others may be merged into, `(dst,)`."""
        st, sy, sx = self.block(grid)
        generator = merging.seeded_generator(self.seed, context) if self.use_rand else None
        return merging.destinations(self.part(grid), sx, sy, generator, st)

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
        grid.check(q, k)
        self.check(grid, context=context)
        gone = self.merged(grid, context)
        if not gone:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=context.mask, scale=scale)
        mask = mask_of_others(context.mask, grid)
        parts = grid.cells // self.part(grid).cells
        features = merging.compared_features(k, grid, context).unflatten(1, (parts, -1)).flatten(0, 1)
        groups = merging.match(features, self.destinations(grid, context)).first(gone // parts)
        short = TokenGrid(1, grid.cells - gone, before=grid.before, after=grid.after)
        split = [grid.split(tokens) for tokens in (q, k, v)]
        short_q, short_k, short_v = (short.join(merge(groups, cells, parts), others) for cells, others in split)
        bias = key_bias(groups.members.view(len(q), -1) if self.proportional else None, mask, short, q)
        out = F.scaled_dot_product_attention(short_q, short_k, short_v, attn_mask=bias, scale=scale)
        cells, others = short.split(out)
        return grid.join(unmerge(groups, cells, parts), others)

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
        """Lists of the cells that make each merged token, then an explicit softmax, sample by sample."""
        gone = self.merged(grid, context)
        if not gone:
            return softmax_reference(q, k, v, scale=scale, mask=context.mask)
        mask = mask_of_others(context.mask, grid)
        size = self.part(grid).cells
        count = gone * size // grid.cells
        dst = self.destinations(grid, context).tolist()
        outs = []
        for sample, features in enumerate(merging.compared_features(k, grid, context).tolist()):
            groups = [
                [start + cell for cell in group]
                for start in range(0, grid.cells, size)
                for group in merging.groups_reference(features[start : start + size], dst, count)
            ]
            short = TokenGrid(1, len(groups), before=grid.before, after=grid.after)
            tokens = []
            for whole in (q, k, v):
                cells, others = grid.split(whole[sample : sample + 1])
                means = [cells[..., group, :].mean(dim=-2) for group in groups]
                tokens.append(short.join(torch.stack(means, dim=-2), others))
            members = torch.tensor([[len(group) for group in groups]]) if self.proportional else None
            own_mask = None if mask is None else mask.expand(len(q), -1, -1, -1)[sample : sample + 1]
            out = softmax_reference(*tokens, scale=scale, mask=key_bias(members, own_mask, short, tokens[0]))
            cells, others = short.split(out)
            place = {cell: index for index, group in enumerate(groups) for cell in group}
            outs.append(grid.join(cells[..., [place[cell] for cell in range(grid.cells)], :], others))
        return torch.cat(outs)

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, *, context: Context = Context()) -> int:
        """Products of the softmax, and of the matching with features as wide as all heads."""
        gone = self.merged(grid, context)
        products = 4 * (grid.tokens - gone) ** 2
        if gone:
            part, (st, sy, sx) = self.part(grid), self.block(grid)
            targets = merging.count_destinations(part, sx, sy, st)
            products += 2 * (grid.cells // part.cells) * (part.cells - targets) * targets
        return products * heads * head_dim


def merge(groups: Merging, cells: Tensor, parts: int) -> Tensor:
    """`(b, h, cells, d)` -> `(b, h, merged cells, d)`, each of `parts` equal stretches by itself."""
    if parts == 1:
        return groups.merge(cells)
    merged = groups.merge(cells.unflatten(-2, (parts, -1)).transpose(1, 2).flatten(0, 1))
    return merged.unflatten(0, (-1, parts)).transpose(1, 2).flatten(2, 3)


def unmerge(groups: Merging, cells: Tensor, parts: int) -> Tensor:
    """Copy the result of `merge` back to the cells."""
    if parts == 1:
        return groups.unmerge(cells)
    whole = groups.unmerge(cells.unflatten(-2, (parts, -1)).transpose(1, 2).flatten(0, 1))
    return whole.unflatten(0, (-1, parts)).transpose(1, 2).flatten(2, 3)


def mask_of_others(mask: Tensor | None, grid: TokenGrid) -> Tensor | None:
    """The part of a key mask `(b, h, 1, keys)` for the other tokens; a mask that merging can't honour is refused."""
    if mask is None:
        return None
    if mask.dim() > 1 and mask.shape[-2] != 1:
        raise ValueError(
            f"token_merge: a merged query stands for many, so a mask must be the same for all of them, "
            f"(b, 1, 1, keys), got {tuple(mask.shape)}; leave layers with such a mask out with layers="
        )
    mask = mask[(None,) * (4 - mask.dim())]
    cells, others = grid.split(mask.expand(*mask.shape[:-1], grid.tokens), dim=-1)
    touched = ~cells if mask.dtype == torch.bool else cells != 0
    if touched.any():
        raise ValueError(
            "token_merge: the model's mask hides or weighs cells of the grid, and merging would mix those with others; "
            "use a mechanism without merging, or leave the masked layers out with layers="
        )
    return others


def key_bias(members: Tensor | None, mask: Tensor | None, short: TokenGrid, q: Tensor) -> Tensor | None:
    """Bias or mask on the merged keys, `(b, h, 1, m)`: log of the `members` `(b, m)`, and the `mask` of the others."""
    if members is None and mask is None:
        return None
    if members is None and mask is not None and mask.dtype == torch.bool:
        return short.join(mask.new_ones(*mask.shape[:-1], short.cells), mask, dim=-1)
    others = q.new_zeros(1, 1, 1, short.others)
    if mask is not None:
        others = others.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask.to(q.dtype)
    cells = q.new_zeros(1, 1, 1, short.cells)
    if members is not None:
        cells = members.to(q.device, at_least_float32(q).dtype).log().to(q.dtype)[:, None, None]
    shape = torch.broadcast_shapes(cells.shape[:-1], others.shape[:-1])
    return short.join(cells.expand(*shape, -1), others.expand(*shape, -1), dim=-1)
