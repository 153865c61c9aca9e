"""Attention mechanisms, one file each."""

from .agent import AgentAttention
from .base import Context, Mechanism
from .clear import ClearAttention
from .dual_scope import DualScopeAttention
from .halo import HaloAttention
from .linear import LinearAttention
from .neighborhood import NeighborhoodAttention
from .routing import RoutingAttention
from .softmax import SoftmaxAttention
from .token_merge import TokenMergeAttention

__all__ = [
    "AgentAttention",
    "ClearAttention",
    "Context",
    "DualScopeAttention",
    "HaloAttention",
    "LinearAttention",
    "Mechanism",
    "NeighborhoodAttention",
    "RoutingAttention",
    "SoftmaxAttention",
    "TokenMergeAttention",
]
