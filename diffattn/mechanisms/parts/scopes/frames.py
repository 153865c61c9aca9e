"""Which frames of a video a frame sees, and how much: the two scopes of dual-scope attention, without any tensor of it.

Frames are counted from the start of the whole video, so nothing here depends on how the video is cut into clips.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffattn.grid import TokenGrid
from diffattn.kernels.pattern import cached


class Phase(NamedTuple):
    """Biases of a part of the denoising.

    >>> Phase(800, global_bias=10)
    Phase(t=800, local_bias=0.0, global_bias=10)
    """

    t: float | None
    """Where the phase begins or ends; None: it holds all the time."""
    local_bias: float = 0.0
    """Added to the logits of the keys in the local window."""
    global_bias: float = 0.0
    """Added to the logits of the keys of the global frames."""


def phase_biases(local: Phase | None, global_: Phase | None, time: float | None) -> tuple[float, float]:
    """The biases of local and global keys at `time`: `local` holds below its threshold, `global_` from its own on.

    Both may hold, and add up, or neither. `time` is needed only where a phase has a threshold.
    """
    holding = []
    if local is not None and (local.t is None or (time is not None and time < local.t)):
        holding.append(local)
    if global_ is not None and (global_.t is None or (time is not None and time >= global_.t)):
        holding.append(global_)
    return sum(phase.local_bias for phase in holding), sum(phase.global_bias for phase in holding)


def global_frames(frames: int, top_k: int, *, distinct: bool = True, turn: float = 0.0) -> tuple[int, ...]:
    """`floor((g + turn) * frames / top_k)` for `g < top_k`, beyond the end from the start on.

    `distinct` lists no frame twice, where there are fewer than `top_k`.

    >>> global_frames(24, 5), global_frames(24, 5, turn=0.5)
    ((0, 4, 9, 14, 19), (2, 7, 12, 16, 21))
    """
    if turn == 0:
        places = [g * frames // top_k for g in range(top_k)]
    else:
        places = [math.floor((g + turn) * frames / top_k) % frames for g in range(top_k)]
    return tuple(dict.fromkeys(places) if distinct else places)


def official_global_frames(frames: int, top_k: int, clips: int) -> tuple[int, ...]:
    """What the released code samples on `clips` devices: each offers its share, and the first `top_k` of all are kept.

    Where the share does not divide the clip each offers too many, and the last clips lose theirs; where there are fewer
    keys than clips the last clips get none.

    >>> official_global_frames(28, 10, 4)
    (0, 3, 6, 7, 10, 13, 14, 17, 20, 21)
    """
    clip, share = frames // clips, top_k // clips
    own = range(0, clip, max(clip // share, 1)) if share else range(1)
    return tuple(first + frame for first in range(0, frames, clip) for frame in own)[:top_k]


@dataclass(frozen=True)
class Scopes:
    """Who is seen and with what bias, in one phase."""

    padding: int
    """Frames on either side in the local window."""
    local_bias: float = 0.0
    global_bias: float = 0.0
    duplicates: bool = False
    """Whether a global frame in the local window is seen twice; else once, with the larger bias."""

    @property
    def global_first(self) -> bool:
        """Which of the two copies of a frame is the one that stays: the one with the larger bias."""
        return self.global_bias > self.local_bias

    def near(self, frame: int, other: int) -> bool:
        """Does `frame` have `other` in its local window?"""
        return abs(frame - other) <= self.padding

    def all_keys(self, queries: range, local: range, shared: int) -> tuple[list[int], list[int]]:
        """Places in `local` of the window of any of the frames `queries`, and those of all `shared` frames."""
        low, high = queries.start - self.padding, queries.stop + self.padding
        return list(range(max(low - local.start, 0), min(high - local.start, len(local)))), list(range(shared))

    def keys(self, queries: range, local: range, shared: Sequence[int]) -> tuple[list[int], list[int]]:
        """Places in `local` and in `shared` of the frames that at least one of the frames `queries` sees.

        For a single query frame these are exactly those that it sees.
        """
        window, every = self.all_keys(queries, local, len(shared))
        if self.duplicates:
            return window, every
        if self.global_first:
            return [place for place in window if local[place] not in shared], every
        first, last = queries.start, queries.stop - 1
        return window, [g for g, frame in enumerate(shared) if not (self.near(first, frame) and self.near(last, frame))]


@cached(4096)
def visible(
    scopes: Scopes, queries: range, local: tuple[int, ...], shared: tuple[int, ...], device: torch.device
) -> Tensor:
    """Boolean `(queries, local + shared)`: which frames a query frame sees, of those that `Scopes.keys` lists."""
    query = torch.arange(queries.start, queries.stop, device=device)[:, None]
    by_window = (query - torch.tensor(local, device=device, dtype=torch.long)).abs() <= scopes.padding
    distance = (query - torch.tensor(shared, device=device, dtype=torch.long)).abs()
    once = not (scopes.duplicates or scopes.global_first)
    return torch.cat([by_window, distance > scopes.padding if once else distance >= 0], dim=1)


def visible_by_sample(scopes: Scopes, queries: range, local: tuple[int, ...], shared: Tensor) -> Tensor:
    """Boolean `(b, queries, local + top_k)`: as `visible`, where each sample has global frames `(b, top_k)` of its own.

    Keys are those that `Scopes.all_keys` lists.
    """
    query = torch.arange(queries.start, queries.stop, device=shared.device)[:, None]
    near = torch.tensor(local, device=shared.device, dtype=torch.long)
    by_window = ((query - near).abs() <= scopes.padding).expand(len(shared), -1, -1)
    everywhere = torch.ones(len(shared), len(queries), shared.shape[1], dtype=torch.bool, device=shared.device)
    if not scopes.duplicates and scopes.global_first:
        by_window = by_window & (near[:, None] != shared[:, None, :]).all(-1)[:, None]
    elif not scopes.duplicates:
        everywhere = (query - shared[:, None, :]).abs() > scopes.padding
    return torch.cat([by_window, everywhere], dim=2)


def count_pairs(scopes: Scopes, local: range, queries: range, shared: Sequence[int]) -> int:
    """Pairs of one of the frames `queries` and a key frame that it sees, twice where it sees it twice."""
    seen = (scopes.keys(range(frame, frame + 1), local, shared) for frame in queries)
    return sum(len(near) + len(far) for near, far in seen)


def frames_mask(grid: TokenGrid, shared: Tensor, padding: int) -> Tensor:
    """Who sees whom, `(b, 1, tokens, tokens)`, for global frames `(b, top_k)`."""
    frame, size = torch.arange(grid.frames, device=shared.device), grid.height * grid.width
    seen = (frame[:, None] - frame).abs() <= padding
    seen = seen | (frame == shared[..., None]).any(1)[:, None]
    mask = torch.ones(len(seen), 1, grid.tokens, grid.tokens, dtype=torch.bool, device=shared.device)
    mask[:, 0, grid.cell_slice, grid.cell_slice] = seen.repeat_interleave(size, 1).repeat_interleave(size, 2)
    return mask
