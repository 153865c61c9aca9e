"""Several ranks at one picture or video, by torch.distributed: operations, and clip-parallel video built on them.

The law: the result does not depend on the number of ranks, nor on how the work is split.
"""

from .attention import ClipAttention
from .clip_family import ClipFamily
from .conv import halo_conv, padded_layer
from .frames import CLIP_FAMILIES, apply_on_clips
from .gather import gather_frames
from .group_norm import distributed_group_norm
from .halo import halo_exchange, pad_frames
from .merge import merge_attention, merge_over_ranks, partial_attention
from .noise import FrameNoise
from .plan import FramePlan, Traffic
from .prompts import frame_prompts, hold, linear

__all__ = [
    "CLIP_FAMILIES",
    "ClipAttention",
    "ClipFamily",
    "FrameNoise",
    "FramePlan",
    "Traffic",
    "apply_on_clips",
    "distributed_group_norm",
    "frame_prompts",
    "gather_frames",
    "halo_conv",
    "halo_exchange",
    "hold",
    "linear",
    "merge_attention",
    "merge_over_ranks",
    "pad_frames",
    "padded_layer",
    "partial_attention",
]
