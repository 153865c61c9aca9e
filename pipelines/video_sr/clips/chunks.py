"""Windows of a long clip, and what each of them contributes.

    x0 = sum_k w_k x0_k,    sum_k w_k = 1 at every frame

The network sees one window at a time, in every step; solver and noise are of the whole clip. The released code cuts in
the middle of the overlaps, where a seam can show. Windows that cross-fade don't, and they are all equally long, as the
network was trained: the last one is pushed back into the clip instead of being longer or shorter.

Sources: MultiDiffusion, Bar-Tal, Yariv, Lipman, Dekel, 2023, https://arxiv.org/abs/2302.08113; the cuts as released
with STAR, Xie et al., 2025, https://arxiv.org/abs/2501.02976.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from diffattn.media.windows import ramp_weights, starts


@dataclass(frozen=True, eq=False)
class Window:
    """Frames begin .. end - 1 of a clip, with their weights, float64 `(end - begin,)`."""

    begin: int
    end: int
    weights: Tensor


def plan_windows(frames: int, window: int, overlap: int, *, official: bool = False) -> list[Window]:
    """Windows that cover a clip; their weights sum to 1 at every frame.

    A clip of at most `window` frames is one window of weights 1.

    >>> [(w.begin, w.end) for w in plan_windows(20, 8, 2)]
    [(0, 8), (6, 14), (12, 20)]
    >>> plan_windows(20, 8, 2)[0].weights.round(decimals=2).tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.67, 0.33]

    Args:
        overlap: least number of frames that neighbours share, and cross-fade in.
        official: the windows of `official_chunks`, whose overlap is half a window whatever `overlap` says, with the
            weights 0 and 1 of `kept`.

    Raises:
        ValueError: no frame, no window or an overlap not below the window.
    """
    if official:
        chunks = official_chunks(frames, window)
        return [_cut_window(chunk, part) for chunk, part in zip(chunks, kept(chunks), strict=True)]
    begins = starts(frames, window, overlap)
    weights = ramp_weights(begins, window, frames)
    size = weights.shape[1]
    return [Window(begin, begin + size, share) for begin, share in zip(begins, weights, strict=True)]


def official_chunks(frames: int, max_len: int) -> list[tuple[int, int]]:
    """The chunks (begin, end) of the released code.

    Every max_len - max_len // 2 frames one of max_len begins; the first one that a quarter more would take to the end
    of the clip is the last, and ends there, up to a quarter shorter or longer than the others. Where it is also the
    first, for a clip of up to five quarters of max_len, the released sampler fails; here it is a chunk like any other.

    >>> official_chunks(16, 12), official_chunks(33, 32), official_chunks(41, 32)
    ([(0, 12), (6, 16)], [(0, 33)], [(0, 32), (16, 41)])
    """
    if frames < 1 or max_len < 1:
        raise ValueError(
            f"expected at least 1 frame and chunks of at least 1; got {frames} and {max_len}; 32 are usual"
        )
    chunks, begin = [], 0
    while frames > max_len and begin + 1.25 * max_len < frames:
        chunks.append((begin, begin + max_len))
        begin += max_len - max_len // 2
    return [*chunks, (begin, frames)]


def kept(chunks: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges (begin, end) of the clip that are taken from each chunk: it is cut in the middle of every overlap.

    An odd overlap gives its middle frame to the later chunk.

    >>> kept([(0, 12), (6, 16)])
    [(0, 9), (9, 16)]
    """
    cuts = [(later[0] + earlier[1]) // 2 for earlier, later in pairwise(chunks)]
    edges = [chunks[0][0], *cuts, chunks[-1][1]]
    return list(pairwise(edges))


def _cut_window(chunk: tuple[int, int], part: tuple[int, int]) -> Window:
    begin, end = chunk
    frames = torch.arange(begin, end)
    return Window(begin, end, ((frames >= part[0]) & (frames < part[1])).double())
