"""ControlNets that are built otherwise than their transformer."""

from .image_transformers import sd3
from .layout import Family, transformer
from .readers import video

ROWS: tuple[Family, ...] = (
    # its hidden_states may be tokens already
    Family("SD3 ControlNet", ("SD3ControlNetModel",), sd3("controlnet_cond")),
    Family(
        "Cosmos ControlNet",
        ("CosmosControlNetModel",),
        transformer(
            r"control_blocks\.\d+\.attn1", video(2, before=0, patch_t="patch_size", argument="controls_latents")
        ),
    ),
)
