"""The kernels as machine code: each fits the shared memory of its card, and spills no more than the table says.

These are the figures that `diffattn/kernels/cuda.py` chooses its settings by, and that docs/cuda.md shows.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_code.cards import CARDS
from cuda_code.checks import Check, compiled, on_cuda, window, write_backward, write_forward

from diffattn import ClearAttention, HaloAttention, TokenGrid
from diffattn.kernels import flex

pytestmark = pytest.mark.cuda_code
LARGE = TokenGrid(128, 128, before=512)
BRAIN, SINGLE = torch.bfloat16, torch.float32

FORWARD = {(card, BRAIN, head_dim): 0 for card in CARDS for head_dim in (64, 128, 160, 256)}
"""Bytes that a thread may spill."""
FORWARD |= {(card, SINGLE, head_dim): 0 for card in ("rtx4090", "h100") for head_dim in (64, 128)}
FORWARD |= {(card, SINGLE, 256): 600 for card in ("rtx4090", "h100")}
BACKWARD = {(card, BRAIN, head_dim): 0 for card in CARDS for head_dim in (64, 128, 160, 256)}
BACKWARD |= {("h100", BRAIN, 128): 8, ("a100", BRAIN, 64): 32, ("rtx4090", BRAIN, 64): 32, ("rtx5090", BRAIN, 64): 96}
NOW = {("a100", 64), ("rtx4090", 160), ("h100", 128), ("b200", 128), ("rtx5090", 128)}
"""What `make cuda-code` compiles; `make cuda-code-all` all."""


def cases(table: dict[tuple[str, torch.dtype, int], int], now: set[tuple[str, int]]) -> list[Any]:
    return [
        pytest.param(
            card, dtype, head_dim, spilled, id=f"{card}-{str(dtype).removeprefix('torch.')}-{head_dim}",
            marks=[] if (card, head_dim) in now and dtype == BRAIN else [pytest.mark.slow],
        )
        for (card, dtype, head_dim), spilled in table.items()
    ]  # fmt: skip


def written(card: str, dtype: torch.dtype, head_dim: int, backward: bool, mechanism: Any = None) -> Any:
    """Tokens in tile order, of the size that the documents speak of."""
    check = Check(card, mechanism or ClearAttention(radius=8), LARGE, dtype, head_dim=head_dim, backward=backward)
    with on_cuda(backward):
        ordered = flex.ordered_call(window(check))
    return write_backward(card, ordered) if backward else write_forward(card, ordered)


@pytest.mark.parametrize(("card", "dtype", "head_dim", "spilled"), cases(FORWARD, NOW))
def test_a_forward_kernel_fits(card: str, dtype: torch.dtype, head_dim: int, spilled: int, folder: Path) -> None:
    (found,) = compiled(card, written(card, dtype, head_dim, backward=False).source, folder)
    assert found.shared <= CARDS[card].shared
    assert found.spilled <= spilled
    if dtype != SINGLE:
        assert any("MMA" in name for name in found.products), "no tensor cores"


@pytest.mark.parametrize(
    ("card", "dtype", "head_dim", "spilled"), cases(BACKWARD, {("a100", 128), ("h100", 64), ("rtx4090", 160)})
)
def test_a_backward_kernel_fits(card: str, dtype: torch.dtype, head_dim: int, spilled: int, folder: Path) -> None:
    (found,) = compiled(card, written(card, dtype, head_dim, backward=True).source, folder)
    assert found.shared <= CARDS[card].shared
    assert found.spilled <= spilled


def test_the_rule_takes_few_instructions(folder: Path) -> None:
    """912 with coordinates computed by floats; 461 with no rule."""
    (found,) = compiled("h100", written("h100", BRAIN, 128, backward=False).source, folder)
    partial, full = found.loops
    assert partial <= 730
    assert full <= 440


def test_the_tables_of_a_video_and_a_mask_fit_too(folder: Path) -> None:
    video = TokenGrid(24, 40, frames=6, before=512)
    check = Check("rtx4090", ClearAttention(radius=5), video, head_dim=128, mask=True)
    with on_cuda():
        ordered = flex.ordered_call(window(check))
    (found,) = compiled("rtx4090", write_forward("rtx4090", ordered).source, folder)
    assert found.shared <= CARDS["rtx4090"].shared
    assert found.spilled == 0


@pytest.mark.slow
@pytest.mark.parametrize("card", CARDS)
def test_blocks_of_64_queries_fit(card: str, folder: Path) -> None:
    """Whole tiles of 8 x 8 cells."""
    mechanism = HaloAttention(tile=8, halo=1)
    (found,) = compiled(card, written(card, BRAIN, 128, backward=False, mechanism=mechanism).source, folder)
    assert found.shared <= CARDS[card].shared
    assert found.spilled <= 32
