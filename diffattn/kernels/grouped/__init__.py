"""Attention within the groups of a partition of the grid, with or without the means of everything outside."""

from .attend import attend_groups
from .complement import attend_complement, block_of_cells
from .partition import Partition

__all__ = ["Partition", "attend_complement", "attend_groups", "block_of_cells"]
