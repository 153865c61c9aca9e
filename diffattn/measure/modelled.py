"""Modelled times of attention on GPUs, from their data sheets: no measurement, and labelled so wherever they are shown.

    seconds = sum over the parts of max(FLOPs / (MATMUL peak), bytes / (MEMORY bandwidth))

A part is what one kernel, or one pass over memory, does. Parts do not overlap, caches and launches cost nothing: good
for what grows with what and for the order of variants, not for times to rely on.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType

from ..grid import TokenGrid
from ..kernels.block_mask import cuda_blocks
from ..kernels.cuda import cuda_order
from ..kernels.order import TileOrder
from ..kernels.pattern import Pattern
from ..mechanisms.routing import RoutingAttention

MATMUL = 0.7
"""Share of the peak that flash attention's products are assumed to reach."""
MEMORY = 0.8
"""Share of the bandwidth that a pass over memory is assumed to reach."""
MASKED = 0.25
"""Share of the peak that SDPA under a dense mask, and FlexAttention with a rule, are assumed to reach."""
LAUNCH = 5e-6
"""Seconds that a call of a kernel is assumed to take at least."""
HALF, SINGLE = 2, 4
"""Bytes of a number in bfloat16 and in float32."""
PASSES = 6
"""Over the logits of the means for the choice: written; largest, exponentials read and written, sums, weights."""


@dataclass(frozen=True)
class Card:
    """A GPU as its data sheet has it."""

    name: str
    tflops: float
    """bfloat16 products with float32 sums, dense, in 10^12 a second."""
    gigabytes: float
    """Bandwidth of its memory in 10^9 bytes a second."""


CARDS = MappingProxyType(
    {
        card.name: card
        for card in (
            Card("A100", 312, 2039),
            Card("H100", 989, 3350),
            Card("RTX 4090", 165, 1008),
            Card("RTX 5090", 209, 1792),
            Card("B200", 2250, 8000),
        )
    }
)
"""From NVIDIA's data sheets: A100 80 GB SXM, H100 SXM, and the white papers of Ada and RTX Blackwell."""


@dataclass(frozen=True)
class Part:
    """One step of a call."""

    name: str
    flops: float
    bytes: float
    reached: float = MATMUL
    """Share of the peak that its products reach."""
    launches: int = 0

    def seconds(self, card: Card) -> float:
        """Modelled."""
        products = self.flops / (self.reached * card.tflops * 1e12)
        return max(products, self.bytes / (MEMORY * card.gigabytes * 1e9), self.launches * LAUNCH)


def full_parts(grid: TokenGrid, heads: int, head_dim: int) -> list[Part]:
    """Full attention by a flash kernel: both products, and q, k, v and the output once each."""
    return [Part("full", 4 * grid.pairs * heads * head_dim, 4 * grid.tokens * heads * head_dim * HALF)]


def keys_computed(pattern: Pattern, grid: TokenGrid) -> float:
    """Keys that FlexAttention computes for a query on CUDA, on average, other tokens not counted."""
    blocks = cuda_blocks(pattern, cuda_order(pattern, grid.shape, False), 0, whole=True, backward=False, device="cpu")
    return float((blocks.lists.partial_count + blocks.lists.full_count).float().mean()) * blocks.size[1]


def window_parts(pattern: Pattern, grid: TokenGrid, heads: int, head_dim: int) -> list[Part]:
    """A window by FlexAttention: order, blocks, the queries of the other tokens."""
    cells, others, row = grid.cells, grid.others, heads * head_dim * HALF
    keys = keys_computed(pattern, grid) + others
    rest = [Part("other tokens", 4 * others * grid.tokens * heads * head_dim, 2 * grid.tokens * row, launches=1)]
    return [
        Part("order", 0, 2 * 4 * cells * row, launches=8),
        Part("blocks", 4 * cells * keys * heads * head_dim, 4 * cells * row, MASKED, launches=1),
        *(rest if others else []),
    ]


def dense_parts(grid: TokenGrid, heads: int, head_dim: int) -> list[Part]:
    """The same by SDPA under a mask of all pairs, which is kept from call to call and read in numbers."""
    pairs = grid.pairs
    return [
        Part("mask", 0, pairs * (1 + HALF), launches=1),
        Part("all pairs", 4 * pairs * heads * head_dim, pairs * HALF * heads, MASKED, launches=1),
    ]


def routing_parts(mechanism: RoutingAttention, grid: TokenGrid, heads: int, head_dim: int) -> list[Part]:
    """`routing` by FlexAttention, its choice as the library computes it, on one sample in bfloat16."""
    if mechanism.is_exact(grid):
        return full_parts(grid, heads, head_dim)
    sides, cells, others = mechanism.sides(grid), grid.cells, grid.others
    tiles = mechanism.tiles_in(grid)
    blocks = tiles * sides.blocks_per_tile
    asking = TileOrder(grid.shape, sides.asking).tiles
    exact = mechanism.exact_tiles(grid) * (cells / tiles)
    row = heads * head_dim * HALF  # bytes of a token in all heads
    logits = cells * blocks * heads
    weighed = asking * blocks * heads if mechanism.chosen_by == "mean" else logits
    return [
        Part("order", 0, 2 * 4 * cells * row),
        Part("means", 0, 2 * cells * row + 4 * blocks * heads * head_dim * SINGLE),
        Part("choice", 2 * weighed * head_dim + 2 * asking * blocks * heads * head_dim, PASSES * weighed * SINGLE),
        Part("lists", 0, 2 * asking * tiles * heads * SINGLE + 2 * asking * blocks * heads),
        Part("exact tiles", 4 * cells * exact * heads * head_dim, 4 * cells * row),
        Part("means seen", 4 * logits * head_dim, 0),
        Part("other tokens", 4 * grid.other_pairs * heads * head_dim, 4 * others * row),
    ]


def seconds(parts: Iterable[Part], card: Card) -> float:
    """Modelled time of a call."""
    return sum(part.seconds(card) for part in parts)
