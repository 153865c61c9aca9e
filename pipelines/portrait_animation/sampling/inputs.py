"""From the images that a caller gives to tensors of one size."""

from typing import Any

import numpy as np
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

Pictures = Image.Image | Tensor | Any
"""One image or several: of Pillow, uint8 arrays (n, rows, columns, 3), or what diffusers' image processor takes."""


def as_tensor(processor: VaeImageProcessor, pictures: Pictures, name: str, height: int, width: int) -> Tensor:
    """(images, 3, height, width) in -1..1; raises `ValueError` that names the argument for what are no images."""
    if isinstance(pictures, np.ndarray) and pictures.dtype == np.uint8 and pictures.ndim == 4:
        pictures = [Image.fromarray(one) for one in pictures]
    if isinstance(pictures, Image.Image):
        pictures = [pictures]
    if isinstance(pictures, list | tuple):
        pictures = [one.convert("RGB") if isinstance(one, Image.Image) else one for one in pictures]
    empty = pictures is None or (hasattr(pictures, "__len__") and not len(pictures))
    if empty or isinstance(pictures, str):
        raise ValueError(f"expected at least one image in {name}; got {pictures!r}; open files with Pillow first")
    try:
        tensor: Tensor = processor.preprocess(pictures, height, width)
    except (ValueError, TypeError) as error:
        raise ValueError(f"expected images in {name}; got {type(pictures).__name__}: {error}") from error
    if tensor.ndim != 4 or tensor.shape[1] != 3:
        raise ValueError(f"expected RGB images in {name}; got {tuple(tensor.shape)}; convert them first")
    return tensor
