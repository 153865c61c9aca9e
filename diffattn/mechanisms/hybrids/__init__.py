"""Exact attention to some tokens, and a trained branch for the others, one file each."""

from .hybrid import HybridAttention
from .sla import SparseLinearAttention
from .vsa import VideoSparseAttention

__all__ = ["HybridAttention", "SparseLinearAttention", "VideoSparseAttention"]
