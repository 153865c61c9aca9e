"""Which frames of a video are worth seeing from everywhere, by what is in them: one choice for each sample.

weight(g) = sum over query frames f and mean over heads of softmax_g(scale * mean query of f . mean key of g),
g over the frames outside the window of f; the `top_k` frames with the largest weight, of equal ones the earlier
"""

import torch
from torch import Tensor

LOGITS = 2**24
"""Logits of frames to frames that are held at once."""


def landmarks(x: Tensor, frames: int) -> Tensor:
    """The mean over the cells of each frame, `(b, h, frames, d)`, of `(b, h, frames * cells, d)`; for no gradient."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32)).unflatten(2, (frames, -1)).mean(3)


def choose_frames(q: Tensor, k: Tensor, *, padding: int, top_k: int, scale: float) -> Tensor:
    """The chosen frames of each sample, ascending, `(b, min(top_k, frames))`, from landmarks of queries and of keys.

    Time O(b h frames^2 d).
    """
    frame = torch.arange(q.shape[2], device=q.device)
    near = (frame[:, None] - frame).abs() <= padding
    lost = near.all(1, keepdim=True)  # frames that see all in their window
    step = max(1, LOGITS // (q.shape[1] * near.numel()))
    chosen = []
    for part_q, part_k in zip(q.split(step), k.split(step), strict=True):
        logits = (part_q @ part_k.mT * scale).masked_fill(near & ~lost, -torch.inf)
        weight = logits.softmax(-1).masked_fill(lost, 0.0).sum(2).mean(1)
        chosen.append(weight.sort(dim=1, descending=True, stable=True).indices[:, :top_k])
    return torch.cat(chosen).sort(dim=1).values
