"""What a family that has no row needs: the attention calls of a model, its grid, a row to try, and what is missing.

Read in this order: `describe` (the interface), `watching` (one forward and its calls), `grids` and `searching` (grids
among the arguments), `probing` (which token is which cell), `layers` (what that says of each layer), `rows` (the text
of the row), `checks` (what the row is asked), `report` (what is printed).
"""

from .checks import Check
from .describe import describe
from .report import Description, Kind

__all__ = ["Check", "Description", "Kind", "describe"]
