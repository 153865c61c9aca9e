"""From decoded pixels to the images that the caller gets."""

from collections.abc import Callable
from typing import Any

from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from diffattn.media.color import adain_fix, keep_luma, to_bytes, wavelet_fix

from .preprocess import restore_size

COLOR_FIXES: dict[str | None, Callable[[Tensor, Tensor], Tensor]] = {
    "wavelet": wavelet_fix,
    "adain": adain_fix,
    None: lambda content, style: content,
}


def finish(
    decoded: Tensor, prepared: Tensor, given: Image.Image, upscale: float, task: str, color_fix: str | None
) -> Image.Image:
    """Colours and size of a result: decoded and prepared image are (3, rows, columns) in 0..1."""
    if task == "grayscale":
        gray = from_pil(given.convert("L").convert("RGB"))
        return to_pil(keep_luma(gray, decoded[None].cpu().clamp(0, 1))[0], truncate=False)
    fixed = COLOR_FIXES[color_fix](decoded[None], prepared[None])[0]
    return restore_size(to_pil(fixed), *given.size, upscale)


def to_pil(picture: Tensor, truncate: bool = True) -> Image.Image:
    """A Pillow image of (3, rows, columns) around 0..1; fractions of 1/255 are cut off, as the released code does."""
    return Image.fromarray(to_bytes(picture, truncate).permute(1, 2, 0).cpu().numpy())


def as_output(finished: list[Image.Image], output_type: str) -> Any:
    """Pillow images, or all of them in one array (batch, rows, columns, 3) or tensor (batch, 3, rows, columns)."""
    if output_type == "pil":
        return finished
    arrays = VaeImageProcessor.pil_to_numpy(finished)
    return arrays if output_type == "np" else VaeImageProcessor.numpy_to_pt(arrays)


def from_pil(picture: Image.Image) -> Tensor:
    """(1, 3, rows, columns) in 0..1 of an RGB image."""
    pixels: Tensor = VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(picture))
    return pixels
