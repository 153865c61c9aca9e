"""What PASD's training adds to the loss of the noise: its condition encoder has to show the clean image.

    pyramid          L_p = sum over scales k of mean |rgb_k - resize(target, size of rgb_k)|
    colourfulness    L_c = sum over images of 1 - (sqrt(s_rg^2 + s_yb^2) + 0.3 sqrt(m_rg^2 + m_yb^2))
                     rg = |R - G|,  yb = |(R + G) / 2 - B|,  m and s: mean and standard deviation over the pixels

The whole loss is MSE(noise) + L_p, and for colourisation + COLOURFULNESS_WEIGHT * sum over scales k of L_c(rgb_k).

Source: Yang et al., Pixel-Aware Stable Diffusion, 2023, https://arxiv.org/abs/2308.14469, the loss of the degradation
removal; Hasler, Suesstrunk, Measuring colourfulness in natural images, 2003, https://doi.org/10.1117/12.477378.
Differences to the latter, as in PASD's released training: rg and yb without their signs, colours in -1..1 (0..255
there), and the sample's standard deviation (n - 1).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

COLOURFULNESS_WEIGHT = 0.003
"""Weight of `colourfulness_loss`, summed over the scales.

PASD states 0.001, but adds the sum over all scales once for each of its three: 3 * 0.001 is what it was trained with.
"""

_FLOOR = 1e-8
"""Added to squares under a root, whose slope is infinite at 0: in a gray image all of them are."""


def pyramid_loss(rgbs: Sequence[Tensor], target: Tensor) -> Tensor:
    """Mean absolute difference to the clean image, summed over the scales.

    The target is resized bilinearly without antialiasing, by the outer edges. Half precision is computed in float32.

    Args:
        rgbs: predictions, (batch, 3, rows_k, columns_k) each; PASD has three, of 1/2, 1/4 and 1/8 of the rows.
        target: clean images with values in -1..1 (the encoder's input is in 0..1), (batch, 3, rows, columns).

    Raises:
        ValueError: no prediction, or one of another batch or number of channels than the target.
    """
    _check_pictures("target", target)
    if not rgbs:
        raise ValueError("expected at least one prediction; got none; let the condition encoder return its images")
    for number, rgb in enumerate(rgbs):
        _check_pictures(f"rgbs[{number}]", rgb)
        if len(rgb) != len(target):
            raise ValueError(
                f"expected rgbs[{number}] of the target's batch {len(target)}; got {len(rgb)}; pair them one to one"
            )
    target = _single(target)
    parts = [F.l1_loss(rgb, _resized(target, rgb)) for rgb in rgbs]
    return torch.stack(parts).sum()


def colourfulness_loss(pictures: Tensor) -> Tensor:
    """How far images fall short of a colourfulness of 1, summed over the batch; negative where they go beyond.

    The sum grows with the batch, unlike the mean of `pyramid_loss`. Half precision is computed in float32.

    Args:
        pictures: values in -1..1, (batch, 3, rows, columns), of two pixels or more.

    Raises:
        ValueError: another shape, or a single pixel, which has no standard deviation.
    """
    _check_pictures("pictures", pictures)
    if pictures[0, 0].numel() < 2:
        raise ValueError("expected images of two pixels or more; got 1 x 1; leave this scale out")
    red, green, blue = _single(pictures).flatten(2).unbind(1)
    opponents = torch.stack([(red - green).abs(), ((red + green) / 2 - blue).abs()])
    spread = (opponents.var(-1).sum(0) + _FLOOR).sqrt()
    offset = (opponents.mean(-1).square().sum(0) + _FLOOR).sqrt()
    return (1 - (spread + 0.3 * offset)).sum()


def _single(pictures: Tensor) -> Tensor:
    return pictures.to(torch.promote_types(pictures.dtype, torch.float32))


def _resized(target: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(target, size=like.shape[-2:], mode="bilinear", align_corners=False)


def _check_pictures(name: str, pictures: Tensor) -> None:
    if pictures.ndim != 4 or pictures.shape[1] != 3 or 0 in pictures.shape or not pictures.is_floating_point():
        raise ValueError(
            f"expected {name} as floats of shape (batch, 3, rows, columns); got {pictures.dtype} of shape "
            f"{tuple(pictures.shape)}; add a batch axis to a single image"
        )
