"""Attention mechanisms, one file each."""

from .agent import AgentAttention
from .base import Context, Mechanism
from .clear import ClearAttention
from .softmax import SoftmaxAttention

__all__ = ["AgentAttention", "ClearAttention", "Context", "Mechanism", "SoftmaxAttention"]
