"""Settings side by side on the same prompts and seeds: time, memory, fidelity."""

from .compare import compare
from .drawing import Drawn, draw
from .opening import open_comparison
from .results import Comparison, Row
from .setting import Setting

__all__ = ["Comparison", "Drawn", "Row", "Setting", "compare", "draw", "open_comparison"]
