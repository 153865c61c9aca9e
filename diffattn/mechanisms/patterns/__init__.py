"""Attention patterns of the literature on vision transformers, one file each."""

from .channel import ChannelAttention
from .criss_cross import CrissCrossAttention
from .global_context import GlobalContextAttention
from .multi_axis import MultiAxisAttention
from .per_head import PerHeadAttention
from .shifted_window import ShiftedWindowAttention
from .window_state import WindowStateAttention

__all__ = [
    "ChannelAttention",
    "CrissCrossAttention",
    "GlobalContextAttention",
    "MultiAxisAttention",
    "PerHeadAttention",
    "ShiftedWindowAttention",
    "WindowStateAttention",
]
