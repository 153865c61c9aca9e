"""The tiled kernel: cutting and chunking are invisible, and the memory of its backward pass is its inputs'."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from diffattn.grid import TokenGrid
from diffattn.kernels import window_attention
from diffattn.kernels.tiled import Strips, tile_mask, tile_masks, tiled_attention, windows

GRID = TokenGrid(9, 14, frames=2, before=3, after=2)


@pytest.mark.parametrize("tile", [(1, 2, 3), (1, 4, 4), (2, 3, 5), (1, 16, 8), (9, 99, 99)])
@pytest.mark.parametrize("budget", [1, 2**16, 2**30])
def test_tiles_and_budget_do_not_change_the_result(tile, budget, disc, make_case, tolerance):
    case = make_case(GRID, disc(4), pooled=2, mask="bias", grad=True)
    result = tiled_attention(case.call, tile=tile, budget=budget)
    assert (result - case.expected).abs().max() <= tolerance[torch.float64]
    found = torch.autograd.grad(result.square().sum(), case.leaves)
    expected = torch.autograd.grad(case.expected.square().sum(), case.leaves, retain_graph=True)
    assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) <= tolerance[torch.float64]


@pytest.mark.parametrize("name", ["disc", "lattice"])
def test_windows_lie_in_the_grid_and_hold_all_that_may_be_seen(name, request):
    pattern = request.getfixturevalue(name)(5)
    cut = windows(pattern, (3, 17, 40), (2, 8, 8))
    for axis, size in enumerate(cut.shape):
        for index in range(len(cut.starts[axis])):
            low, high = cut.keys(axis, index)
            first, last = pattern.span(axis, *cut.queries(axis, index), size)
            assert 0 <= low <= first < last <= high <= size


def test_inner_strips_share_the_masks_of_the_first_of_them(disc):
    pattern = disc(4)
    cut = windows(pattern, (1, 16, 75), (1, 8, 8))
    device, alike = torch.device("cpu"), [cut.alike(strips) for strips in cut.strips(1)]
    assert [strips.first for strips in alike] == [0, 1, 1, 1, 1, 1, 1, 1, 8, 9]
    for strips, first in zip(cut.strips(1), alike, strict=True):
        shared = tile_masks(pattern, cut, first, 3, device)
        for height, mask in zip(cut.heights(), shared, strict=True):
            assert torch.equal(mask, tile_mask(pattern, cut, height, strips, 3, device))
    assert cut.alike(Strips(2, 5, 8)) == Strips(1, 4, 8)


def test_backward_keeps_the_inputs_and_nothing_larger(disc, make_case):
    case = make_case(TokenGrid(32, 32), disc(6), grad=True)
    kept: dict[int, int] = {}
    with saved_tensors_hooks(
        lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) and x, lambda x: x
    ):
        tiled_attention(case.call)
    assert sum(kept.values()) <= 4 * case.call.q.untyped_storage().nbytes()


@pytest.mark.compile
@pytest.mark.slow
def test_the_models_compilation_takes_it_in(disc, tolerance):
    grid, pattern = TokenGrid(40, 40, before=4), disc(5)
    q = torch.randn(1, 2, grid.tokens, 8)

    def block(x):
        return window_attention(x * 2, x, x, grid, pattern, scale=0.3) + 1

    traced = torch.compile(block, fullgraph=True, backend="eager")
    assert (traced(q) - block(q)).abs().max() <= tolerance[torch.float32]
