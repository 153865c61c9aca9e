"""The size an image is restored at, and the way there and back.

    realisr    (w, h) * upscale, bicubic; then, where the shorter side is below the process size, up to it, bilinear
    grayscale  gray; shorter side to the process size, bilinear, or less, so that the longer is at most twice that
    both       each side down to a multiple of 8, bicubic: the image is squeezed, not cropped

Source: the released code of PASD, Yang, Wu, Ren, Xie, Zhang, 2024, https://arxiv.org/abs/2308.14469. Unlike there,
`upscale` may be a fraction, and a side never ends below 8 pixels.
"""

import math

from PIL import Image
from PIL.Image import Resampling

TASKS = ("realisr", "grayscale")
MULTIPLE = 8
"""Pixels of a latent cell: sides are multiples of it."""


def target_size(width: int, height: int, *, upscale: float, process_size: int, task: str) -> tuple[int, int]:
    """Width and height in pixels that an image of this size is restored at.

    Args:
        upscale: factor above 0 to each side; the task "grayscale" ignores it.
        process_size: least length of the shorter side in pixels, before both are brought down to multiples of 8.
        task: of `TASKS`.
    """
    return _resizes(width, height, upscale, process_size, task)[-1][0]


def prepare(picture: Image.Image, *, upscale: float, process_size: int, task: str) -> Image.Image:
    """The RGB image to restore, of `target_size`; gray for the task "grayscale"."""
    steps = _resizes(*picture.size, upscale, process_size, task)
    picture = picture.convert("L").convert("RGB") if task == "grayscale" else picture.convert("RGB")
    for size, resampling in steps:
        picture = picture.resize(size, resampling)
    return picture


def restore_size(picture: Image.Image, width: int, height: int, upscale: float) -> Image.Image:
    """A restored image at `upscale` times the input's width and height, which it was squeezed from; bicubic."""
    return picture.resize(_scaled(width, height, upscale), Resampling.BICUBIC)


def _resizes(
    width: int, height: int, upscale: float, process_size: int, task: str
) -> list[tuple[tuple[int, int], Resampling]]:
    """Sizes that an image passes through, and how it is resampled to each."""
    if task not in TASKS:
        raise ValueError(f"expected a task of {', '.join(TASKS)}; got {task!r}; choose one of them")
    if process_size < MULTIPLE:
        raise ValueError(f"expected a process_size of at least {MULTIPLE} pixels; got {process_size}; 768 is usual")
    scaled = _scaled(width, height, upscale)
    steps = [(scaled if task == "realisr" else (width, height), Resampling.BICUBIC)]
    short, long = sorted(steps[-1][0])
    if task == "grayscale" or short < process_size:
        short, long = process_size, process_size * long // short
        if task == "grayscale" and long > 2 * process_size:
            short, long = max(1, 2 * process_size * short // long), 2 * process_size
        wide = steps[-1][0][0] > steps[-1][0][1]
        steps.append(((long, short) if wide else (short, long), Resampling.BILINEAR))
    width, height = (max(MULTIPLE, side // MULTIPLE * MULTIPLE) for side in steps[-1][0])
    return [*steps, ((width, height), Resampling.BICUBIC)]


def _scaled(width: int, height: int, upscale: float) -> tuple[int, int]:
    if not 0 < upscale < math.inf:
        raise ValueError(f"expected an upscale above 0; got {upscale}; 1 restores at the picture's own size")
    return max(1, round(width * upscale)), max(1, round(height * upscale))
