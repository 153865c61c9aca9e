"""The GPUs that are pretended, as NVIDIA's documents have them."""

from typing import NamedTuple


class Card(NamedTuple):
    """What Inductor and Triton ask about a GPU."""

    name: str
    capability: tuple[int, int]
    processors: int
    shared: int
    """Bytes of shared memory that one block of threads may take."""
    threads: int
    """Threads that one processor holds."""
    gibibytes: int


CARDS = {
    "a100": Card("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912, 2048, 80),
    "rtx4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 128, 101376, 1536, 24),
    "h100": Card("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448, 2048, 80),
    "b200": Card("NVIDIA B200", (10, 0), 148, 232448, 2048, 180),
    "rtx5090": Card("NVIDIA GeForce RTX 5090", (12, 0), 170, 101376, 1536, 32),
}
