"""Several ranks at one image or video, by torch.distributed: operations, and clip-parallel video built on them.

The law: the result does not depend on the number of ranks, nor on how the work is split.
"""

from .attention import ClipAttention
from .frames import CLIP_FAMILIES, apply_on_clips
from .operations.conv import halo_conv, padded_layer
from .operations.gather import gather_frames
from .operations.group_norm import distributed_group_norm
from .operations.halo import halo_exchange, pad_frames
from .operations.merge import merge_attention, merge_over_ranks, partial_attention
from .operations.noise import FrameNoise
from .operations.shares import FramePlan, Traffic
from .prompts import frame_prompts, hold, linear
from .video_models.clip_family import ClipFamily

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
