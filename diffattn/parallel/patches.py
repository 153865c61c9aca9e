"""CLEAR's local attention where every rank has some rows of the image.

    cells of a patch:  text, and the cells within the radius; rows of other patches come as a halo of keys and values
    text, exact:       all tokens: each rank attends for it to its own patch, merged by log-sum-exp (`merge.py`)
    text, paper:       text and the rank's own patch, averaged over the ranks

so cells are exact in both, and "exact" is the attention of one process up to rounding. The rules are those of the whole
picture: nothing depends on the number of ranks nor on the split.

Cost for an inner rank, with rows of `b h width d` numbers: 4 (ceil(radius) - 1) rows sent and received, and the text's
output; queries of the halo are computed and dropped, (length + 2 radius) / length of the work of a patch.

Source: Liu et al., CLEAR, https://arxiv.org/abs/2412.16112, section 3.4 and equation 7 for the paper's text attention,
of which no code was released.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from ..grid import TokenGrid
from ..mechanisms.base import Context, Mechanism
from ..mechanisms.clear import ClearAttention
from .operations.collectives import all_gather
from .operations.halo import halo_exchange, pad_frames
from .operations.merge import merge_over_ranks, partial_attention
from .operations.shares import FramePlan, Traffic

TextMode = Literal["exact", "paper"]


@dataclass(eq=False)
class Patches:
    """How the rows of the present forward are split; the `FramePlan` of an image counts rows, not frames."""

    mesh: DeviceMesh | None = None
    traffic: Traffic = field(default_factory=Traffic)
    """Bytes of all forwards."""
    plan: FramePlan | None = None
    _plans: dict[int, FramePlan] = field(default_factory=dict, repr=False)

    def begin(self, rows: int) -> FramePlan:
        """Share out the rows of a forward; raises `ValueError` on every rank where there are fewer than ranks."""
        ranks = 1 if self.mesh is None else self.mesh.size()
        if rows < ranks:
            raise ValueError(
                f"an image of {rows} rows of tokens can't be split among {ranks} ranks: start fewer of them, or "
                f"make a taller image"
            )
        if rows not in self._plans:
            self._plans[rows] = replace(FramePlan.split(rows, self.mesh), traffic=self.traffic)
        self.plan = self._plans[rows]
        return self.plan

    @property
    def present(self) -> FramePlan:
        if self.plan is None:
            raise RuntimeError("an attention layer ran outside the forward of its sharded model")
        return self.plan


@dataclass(frozen=True, kw_only=True)
class PatchAttention(Mechanism):
    """`mechanism` on an image of which this rank holds some rows; grids are those of its patch."""

    type: ClassVar[str] = ClearAttention.type
    kinds: ClassVar[frozenset[str]] = ClearAttention.kinds

    mechanism: ClearAttention
    patches: Patches
    text: TextMode = "exact"

    def __post_init__(self) -> None:
        if type(self.mechanism) is not ClearAttention:
            raise TypeError(f"patches of an image are for clear, whose window is a disc, got {self.mechanism}")
        if self.mechanism.down_factor is not None or self.mechanism.pool is not None:
            raise ValueError(f"{self.mechanism} sees pooled keys of the whole image, which no rank has: leave them out")
        if self.text not in ("exact", "paper"):
            raise ValueError(f"mode must be 'exact' or 'paper', got {self.text!r}")

    @property
    def reach(self) -> int:
        """Rows that a cell sees on either side."""
        middle = int(self.mechanism.radius) + 1
        grid = TokenGrid(2 * middle + 1, 1)
        return middle - self.mechanism.pattern(grid).span(1, middle, middle + 1, grid.height)[0]

    def check(self, grid: TokenGrid, *, context: Context = Context()) -> None:
        self.patches.present.check(grid.height)
        if context.mask is not None:
            raise NotImplementedError("a model's mask is not split over patches: use one rank")

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
        self.check(grid, context=context)
        plan = self.patches.present
        whole = replace(grid, height=plan.frames)
        scale = self.mechanism.scale(q, whole, scale)
        (cells_q, text_q), (cells_k, text_k), (cells_v, text_v) = map(grid.split, (q, k, v))
        rows = grid.height, grid.width
        (near_k, near_v), held = halo_exchange(
            (cells_k.unflatten(2, rows), cells_v.unflatten(2, rows)), self.reach, self.reach, 2, plan
        )
        asking = pad_frames(cells_q.unflatten(2, rows), plan.own, held, 2)
        window = TokenGrid(len(held), grid.width, before=grid.others)
        out = replace(self.mechanism, proportional=False).attend(
            torch.cat([text_q, asking.flatten(2, 3)], dim=2),
            torch.cat([text_k, near_k.flatten(2, 3)], dim=2),
            torch.cat([text_v, near_v.flatten(2, 3)], dim=2),
            window,
            scale=scale,
            backend=backend,
        )
        first = grid.others + (plan.own.start - held.start) * grid.width
        cells = out[:, :, first : first + grid.cells]
        if not grid.others:
            return cells
        return grid.join(cells, self._attend_text(text_q, (text_k, cells_k), (text_v, cells_v), scale))

    def _attend_text(self, q: Tensor, k: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor], scale: float) -> Tensor:
        """The text's output; `k` and `v` are those of the text and of this rank's cells."""
        plan = self.patches.present
        if self.text == "paper":
            out = F.scaled_dot_product_attention(q, torch.cat(k, dim=2), torch.cat(v, dim=2), scale=scale)
            return all_gather(out, plan, "merge").mean(0)
        # the text's own keys are counted on the first rank alone
        keys, values = (torch.cat(x, dim=2) if plan.rank == 0 else x[1] for x in (k, v))
        part, lse = partial_attention(q, keys, values, scale=scale)
        return merge_over_ranks(part, lse, plan).to(q.dtype)

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, *, context: Context = Context()) -> int:
        plan = self.patches.present
        held = replace(grid, height=len(plan.window(self.reach, self.reach)))
        return self.mechanism.flops(held, heads, head_dim)

    def explain_backend(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, backend: str, context: Context) -> str:
        plan = self.patches.present
        inner = self.mechanism.explain_backend(q, k, v, grid, backend, context)
        return f"{inner}, patch {plan.rank + 1} of {plan.ranks}"

    def to_dict(self) -> dict[str, Any]:
        return self.mechanism.to_dict()

    def __str__(self) -> str:
        return str(self.mechanism)
