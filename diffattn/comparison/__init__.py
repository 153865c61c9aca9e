"""Settings side by side on the same prompts and seeds: time, memory, fidelity."""

from .compare import compare
from .results import Comparison, Row
from .setting import Setting

__all__ = ["Comparison", "Row", "Setting", "compare"]
