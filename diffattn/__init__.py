"""Attention that costs less, for the diffusion pipelines people already use."""

from .adapters import load, save
from .config import register
from .grid import TokenGrid
from .mechanisms import AgentAttention, ClearAttention, Mechanism, SoftmaxAttention
from .report import summary
from .swap import Handle, apply, attn_processors, restore

__all__ = [
    "AgentAttention",
    "ClearAttention",
    "Handle",
    "Mechanism",
    "SoftmaxAttention",
    "TokenGrid",
    "apply",
    "attn_processors",
    "load",
    "register",
    "restore",
    "save",
    "summary",
]
