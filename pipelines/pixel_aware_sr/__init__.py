"""PASD: pixel-aware super-resolution, stylization and colorization under Stable Diffusion (arXiv 2308.14469)."""

from .controlnet import PASDControlNetModel
from .loading import PASDNetworks, load_paca, load_pasd, save_paca
from .pipeline import PASDPipeline
from .pipeline_xl import PASDXLPipeline
from .unet import PASDUNet2DConditionModel

__all__ = [
    "PASDControlNetModel",
    "PASDNetworks",
    "PASDPipeline",
    "PASDUNet2DConditionModel",
    "PASDXLPipeline",
    "load_paca",
    "load_pasd",
    "save_paca",
]
