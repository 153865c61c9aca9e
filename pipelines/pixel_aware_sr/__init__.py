"""PASD: pixel-aware super-resolution, stylization and colorization under Stable Diffusion (arXiv 2308.14469)."""

from diffattn.pipelines import keep_paths

from .checkpoint.loading import PASDNetworks, load_paca, load_pasd, save_paca
from .networks.controlnet import PASDControlNetModel
from .networks.unet import PASDUNet2DConditionModel
from .pipeline import PASDPipeline
from .pipeline_xl import PASDXLPipeline

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

keep_paths(
    __name__,
    {
        "controlnet": "networks.controlnet",
        "unet": "networks.unet",
    },
)
