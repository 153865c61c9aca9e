"""Text conditioning as a function of the frame: prompts at some frames, and what lies between them.

    c(f) = interpolate(c_i, c_(i+1), (f - f_i) / (f_(i+1) - f_i)),    f_i <= f < f_(i+1)

Before the first and after the last of the prompted frames theirs holds. Video-Infinity's code has one prompt for each
clip and a hard cut between (`hold`); a function of the frame does not depend on the split.
"""

import bisect
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Interpolate = Callable[[Tensor, Tensor, float], Tensor]
"""(conditioning before, after, how far from the one to the other: 0 ... 1) -> conditioning."""


def linear(before: Tensor, after: Tensor, share: float) -> Tensor:
    """A straight line from one to the other, both `(..., tokens, dim)`; `share` is how far along, in [0, 1]."""
    return torch.lerp(before, after, share)


def hold(before: Tensor, after: Tensor, share: float) -> Tensor:
    """The former, `(..., tokens, dim)`, until the latter's frame."""
    return before


def frame_prompts(prompts: Mapping[int, Tensor], frames: Sequence[int], interpolate: Interpolate = linear) -> Tensor:
    """The conditioning of `frames`: `(..., frames, tokens, dim)` from `(..., tokens, dim)` at the frames of `prompts`.

    With `(batch, tokens, dim)` it gives what `apply_on_clips` lets a model take as `encoder_hidden_states`.

    Args:
        prompts: number of a frame in the whole video -> embeddings of its prompt.
        frames: numbers in the whole video, such as `plan.own`.
        interpolate: between two prompts; `linear`, or `hold`.

    Raises `ValueError` for no prompts, and for prompts of several shapes.
    """
    if not prompts:
        raise ValueError("prompts needs the embeddings of at least one frame's prompt, got none")
    shapes = {tuple(embeds.shape) for embeds in prompts.values()}
    if len(shapes) > 1:
        raise ValueError(f"all prompts need embeddings of one shape, got {sorted(shapes)}; pad them to equal lengths")
    places = sorted(prompts)

    def at(frame: int) -> Tensor:
        after = bisect.bisect_right(places, frame)
        if after in (0, len(places)):
            return prompts[places[max(after - 1, 0)]]
        first, last = places[after - 1], places[after]
        return interpolate(prompts[first], prompts[last], (frame - first) / (last - first))

    return torch.stack([at(frame) for frame in frames], dim=-3)
