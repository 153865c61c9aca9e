"""The eager kernel of rules on tiles: batches and budget are invisible, only padding brings a mask."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from diffattn.grid import TokenGrid
from diffattn.kernels import blocks, tiled
from diffattn.kernels.call import window_call
from diffattn.kernels.choose import choose

CPU = torch.device("cpu")


@pytest.mark.parametrize("grid", [TokenGrid(16, 24, frames=2, before=3, after=2), TokenGrid(13, 19)], ids=str)
@pytest.mark.parametrize("budget", [1, 2**16, 2**30])
def test_the_budget_does_not_change_the_result(budget, grid, bricks, make_case, tolerance):
    case = make_case(grid, bricks((1, 4, 8), 1), pooled=2, mask="bias", grad=True)
    order = blocks.block_order(case.call.pattern, grid)
    result = blocks.block_attention(case.call, order, budget)
    assert (result - case.expected).abs().max() <= tolerance[torch.float64]
    found = torch.autograd.grad(result.square().sum(), case.leaves)
    expected = torch.autograd.grad(case.expected.square().sum(), case.leaves, retain_graph=True)
    assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) <= tolerance[torch.float64]


def test_every_block_is_in_one_batch(bricks):
    pattern = bricks((1, 4, 8), 1)
    order = blocks.block_order(pattern, TokenGrid(21, 40))
    many = blocks.batches(pattern, order, CPU)
    assert torch.cat([batch.blocks for batch in many]).sort().values.equal(torch.arange(order.tiles))
    for batch in many:
        last = (batch.keys // 5 == 5).any(1)
        assert last.all() if batch.padded else not last.any()


@pytest.mark.parametrize("height", [16, 18])
def test_only_padding_brings_a_mask(height, bricks, make_case, monkeypatch):
    masks = []
    attend = blocks.attend_batch
    monkeypatch.setattr(
        blocks, "attend_batch", lambda parts, mask, scale: masks.append(mask is not None) or attend(parts, mask, scale)
    )
    tiled.tiled_attention(make_case(TokenGrid(height, 32, before=3), bricks((1, 4, 8), 1)).call)
    assert False in masks
    assert (True in masks) == (height == 18)


def test_small_tiles_and_rules_on_none_are_left_to_windows(bricks, disc, lattice):
    grid = TokenGrid(32, 32)
    assert blocks.block_order(bricks((1, 4, 8), 1), grid) is not None
    for pattern in (bricks((1, 4, 4), 1), disc(8), lattice(8)):
        assert blocks.block_order(pattern, grid) is None


@pytest.mark.parametrize(("reach", "backend"), [(1, "tiled"), (5, "dense")])
def test_auto_counts_the_keys_that_are_computed(reach, backend, bricks):
    """A box around the window would hold the grid; a diamond of tiles saves much of it."""
    grid = TokenGrid(40, 40)
    q = torch.zeros(1, 1, grid.tokens, 4)
    choice = choose(window_call(q, q, q, grid, bricks((1, 8, 8), reach), 0.5, None, None))
    assert choice.backend == backend


def test_backward_keeps_the_inputs_and_nothing_larger(bricks, make_case):
    case = make_case(TokenGrid(32, 32), bricks((1, 8, 8), 1), grad=True)
    kept: dict[int, int] = {}
    with saved_tensors_hooks(
        lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) and x, lambda x: x
    ):
        tiled.tiled_attention(case.call)
    assert sum(kept.values()) <= 4 * case.call.q.untyped_storage().nbytes()


@pytest.mark.compile
@pytest.mark.slow
def test_the_models_compilation_takes_it_in(bricks, tolerance):
    grid, pattern = TokenGrid(40, 40, before=4), bricks((1, 8, 8), 1)
    q = torch.randn(1, 2, grid.tokens, 8)

    def block(x):
        return window_call(x * 2, x, x, grid, pattern, 0.3, None, None)

    traced = torch.compile(lambda x: tiled.tiled_attention(block(x)) + 1, fullgraph=True, backend="eager")
    assert (traced(q) - tiled.tiled_attention(block(q)) - 1).abs().max() <= tolerance[torch.float32]
