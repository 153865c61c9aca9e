"""X-Portrait: a picture of a person, animated after a video of another (arXiv 2403.15931)."""

from .components import Sizes
from .convert import convert, load_official
from .frames import select_frames
from .null_text import NullText
from .pipeline import XPortraitPipeline
from .reference import ReferenceBank
from .reference_unet import XPortraitReferenceUNet
from .unet import XPortraitUNet

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
