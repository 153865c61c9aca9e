"""Images of any kind as numbers in 0-1."""

from typing import Any

import numpy as np
import torch


def as_pixels(picture: Any) -> np.ndarray:
    """An image (Pillow, array or tensor; 8-bit or 0-1 floats) as float64 in 0-1."""
    if isinstance(picture, torch.Tensor):
        picture = picture.detach().cpu().double().numpy() if picture.is_floating_point() else picture.cpu().numpy()
    pixels = np.asarray(picture)
    return pixels / 255.0 if pixels.dtype == np.uint8 else pixels.astype(np.float64)
