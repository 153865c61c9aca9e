"""Attention that costs less, for the diffusion pipelines people already use.

A name is imported when it is first used: `import diffattn` itself loads neither torch nor diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import tiny
    from .adapters import load, save
    from .calibration.calibrate import calibrate
    from .calibration.heads import calibrate_heads
    from .comparison.compare import compare
    from .config import register
    from .description.describe import describe
    from .grid import TokenGrid
    from .highres import generate_large
    from .measure.estimate.estimate import estimate
    from .mechanisms import (
        AgentAttention,
        ChannelAttention,
        ClearAttention,
        CrissCrossAttention,
        DualScopeAttention,
        GlobalContextAttention,
        HaloAttention,
        HybridAttention,
        LinearAttention,
        Mechanism,
        MultiAxisAttention,
        NeighborhoodAttention,
        PerHeadAttention,
        RoutingAttention,
        ShiftedWindowAttention,
        SoftmaxAttention,
        SparseLinearAttention,
        TokenMergeAttention,
        VideoSparseAttention,
        WindowStateAttention,
    )
    from .swap.apply import Handle, apply, attn_processors, restore
    from .swap.exact import ExactHandle, apply_exact
    from .swap.report import summary
    from .swap.settings.recipe import Recipe

__all__ = [
    "AgentAttention",
    "ChannelAttention",
    "ClearAttention",
    "CrissCrossAttention",
    "DualScopeAttention",
    "ExactHandle",
    "GlobalContextAttention",
    "HaloAttention",
    "Handle",
    "HybridAttention",
    "LinearAttention",
    "Mechanism",
    "MultiAxisAttention",
    "NeighborhoodAttention",
    "PerHeadAttention",
    "Recipe",
    "RoutingAttention",
    "ShiftedWindowAttention",
    "SoftmaxAttention",
    "SparseLinearAttention",
    "TokenGrid",
    "TokenMergeAttention",
    "VideoSparseAttention",
    "WindowStateAttention",
    "apply",
    "apply_exact",
    "attn_processors",
    "calibrate",
    "calibrate_heads",
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

_ELSEWHERE = {
    "ExactHandle": "swap.exact",
    "Handle": "swap.apply",
    "Recipe": "swap.settings.recipe",
    "TokenGrid": "grid",
    "apply": "swap.apply",
    "apply_exact": "swap.exact",
    "attn_processors": "swap.apply",
    "calibrate": "calibration.calibrate",
    "calibrate_heads": "calibration.heads",
    "compare": "comparison.compare",
    "describe": "description.describe",
    "estimate": "measure.estimate.estimate",
    "generate_large": "highres",
    "load": "adapters",
    "register": "config",
    "restore": "swap.apply",
    "save": "adapters",
    "summary": "swap.report",
}
"""Public names -> their modules; all others are mechanisms."""
_PARTS = {
    *("adapters", "calibration", "comparison", "config", "description", "errors", "families", "files", "grid"),
    *("highres", "kernels", "measure", "mechanisms", "media", "options", "parallel", "swap", "tiny", "video"),
}
"""Modules that are attributes without an import of their own: `diffattn.measure.psnr`."""

if not TYPE_CHECKING:  # a checker has the names from above, and misses wrong ones

    def __getattr__(name: str) -> Any:
        """A public name or a part of the library, imported now."""
        if name in _PARTS:
            return import_module(f".{name}", __name__)
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f".{_ELSEWHERE.get(name, 'mechanisms')}", __name__), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    """Public names, parts and what every module has."""
    return sorted({*globals(), *__all__, *_PARTS})
