"""ControlNets that are built otherwise than their transformer."""

from .image_transformers import sd3
from .layout import Family

ROWS: tuple[Family, ...] = (
    # its hidden_states may be tokens already
    Family("SD3 ControlNet", ("SD3ControlNetModel",), sd3("controlnet_cond")),
)
