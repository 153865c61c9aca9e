"""STAR: real-world video super-resolution with text-to-video models (arXiv 2501.02976)."""

from .cogvideox_pipeline import CogVideoXSTARPipeline
from .cogvideox_scheduler import STARCogVideoXScheduler
from .cogvideox_transformer import STARCogVideoXTransformer3DModel
from .controlnet import STARControlNetModel
from .convert import convert, load_official
from .losses import DynamicFrequencyLoss
from .pipeline import STARPipeline
from .scheduler import STARScheduler
from .settings import UpscaleSettings
from .unet import STARUNet3DConditionModel

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
