"""Attention mechanisms, one file each."""

from .agent import AgentAttention
from .base import Context, Mechanism
from .clear import ClearAttention
from .dual_scope import DualScopeAttention
from .halo import HaloAttention
from .hybrids import HybridAttention, SparseLinearAttention, VideoSparseAttention
from .linear import LinearAttention
from .neighborhood import NeighborhoodAttention
from .patterns import (
    ChannelAttention,
    CrissCrossAttention,
    GlobalContextAttention,
    MultiAxisAttention,
    PerHeadAttention,
    ShiftedWindowAttention,
    WindowStateAttention,
)
from .routing import RoutingAttention
from .softmax import SoftmaxAttention
from .token_merge import TokenMergeAttention

__all__ = [
    "AgentAttention",
    "ChannelAttention",
    "ClearAttention",
    "Context",
    "CrissCrossAttention",
    "DualScopeAttention",
    "GlobalContextAttention",
    "HaloAttention",
    "HybridAttention",
    "LinearAttention",
    "Mechanism",
    "MultiAxisAttention",
    "NeighborhoodAttention",
    "PerHeadAttention",
    "RoutingAttention",
    "ShiftedWindowAttention",
    "SoftmaxAttention",
    "SparseLinearAttention",
    "TokenMergeAttention",
    "VideoSparseAttention",
    "WindowStateAttention",
]
