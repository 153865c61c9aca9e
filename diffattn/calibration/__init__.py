"""Find a recipe: for every layer and part of a run the attention that costs least for the fidelity asked for."""

from .calibrate import calibrate
from .heads import calibrate_heads

__all__ = ["calibrate", "calibrate_heads"]
