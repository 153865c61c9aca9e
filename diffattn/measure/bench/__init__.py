"""Time attention kernels beside full attention and the official order, and check each against an exact reference.

    bound = time of full attention * share of the pairs that the window keeps

is what a kernel would take that worked at full attention's speed and computed nothing in vain. Every kernel's output is
compared, at some queries, with softmax attention in float64; a kernel that misses the tolerance of its dtype gets no
ratios. Mechanisms that are no windows are compared with their own reference in float64, on a smaller grid.
"""

from .report import markdown, plot, save, tables
from .results import ROWS, Case, Result, Row, Scaling, Settings
from .run import run

__all__ = ["ROWS", "Case", "Result", "Row", "Scaling", "Settings", "markdown", "plot", "run", "save", "tables"]
