"""Attention that costs less, for the diffusion pipelines people already use."""

from . import families, tiny
from .adapters import load, save
from .calibration import calibrate
from .comparison import compare
from .config import register
from .description import describe
from .grid import TokenGrid
from .highres import generate_large
from .measure.estimate import estimate
from .mechanisms import (
    AgentAttention,
    ClearAttention,
    DualScopeAttention,
    HaloAttention,
    LinearAttention,
    Mechanism,
    NeighborhoodAttention,
    RoutingAttention,
    SoftmaxAttention,
    TokenMergeAttention,
)
from .swap.apply import Handle, apply, attn_processors, restore
from .swap.exact import ExactHandle, apply_exact
from .swap.report import summary
from .swap.settings.recipe import Recipe

families.describe = describe

__all__ = [
    "AgentAttention",
    "ClearAttention",
    "DualScopeAttention",
    "ExactHandle",
    "HaloAttention",
    "Handle",
    "LinearAttention",
    "Mechanism",
    "NeighborhoodAttention",
    "Recipe",
    "RoutingAttention",
    "SoftmaxAttention",
    "TokenGrid",
    "TokenMergeAttention",
    "apply",
    "apply_exact",
    "attn_processors",
    "calibrate",
    "compare",
    "describe",
    "estimate",
    "generate_large",
    "load",
    "register",
    "restore",
    "save",
    "summary",
    "tiny",
]
