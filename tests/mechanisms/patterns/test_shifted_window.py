"""Windows and shifted ones, counted by hand."""

import pytest
import torch
from tolerances import assert_close

from diffattn import ShiftedWindowAttention, TokenGrid
from diffattn.mechanisms import Context


def test_every_second_head_has_windows_half_a_window_further() -> None:
    grid = TokenGrid(7, 10, before=1)
    (words, plain), (_, shifted) = ShiftedWindowAttention(window=4).head_masks(grid)
    assert "1 of 2" in words

    def row(mask: torch.Tensor, y: int, x: int) -> set[tuple[int, int]]:
        seen = mask[1 + y * 10 + x, 1:].view(7, 10).nonzero().tolist()
        return {(one, other) for one, other in seen}

    assert row(plain, 4, 1) == {(y, x) for y in range(4, 7) for x in range(4)}
    assert row(shifted, 1, 1) == {(y, x) for y in range(2) for x in range(2)}
    assert row(shifted, 5, 7) == {(y, x) for y in range(2, 6) for x in range(6, 10)}
    assert plain[:, 0].all() and shifted[0].all()


def test_an_axis_that_a_window_covers_is_not_shifted() -> None:
    (_, plain), (_, shifted) = ShiftedWindowAttention(window=(4, 4)).head_masks(TokenGrid(4, 12))
    cells = shifted.view(4, 12, 4, 12)
    assert cells[0, :2, 3, :2].all() and not cells[0, 1, 3, 2]
    assert plain.view(4, 12, 4, 12)[0, :4, 3, :4].all()


def test_heads_are_counted_from_the_first_of_a_rank() -> None:
    grid = TokenGrid(9, 8, before=2)
    q, k, v = torch.randn(3, 2, 5, grid.tokens, 8, dtype=torch.float64)
    mechanism = ShiftedWindowAttention(window=4, pool=2)
    whole = mechanism.attend(q, k, v, grid)
    for first, last in ((0, 3), (3, 5), (1, 2)):
        part = (x[:, first:last] for x in (q, k, v))
        assert_close(mechanism.attend(*part, grid, context=Context(first_head=first)), whole[:, first:last])


@pytest.mark.parametrize("backend", ["groups", "dense", "tiled"])
def test_kernels_agree(backend: str) -> None:
    grid = TokenGrid(13, 9, before=2, after=3)
    q, k, v = torch.randn(3, 2, 3, grid.tokens, 8, dtype=torch.float64)
    mask = torch.rand(2, 1, 1, grid.tokens) > 0.2
    mechanism = ShiftedWindowAttention(window=(4, 3))
    out = mechanism.attend(q, k, v, grid, backend=backend, context=Context(mask=mask))
    assert_close(out, mechanism.reference(q, k, v, grid, context=Context(mask=mask)))


def test_masks_of_each_head_and_of_each_query_are_kept() -> None:
    grid = TokenGrid(6, 6, before=2)
    q, k, v = torch.randn(3, 1, 4, grid.tokens, 8, dtype=torch.float64)
    mask = torch.randn(1, 4, grid.tokens, grid.tokens, dtype=torch.float64)
    for pool in (None, 2):
        mechanism = ShiftedWindowAttention(window=3, pool=pool)
        out = mechanism.attend(q, k, v, grid, context=Context(mask=mask))
        assert_close(out, mechanism.reference(q, k, v, grid, context=Context(mask=mask)))
        assert not torch.allclose(out[:, :1], mechanism.attend(q, k, v, grid)[:, :1])


def test_what_a_mask_hides_is_in_no_mean() -> None:
    grid = TokenGrid(6, 6)
    q, k, v = torch.randn(3, 1, 2, grid.tokens, 8)
    mask = torch.rand(1, 1, 1, grid.tokens) > 0.4
    mechanism = ShiftedWindowAttention(window=2, pool=3)
    out = mechanism.attend(q, k, v, grid, context=Context(mask=mask))
    hidden = ~mask[:, :, 0, :, None]
    other = mechanism.attend(q, k + 1e3 * hidden, v + 1e3 * hidden, grid, context=Context(mask=mask))
    assert_close(other, out)
    everything = torch.zeros(1, 1, 1, grid.tokens, dtype=torch.bool)
    assert (mechanism.attend(q, k, v, grid, context=Context(mask=everything)) == 0).all()
