"""A clip worked through in windows, with no more than a window and an overlap of it in memory."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .chunks import Window


def finished_sizes(windows: Sequence[Window]) -> list[int]:
    """How many frames are finished after each window: those that the next one does not hold.

    >>> from diffattn.pipelines.video_sr.clips.chunks import plan_windows
    >>> finished_sizes(plan_windows(20, 8, 2))
    [6, 6, 8]
    """
    edges = [window.begin for window in windows] + [windows[-1].end]
    return [later - earlier for earlier, later in pairwise(edges)]


def finished(windows: Sequence[Window], parts: Iterable[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Frames of the blended clip, sum_k w_k part_k, with the number of the first, as soon as no window is left to come.

    Every frame is given once, in order.

    Args:
        windows: with ascending begins and ends, and weights that sum to 1 at every frame.
        parts: `(frames, ..)` of each window, float32; taken one at a time.
    """
    held: Tensor | None = None
    for window, size, part in zip(windows, finished_sizes(windows), parts, strict=True):
        weights = window.weights.to(part.device, part.dtype)
        share = part * weights.reshape(-1, *[1] * (part.ndim - 1))
        if held is not None:
            share[: len(held)] += held
        yield window.begin, share[:size]
        held = share[size:].clone()


def regroup(chunks: Iterable[Tensor], sizes: Iterable[int]) -> Iterator[Tensor]:
    """The same frames in blocks of other sizes.

    Raises:
        ValueError: fewer or more frames than the sizes sum to; after as many blocks as there are whole ones.
    """
    source, held, total = iter(chunks), None, 0
    for size in sizes:
        total += size
        while held is None or len(held) < size:
            more = next(source, None)
            if more is None:
                raise ValueError(
                    f"expected {total} frames or more; got {total - size + (0 if held is None else len(held))}; plan "
                    "with the number of frames that there are"
                )
            held = more if held is None or len(held) == 0 else torch.cat([held, more])
        yield held[:size]
        held = held[size:]
    if (held is not None and len(held)) or any(len(more) for more in source):
        raise ValueError(f"expected {total} frames; got more; plan with the number of frames that there are")
