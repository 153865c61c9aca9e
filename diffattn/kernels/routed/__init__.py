"""Softmax attention where each tile of queries has some tiles of keys exactly, and all others by their means.

    out_q = softmax(l_q,others ; l_q,k for k in the tiles S of q ; L_q,b for the blocks b outside S) . (v, v_k, v_b)
    l_q,k = scale * q k + bias_k          L_q,b = scale * q k_b + log sum_{k in b} exp(bias_k)

k_b and v_b are means over the block, weighted by exp(bias): without a mask the term is log c in a block of c cells.
Keys lie in tiles of equal size, each made of equal blocks, in the order of the grid or in one of their own. S is chosen
by content (`select.py`) or given by geometry (`lists.py`).
"""

from .call import RoutedCall, probed, routed_call
from .centroids import centroid_order
from .content import content_order
from .gather import route
from .lists import Lists, touched_lists
from .run import BACKENDS, explain, run
from .select import choose_tiles

__all__ = [
    "BACKENDS",
    "Lists",
    "RoutedCall",
    "centroid_order",
    "choose_tiles",
    "content_order",
    "explain",
    "probed",
    "route",
    "routed_call",
    "run",
    "touched_lists",
]
