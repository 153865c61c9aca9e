"""STAR: real-world video super-resolution with text-to-video models (arXiv 2501.02976)."""

from diffattn.pipelines import keep_paths

from .cogvideox.pipeline import CogVideoXSTARPipeline
from .cogvideox.scheduler import STARCogVideoXScheduler
from .cogvideox.transformer import STARCogVideoXTransformer3DModel
from .i2vgenxl.checkpoint.convert import convert, load_official
from .i2vgenxl.networks.controlnet import STARControlNetModel
from .i2vgenxl.networks.unet import STARUNet3DConditionModel
from .i2vgenxl.pipeline import STARPipeline
from .i2vgenxl.scheduler import STARScheduler
from .i2vgenxl.settings import UpscaleSettings
from .training.losses import DynamicFrequencyLoss

__all__ = [
    "CogVideoXSTARPipeline",
    "DynamicFrequencyLoss",
    "STARCogVideoXScheduler",
    "STARCogVideoXTransformer3DModel",
    "STARControlNetModel",
    "STARPipeline",
    "STARScheduler",
    "STARUNet3DConditionModel",
    "UpscaleSettings",
    "convert",
    "load_official",
]

keep_paths(
    __name__,
    {
        "cogvideox_convert": "cogvideox.convert",
        "cogvideox_scheduler": "cogvideox.scheduler",
        "cogvideox_transformer": "cogvideox.transformer",
        "controlnet": "i2vgenxl.networks.controlnet",
        "convert": "i2vgenxl.checkpoint.convert",
        "scheduler": "i2vgenxl.scheduler",
        "unet": "i2vgenxl.networks.unet",
    },
)
