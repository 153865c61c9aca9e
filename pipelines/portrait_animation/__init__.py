"""X-Portrait: an image of a person, animated after a video of another (arXiv 2403.15931)."""

from diffattn.pipelines import keep_paths

from .checkpoint.convert import convert, load_official
from .networks.components import Sizes
from .networks.null_text import NullText
from .networks.reference import ReferenceBank
from .networks.reference_unet import XPortraitReferenceUNet
from .networks.unet import XPortraitUNet
from .pipeline import XPortraitPipeline
from .run.frames import select_frames

__all__ = [
    "NullText",
    "ReferenceBank",
    "Sizes",
    "XPortraitPipeline",
    "XPortraitReferenceUNet",
    "XPortraitUNet",
    "convert",
    "load_official",
    "select_frames",
]

keep_paths(
    __name__,
    {
        "convert": "checkpoint.convert",
        "null_text": "networks.null_text",
        "reference_unet": "networks.reference_unet",
        "unet": "networks.unet",
    },
)
