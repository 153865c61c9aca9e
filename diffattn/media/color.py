"""Give an image the colours of another: by wavelet bands, by mean and deviation, or by keeping its luma.

    wavelet   y = x - low(x) + low(s) = x + low(s - x),    low = blur_16 blur_8 blur_4 blur_2 blur_1
    AdaIN     y = (x - mean(x)) / std(x) * std(s) + mean(s)        per channel, std = sqrt(unbiased variance + eps)

blur_r is the 3 x 3 binomial filter, outer([1, 2, 1], [1, 2, 1]) / 16, with its taps r pixels apart and the edge pixels
repeated. low is linear, so the wavelet form costs one decomposition instead of two.

Images are `(batch, 3, rows, columns)`, floating point in 0-1; results are not clamped, `to_bytes` does that. Half
precision is worked out in float32.

Sources: the a trous decomposition as used for colours in StableSR, Wang et al., 2023,
https://arxiv.org/abs/2305.07015; AdaIN, Huang and Belongie, 2017, https://arxiv.org/abs/1703.06868, Eq. 8; luma and
chroma by ITU-R BT.601.
"""

import torch
from torch import Tensor

_BITS = 14
"""Fraction bits of OpenCV's integer arithmetic for bytes, whose roundings `keep_luma` repeats."""
_WEIGHT_BITS = 11
"""Fraction bits of the weights in OpenCV's bilinear resizing of bytes."""


def blur(pictures: Tensor, dilation: int) -> Tensor:
    """The binomial filter of 3 x 3 taps, `dilation` pixels apart; sides may be shorter than that."""
    if dilation < 1:
        raise ValueError(f"expected a dilation of at least 1 pixel; got {dilation}; use 1, 2, 4, ..")
    out = _wide(pictures)
    for axis in (-2, -1):
        first, last = out.narrow(axis, 0, 1), out.narrow(axis, -1, 1)
        shape = list(out.shape)
        shape[axis] = dilation
        padded = torch.cat([first.expand(shape), out, last.expand(shape)], dim=axis)
        size = out.shape[axis]
        sides = padded.narrow(axis, 0, size) + padded.narrow(axis, 2 * dilation, size)
        out = sides.mul_(0.25).add_(out, alpha=0.5)
    return out.to(pictures.dtype)


def wavelet_split(pictures: Tensor, levels: int = 5) -> tuple[Tensor, Tensor]:
    """High and low band, which sum to the images; the low one is blurred `levels` times, 1, 2, 4, .. pixels apart."""
    low = _low(pictures, levels)
    return pictures - low, low


def wavelet_fix(content: Tensor, style: Tensor, levels: int = 5) -> Tensor:
    """The high band of `content` on the low band of `style`, both of one size.

    Memory beside the result: a few planes of one channel.
    """
    _check(content, style)
    if content.shape != style.shape:
        raise ValueError(
            f"expected content and style of one shape; got {tuple(content.shape)} and {tuple(style.shape)}; resize "
            "the style first"
        )
    out = torch.empty_like(content)
    for sample in range(content.shape[0]):
        for channel in range(3):
            x, s = (_wide(pictures[sample, channel]) for pictures in (content, style))
            out[sample, channel] = x + _low(s - x, levels)
    return out


def adain_fix(content: Tensor, style: Tensor, eps: float = 1e-5) -> Tensor:
    """`content` with the mean and deviation of every channel of `style`, which may have another size.

    Args:
        eps: added to the variances, of values in 0-1.
    """
    _check(content, style)
    if len(content) != len(style):
        raise ValueError(
            f"expected as many images of style as of content; got {len(style)} for {len(content)}; repeat the style"
        )
    x, s = _wide(content), _wide(style)
    scale = _deviation(s, eps) / _deviation(x, eps)
    out = (x - x.mean((-2, -1), keepdim=True)).mul_(scale).add_(s.mean((-2, -1), keepdim=True))
    return out.to(content.dtype)


def keep_luma(gray: Tensor, coloured: Tensor) -> Tensor:
    """The luma Y of `gray` with the chroma U, V of `coloured`, which is resized to it bilinearly.

        Y = 0.299 R + 0.587 G + 0.114 B,    U = 0.492 (B - Y),    V = 0.877 (R - Y)
        R = Y + 1.140 V,    G = Y - 0.395 U - 0.581 V,    B = Y + 2.032 U

    In bytes, U and V around 128 and cut off there, with the roundings of OpenCV's 8-bit resizing and of its conversion
    to YUV and back: what rounding leaves out of U comes back doubled in B. The result is in steps of 1/255.
    """
    _check(gray, coloured)
    if len(gray) != len(coloured):
        raise ValueError(
            f"expected as many coloured images as gray ones; got {len(coloured)} for {len(gray)}; pair them up"
        )
    y, (u, v) = _luma(_integers(gray)), _chroma(_resized(_integers(coloured), gray.shape[-2], gray.shape[-1]))
    planes = [y + _sum((1.140, v)), y + _sum((-0.395, u), (-0.581, v)), y + _sum((2.032, u))]
    return torch.stack(planes, dim=1).clamp_(0, 255).div(255).to(gray.dtype)


def to_bytes(pictures: Tensor, truncate: bool = True) -> Tensor:
    """uint8 images 0-255, after a clamp to 0-1.

    Args:
        truncate: cut fractions off, as the released PASD and STAR do; False rounds, which is half a step brighter.
    """
    if not pictures.is_floating_point():
        raise TypeError(f"expected floating point images in 0-1; got {pictures.dtype}; divide bytes by 255")
    scaled = _wide(pictures).clamp(0, 1).mul_(255)
    return (scaled if truncate else scaled.round_()).to(torch.uint8)


def _wide(pictures: Tensor) -> Tensor:
    return pictures.to(torch.promote_types(pictures.dtype, torch.float32))


def _low(pictures: Tensor, levels: int) -> Tensor:
    for level in range(levels):
        pictures = blur(pictures, 2**level)
    return pictures


def _deviation(pictures: Tensor, eps: float) -> Tensor:
    """Standard deviation of every channel, `(batch, 3, 1, 1)`; a single pixel has the variance 0."""
    pixels = pictures.shape[-2] * pictures.shape[-1]
    return (pictures.var((-2, -1), correction=min(1, pixels - 1), keepdim=True) + eps).sqrt()


def _integers(pictures: Tensor) -> Tensor:
    """Bytes, in integers wide enough for sums of them with fractions."""
    return to_bytes(pictures, truncate=False).int()


def _resized(pixels: Tensor, rows: int, columns: int) -> Tensor:
    """Bytes at another size, bilinearly; of the sum along a row 4 bits are dropped before the weights of the rows."""
    if pixels.shape[-2:] == (rows, columns):
        return pixels
    left, right, share = _neighbours(pixels.shape[-1], columns, pixels.device)
    across = pixels[..., left] * (2**_WEIGHT_BITS - share) + pixels[..., right] * share >> 4
    above, below, share = _neighbours(pixels.shape[-2], rows, pixels.device)
    share = share[:, None]
    upper, lower = across[..., above, :] * (2**_WEIGHT_BITS - share) >> 16, across[..., below, :] * share >> 16
    return upper + lower + 2 >> 2


def _neighbours(size: int, new: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of `new` places on an axis of `size` pixels: the pixels around its centre, and the second one's share."""
    places = ((torch.arange(new, dtype=torch.float64) + 0.5) * (size / new) - 0.5).float()
    first = places.floor()
    share = ((places - first) * 2**_WEIGHT_BITS).round().int()
    low = first.long()
    return low.clamp(0, size - 1).to(device), (low + 1).clamp(0, size - 1).to(device), share.to(device)


def _luma(pixels: Tensor) -> Tensor:
    """Y, `(batch, rows, columns)`."""
    return _sum((0.299, pixels[:, 0]), (0.587, pixels[:, 1]), (0.114, pixels[:, 2]))


def _chroma(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """U and V, `(batch, rows, columns)` each."""
    y = _luma(pixels)
    u, v = _sum((0.492, pixels[:, 2] - y)), _sum((0.877, pixels[:, 0] - y))
    return u.clamp_(-128, 127), v.clamp_(-128, 127)


def _sum(*terms: tuple[float, Tensor]) -> Tensor:
    """Sum of factors times integers, rounded, by integers alone."""
    total = sum(round(factor * 2**_BITS) * values for factor, values in terms) + 2 ** (_BITS - 1)
    return total >> _BITS


def _check(*batches: Tensor) -> None:
    for pictures in batches:
        if pictures.ndim != 4 or pictures.shape[1] != 3 or not pictures.is_floating_point():
            raise ValueError(
                f"expected floating point images (batch, 3, rows, columns) in 0-1; got {pictures.dtype} of shape "
                f"{tuple(pictures.shape)}; permute arrays and divide bytes by 255"
            )
