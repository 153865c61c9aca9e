"""Classifier-free guidance, with its deviation brought back towards that of the conditional prediction.

    g = u + scale (c - u)
    y = rescale (std(c) / std(g)) g + (1 - rescale) g          std over all of a sample

Whether the deviations are unbiased makes no difference to their ratio.

Sources: Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598; the rescaling, Lin, Liu, Li, Yang, 2024,
https://arxiv.org/abs/2305.08891, Eqs. 15 and 16.
"""

import torch
from torch import Tensor


def guide(cond: Tensor, uncond: Tensor | None, scale: float, rescale: float = 0.0) -> Tensor:
    """Guided prediction `(batch, ..)`, worked out in float32 or wider, in the dtype of `cond`.

    The deviation is taken over what is given: all channels, frames and pixels of each sample. For a clip in windows
    that is one window, as in the released code. So windows with different contents get different gains
    rescale std(c) / std(g) + 1 - rescale, and a frame in two windows is guided a little differently in each. A gain of
    the whole clip would need all its predictions before the first x0. Cross-fading windows hides the difference.

    Args:
        cond: c, with the prompt.
        uncond: u, with the negative prompt; not looked at, and may be None, where the scale is 1.
        scale: 1 gives c; 7.5 is usual.
        rescale: 0 leaves g as it is, 1 gives it the deviation of c; 0.2 is usual.

    Raises:
        ValueError: no `uncond` where it is needed, another shape, or a rescale outside 0-1.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"expected a rescale from 0 to 1; got {rescale}; 0.2 is usual")
    if scale == 1:
        return cond
    if uncond is None or uncond.shape != cond.shape:
        raise ValueError(
            f"expected uncond of the shape {tuple(cond.shape)} for a scale of {scale}; got "
            f"{None if uncond is None else tuple(uncond.shape)}; predict it with the negative prompt, or use scale 1"
        )
    wide = torch.promote_types(cond.dtype, torch.float32)
    c = cond.to(wide)
    guided = torch.lerp(uncond.to(wide), c, scale)
    if rescale > 0:
        gain = _deviation(c) / _deviation(guided).clamp_min(1e-12)
        guided = guided * (rescale * gain + (1 - rescale))
    return guided.to(cond.dtype)


def _deviation(prediction: Tensor) -> Tensor:
    """Standard deviation of each sample, `(batch, 1, ..)`."""
    return prediction.std(tuple(range(1, prediction.ndim)), correction=0, keepdim=True)
