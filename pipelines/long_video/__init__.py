"""Long videos on several ranks (Video-Infinity): `torchrun -m diffattn.pipelines.long_video`, or from Python.

>>> from diffattn.pipelines.long_video import LongVideoConfig, LongVideoPipeline, PromptRange
"""

from .checkpoints import Checkpoints, State
from .config import LongVideoConfig
from .fps_unet import FpsUNet3D
from .loading import open_parts
from .pipeline import LongVideoPipeline
from .prompts import PromptRange, read_prompts

__all__ = [
    "Checkpoints",
    "FpsUNet3D",
    "LongVideoConfig",
    "LongVideoPipeline",
    "PromptRange",
    "State",
    "open_parts",
    "read_prompts",
]
