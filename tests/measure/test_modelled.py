"""Modelled times: their parts are what the mechanisms count, and they grow as they should."""

import subprocess
import sys
from pathlib import Path

import pytest

from diffattn import RoutingAttention, TokenGrid
from diffattn.measure.modelled import CARDS, MATMUL, Card, Part, full_parts, routing_parts, seconds

GRIDS = [TokenGrid(64, 64, before=512), TokenGrid(128, 128, before=512), TokenGrid(48, 80, frames=21)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_parts_add_up_to_the_flops_of_the_mechanism(grid: TokenGrid) -> None:
    mechanism = RoutingAttention(top_k=4, tile=(1, 8, 16), pool=(1, 4, 4))
    parts = {part.name: part.flops for part in routing_parts(mechanism, grid, 24, 128)}
    of_softmax = parts["exact tiles"] + parts["means seen"] + parts["other tokens"]
    pairs = mechanism.share_on(grid) * grid.tokens**2
    assert of_softmax == pytest.approx(4 * pairs * 24 * 128, rel=1e-9)
    assert sum(part.flops for part in full_parts(grid, 24, 128)) == mechanism.__class__(share=1).flops(grid, 24, 128)


def test_a_part_takes_the_longer_of_its_two_times() -> None:
    card = Card("none", 1, 1)
    assert Part("products", MATMUL * 1e12, 0).seconds(card) == pytest.approx(1)
    assert Part("memory", 0, 0.8e9).seconds(card) == pytest.approx(1)
    assert Part("both", MATMUL * 1e12, 2 * 0.8e9).seconds(card) == pytest.approx(2)


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_routing_pays_on_large_grids_and_not_on_small_ones(card: Card) -> None:
    def ratio(side: int) -> float:
        grid = TokenGrid(side, side, before=512)
        own = routing_parts(RoutingAttention(top_k=4, tile=(8, 16), pool=8), grid, 24, 128)
        return seconds(full_parts(grid, 24, 128), card) / seconds(own, card)

    assert ratio(24) < 1 < ratio(128) < ratio(256)


def test_what_is_exact_costs_what_full_attention_costs() -> None:
    grid = GRIDS[0]
    assert routing_parts(RoutingAttention(share=1), grid, 8, 64) == full_parts(grid, 8, 64)


@pytest.mark.slow
def test_the_page_has_these_figures() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, root / "scripts" / "numbers" / "modelled_times.py", root / "docs" / "cuda.md", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
