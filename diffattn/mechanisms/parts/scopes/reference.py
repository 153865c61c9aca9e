"""Dual-scope attention the slow and plain way: one sample and one frame at a time."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from diffattn.grid import TokenGrid

from ...softmax import softmax_reference
from .attention import add_model_mask
from .frames import Scopes
from .memory import runs_of


@dataclass(frozen=True)
class FrameReference:
    """What the cells of single frames get; all tensors are those of one sample."""

    grid: TokenGrid
    scopes: Scopes
    local_frames: range
    """Those in reach of any, beyond the ends of the video as zeros."""
    scale: float
    factor: float
    """Of the logits of cells."""
    train_frames: int | None
    memory: int | None
    forget: float

    def attend(
        self, frame: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, shared: tuple[int, ...]
    ) -> Tensor:
        """The output of one frame, `(1, h, cells, c)`; `shared` are the global frames."""
        tokens, bias, factor = self.seen(frame, shared)
        size = self.grid.height * self.grid.width
        own = slice(self.grid.before + frame * size, self.grid.before + (frame + 1) * size)
        seen_k, seen_v = (F.pad(x, (0, 0, 0, 1))[:, :, tokens] for x in (k, v))  # behind the last token: zeros
        total: Tensor | None = torch.tensor(bias, dtype=q.dtype, device=q.device)
        if mask is not None:
            rows = mask[:, :, own] if mask.shape[2] > 1 else mask
            model = F.pad(rows, (0, 1), value=rows.dtype == torch.bool)[..., tokens]
            total = add_model_mask(total, [model], slice(None))
        for mean_k, mean_v, count in self.means(frame, k, v, mask, shared):
            assert total is not None
            seen_k, seen_v = torch.cat([seen_k, mean_k], dim=2), torch.cat([seen_v, mean_v], dim=2)
            total = total.expand(1, q.shape[1], -1, -1) if total.dim() == 4 else total.view(1, 1, 1, -1)
            heads = max(total.shape[1], count.shape[1])
            total = torch.cat([x.expand(1, heads, *x.shape[2:]) for x in (total, count)], dim=-1)
        return softmax_reference(q[:, :, own], seen_k, seen_v, scale=self.scale * factor, mask=total)

    def seen(self, frame: int, shared: tuple[int, ...]) -> tuple[list[int], list[float], float]:
        """Tokens that one frame sees (`grid.tokens` for a key of zeros), their biases, and the factor of the logits."""
        grid, scopes = self.grid, self.scopes
        near = [other for other in self.local_frames if scopes.near(frame, other)]
        far = list(shared)
        if not scopes.duplicates:
            near = [other for other in near if not (scopes.global_first and other in shared)]
            far = [other for other in shared if scopes.global_first or not scopes.near(frame, other)]
        tokens: list[int] = []
        bias: list[float] = []
        size = grid.height * grid.width
        for other, of_scope in [(f, scopes.local_bias) for f in near] + [(f, scopes.global_bias) for f in far]:
            start = grid.before + other * size
            tokens += range(start, start + size) if 0 <= other < grid.frames else [grid.tokens] * size
            bias += [of_scope] * size
        tokens += [*range(grid.before), *range(grid.before + grid.cells, grid.tokens)]
        factor = self.factor
        if self.train_frames is not None:
            factor *= math.log(len(near) + len(far)) / math.log(self.train_frames)
        return tokens, bias + [0.0] * grid.others, factor

    def means(
        self, frame: int, k: Tensor, v: Tensor, mask: Tensor | None, shared: tuple[int, ...]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Keys, values and additive mask of each run out of sight; runs without a frame are left out."""
        if self.memory is None:
            return []
        shape = self.grid.frames, self.grid.height * self.grid.width
        weight = k.new_ones(1, 1, *shape, 1)
        if mask is not None:
            of_cells = self.grid.split(mask, dim=-1)[0].squeeze(2).unflatten(-1, shape).unsqueeze(-1)
            weight = of_cells.to(k.dtype) if mask.dtype == torch.bool else of_cells.exp()
        by_frame_k, by_frame_v = (self.grid.split(x)[0].unflatten(2, shape) for x in (k, v))
        found = []
        for run, distance in runs_of(frame, self.grid.frames, self.memory, self.scopes.padding):
            kept = [other for other in run if other not in shared]
            if not kept:
                continue
            own = weight[:, :, kept]
            total = own.sum(2)
            safe = torch.where(total > 0, total, 1.0)
            key, value = ((x[:, :, kept] * own).sum(2) / safe for x in (by_frame_k, by_frame_v))
            count = safe.log().masked_fill(total == 0, -torch.inf) + self.scopes.global_bias - self.forget * distance
            found.append((key, value, count.mT))
        return found


def chosen_frames(q: Tensor, k: Tensor, grid: TokenGrid, *, padding: int, top_k: int, scale: float) -> tuple[int, ...]:
    """The global frames of one sample, by content."""
    shape = grid.frames, grid.height * grid.width
    asking, marks = (grid.split(x.detach())[0][0].unflatten(1, shape).mean(2) for x in (q, k))  # h f d
    weight = torch.zeros(grid.frames, dtype=asking.dtype, device=q.device)
    for frame in range(grid.frames):
        far = [other for other in range(grid.frames) if abs(frame - other) > padding]
        if far:
            logits = torch.einsum("hd,hfd->hf", asking[:, frame], marks[:, far]) * scale
            weight[far] += logits.softmax(-1).mean(0)
    best = sorted(range(grid.frames), key=lambda frame: (-float(weight[frame]), frame))
    return tuple(sorted(best[:top_k]))
