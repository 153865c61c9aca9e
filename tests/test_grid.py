"""TokenGrid: geometry of one attention call."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffattn import TokenGrid

grids = st.builds(
    TokenGrid,
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    frames=st.integers(1, 4),
    before=st.integers(0, 5),
    after=st.integers(0, 5),
)


@given(grids)
def test_counts_add_up(grid: TokenGrid) -> None:
    assert grid.shape == (grid.frames, grid.height, grid.width)
    assert grid.cells == grid.frames * grid.height * grid.width
    assert grid.others == grid.before + grid.after
    assert grid.tokens == grid.cells + grid.others
    assert len(range(grid.tokens)[grid.cell_slice]) == grid.cells


@given(grids)
def test_positions_run_through_frames_then_rows_then_columns(grid: TokenGrid) -> None:
    frames, rows, columns = (axis.tolist() for axis in grid.positions())
    expected = [(f, y, x) for f in range(grid.frames) for y in range(grid.height) for x in range(grid.width)]
    assert list(zip(frames, rows, columns, strict=True)) == expected


def test_positions_of_a_grid_that_is_not_square() -> None:
    frame, row, column = TokenGrid(height=2, width=3, frames=2).positions()
    assert frame.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert row.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1]
    assert column.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert frame.dtype == row.dtype == column.dtype == torch.int64


@given(grids)
def test_split_finds_the_cells_and_join_undoes_it(grid: TokenGrid) -> None:
    tokens = torch.arange(grid.tokens).view(1, 1, -1, 1).expand(2, 3, -1, 4)
    cells, others = grid.split(tokens)
    assert torch.equal(cells, tokens[..., grid.cell_slice, :])
    assert others[0, 0, :, 0].tolist() == [*range(grid.before), *range(grid.before + grid.cells, grid.tokens)]
    assert torch.equal(grid.join(cells, others), tokens)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_split_and_join_along_another_dimension(dim: int) -> None:
    grid = TokenGrid(2, 3, before=1, after=2)
    tokens = torch.randn([grid.tokens if axis == dim % 3 else 4 for axis in range(3)])
    cells, others = grid.split(tokens, dim=dim)
    assert (cells.shape[dim], others.shape[dim]) == (6, 3)
    assert torch.equal(grid.join(cells, others, dim=dim), tokens)


def test_split_of_a_wrong_length_is_refused() -> None:
    with pytest.raises(RuntimeError):
        TokenGrid(2, 3).split(torch.zeros(1, 1, 7, 4))


def test_check_accepts_the_right_length_and_names_both_wrong_ones() -> None:
    grid = TokenGrid(4, 5, before=3)
    right, wrong = torch.zeros(1, 2, 23, 8), torch.zeros(1, 2, 20, 8)
    grid.check(right, right)
    with pytest.raises(ValueError, match=r"3\+4x5 has 23 tokens, but the queries have 20 and the keys 23; .*`before`"):
        grid.check(wrong, right)
    with pytest.raises(ValueError, match="the queries have 23 and the keys 20"):
        grid.check(right, wrong)


@pytest.mark.parametrize("name", ["height", "width", "frames"])
@pytest.mark.parametrize("value", [0, -1])
def test_an_empty_side_is_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"TokenGrid.{name} must be at least 1, got {value}"):
        TokenGrid(**{"height": 4, "width": 4, name: value})


@pytest.mark.parametrize("name", ["before", "after"])
def test_a_negative_count_is_refused_and_zero_is_not(name: str) -> None:
    assert TokenGrid(4, 4, **{name: 0}).tokens == 16
    with pytest.raises(ValueError, match=f"TokenGrid.{name} must be at least 0, got -1"):
        TokenGrid(4, 4, **{name: -1})


@pytest.mark.parametrize("name", ["height", "width", "frames", "before", "after"])
@pytest.mark.parametrize("value", [4.0, "4", None, True, torch.tensor(4)], ids=repr)
def test_only_ints_are_counts(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"TokenGrid.{name} must be an int, got"):
        TokenGrid(**{"height": 4, "width": 4, name: value})


def test_frozen_equal_and_hashable() -> None:
    grid = TokenGrid(4, 6, before=2)
    assert grid == TokenGrid(height=4, width=6, frames=1, before=2, after=0) != TokenGrid(6, 4, before=2)
    assert len({grid, TokenGrid(4, 6, before=2)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        grid.height = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("grid", "text"),
    [
        (TokenGrid(4, 6), "4x6"),
        (TokenGrid(4, 6, before=512), "512+4x6"),
        (TokenGrid(4, 6, frames=3, after=7), "3x4x6+7"),
        (TokenGrid(4, 6, frames=3, before=1, after=7), "1+3x4x6+7"),
    ],
)
def test_str_is_short_and_tells_all(grid: TokenGrid, text: str) -> None:
    assert str(grid) == text
