"""Prompts for restoration: what an image shows, what the user adds, and the quality prompt."""

import re
from collections.abc import Callable, Mapping

from PIL import Image

Captioner = Callable[[Image.Image], str]
"""Says what an image shows, such as a BLIP model's pipeline from transformers does; nothing is loaded by default."""

QUALITY = "clean, high-resolution, 8k"
NEGATIVE = "blurry, dotted, noise, raster lines, unclear, lowres, over-smoothed"
XL_NEGATIVE = (
    "blurry, dotted, noise, raster lines, unclear, lowres, over-smoothed, "
    "painting, oil painting, illustration, drawing, art, sketch, cartoon, CG style, 3D render"
)
"""The released list for SDXL is longer than that of SD 1.5; this one adds what is not a photograph."""
COLOR_NEGATIVE = "b&w, color bleeding"

XL_QUALITY = f"photorealistic, {QUALITY}"

REPLACED = {"blurry": "clear", "noisy": "clean"}
"""Words of captions that describe the degradation, which the result should not have."""

XL_REPLACED = REPLACED | {"painting": "photo"}
COLOR_REPLACED = {"black and white": "color"}


def compose(user: str, caption: str = "", quality: str = "", replaced: Mapping[str, str] = REPLACED) -> str:
    """Caption, user's words and quality prompt, as far as there are any, separated by commas.

    >>> compose("a harbour", "a blurry photo of boats", QUALITY)
    'a clear photo of boats, a harbour, clean, high-resolution, 8k'
    """
    for word, better in replaced.items():
        caption = re.sub(rf"\b{word}\b", better, caption)
    parts = (part.strip().strip(",").strip() for part in (caption, user, quality))
    return ", ".join(part for part in parts if part)
