"""Windows, tiles and their blend."""

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffattn.media.windows import (
    Tile,
    blend_tiles,
    blend_windows,
    gaussian_weights,
    official_tiles,
    ramp_weights,
    starts,
    tiles,
)

AXES = [(1, 1, 0), (7, 7, 3), (8, 7, 3), (9, 16, 4), (29, 16, 4), (40, 9, 4), (33, 8, 7), (100, 13, 5), (64, 16, 0)]
"""Length, size, overlap."""


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize(("length", "size", "overlap"), AXES)
def test_windows_cover_the_length_and_overlap_enough(length: int, size: int, overlap: int, even: bool) -> None:
    begins, size_used = starts(length, size, overlap, even=even), min(size, length)
    assert begins[0] == 0 and begins[-1] + size_used == length
    steps = [later - earlier for earlier, later in pairwise(begins)]
    assert all(0 < step <= size - overlap for step in steps)
    if even and steps:
        assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize(("length", "size", "overlap"), AXES)
def test_no_smaller_number_of_windows_would_do(length: int, size: int, overlap: int) -> None:
    count = len(starts(length, size, overlap))
    assert count == len(starts(length, size, overlap, even=True))
    assert (count - 1) * (size - overlap) + size >= length
    assert count == 1 or (count - 2) * (size - overlap) + size < length


def test_only_the_last_official_window_is_pushed_back() -> None:
    assert starts(30, 12, 4) == [0, 8, 16, 18]


@pytest.mark.parametrize(("length", "size", "overlap"), [(0, 4, 1), (5, 4, 4), (5, 4, -1), (5, 0, 0)])
def test_windows_that_make_no_way_are_refused(length: int, size: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=f"got length {length}, size {size}, overlap {overlap}; make"):
        starts(length, size, overlap)


def covered(places: list[Tile], height: int, width: int) -> Tensor:
    hits = torch.zeros(height, width, dtype=torch.int64)
    for tile in places:
        assert hits[tile.slices].shape == (tile.height, tile.width)
        hits[tile.slices] += 1
    return hits


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 40), (40, 5), (12, 12), (13, 12), (31, 50)])
def test_tiles_cover_every_cell_in_whichever_order(height: int, width: int) -> None:
    by_rows, by_columns = (tiles(height, width, 12, 4, columns_first=first) for first in (False, True))
    assert int(covered(by_rows, height, width).min()) >= 1
    assert set(by_rows) == set(by_columns)
    assert by_rows == sorted(by_rows, key=lambda tile: (tile.top, tile.left))
    assert by_columns == sorted(by_columns, key=lambda tile: (tile.left, tile.top))
    assert {(tile.height, tile.width) for tile in by_rows} == {(min(12, height), min(12, width))}


def test_a_long_thin_picture_is_cut_except_officially() -> None:
    assert len(tiles(5, 28, 12, 4)) == 3
    assert official_tiles(5, 28, 12, 4) == [Tile(0, 0, 5, 28)]


def test_official_tiles_are_square_and_go_down_the_columns() -> None:
    places = official_tiles(9, 40, 16, 4)
    assert [(tile.top, tile.left) for tile in places] == [(0, left) for left in (0, 5, 10, 15, 20, 25, 30, 31)]
    assert {(tile.height, tile.width) for tile in places} == {(9, 9)}
    assert [(tile.top, tile.left) for tile in official_tiles(20, 20, 12, 4)] == [(0, 0), (8, 0), (0, 8), (8, 8)]


def test_official_tiles_narrower_than_the_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match="size 4, overlap 4"):
        official_tiles(4, 100, 16, 4)


def test_a_scaled_tile_rounds_its_edges_not_its_size() -> None:
    assert Tile(3, 5, 7, 9).scaled(8) == Tile(24, 40, 56, 72)
    assert Tile(3, 5, 7, 12).scaled(1 / 8) == Tile(0, 0, 1, 2)
    assert Tile(12, 4, 7, 4).scaled(1 / 8) == Tile(1, 0, 1, 1)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 4), (6, 11)])
def test_gaussian_weights_are_symmetric_and_their_own_on_each_axis(height: int, width: int) -> None:
    weights = gaussian_weights(height, width)
    assert weights.shape == (height, width) and weights.dtype == torch.float64
    torch.testing.assert_close(weights, weights.flip(0, 1), atol=0, rtol=1e-12)
    torch.testing.assert_close(weights.T, gaussian_weights(width, height), atol=0, rtol=1e-12)
    peak = 1 / math.sqrt(2 * math.pi * 0.01)
    y, x = ((0 - (n - 1) / 2) / n for n in (height, width))
    corner = peak**2 * math.exp(-(y * y + x * x) / 0.02)
    assert float(weights[0, 0]) == pytest.approx(corner, rel=1e-12)


def test_official_gaussian_weights_lean_down_but_not_sideways() -> None:
    weights = gaussian_weights(8, 8, official=True)
    assert int(weights.sum(1).argmax()) == 4 and torch.equal(weights.flip(1), weights)
    assert float(weights[5, 0]) == pytest.approx(float(weights[3, 0]), rel=1e-12)


@pytest.mark.parametrize(("height", "variance"), [(0, 0.01), (4, 0.0), (4, -1.0), (4, math.nan)])
def test_wrong_gaussians_are_refused(height: int, variance: float) -> None:
    with pytest.raises(ValueError, match="expected a tile of at least 1 x 1 and a variance above 0"):
        gaussian_weights(height, 4, variance)


def test_ramps_rise_and_fall_linearly_only_where_windows_overlap() -> None:
    weights = ramp_weights(starts(10, 6, 2), 6, 10)
    third = 1 / 3
    want = [[1, 1, 1, 1, 2 * third, third], [third, 2 * third, 1, 1, 1, 1]]
    torch.testing.assert_close(weights, torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize(("length", "size", "overlap"), AXES)
def test_ramps_sum_to_one_everywhere(length: int, size: int, overlap: int, even: bool) -> None:
    begins = starts(length, size, overlap, even=even)
    weights = ramp_weights(begins, size, length)
    assert weights.shape == (len(begins), min(size, length)) and bool((weights > 0).all())
    total = torch.zeros(length, dtype=torch.float64)
    for begin, weight in zip(begins, weights, strict=True):
        total[begin : begin + len(weight)] += weight
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-12, rtol=0)


@pytest.mark.parametrize("begins", [[], [1, 4], [0, 3], [0, 7, 4]])
def test_ramps_over_a_gap_are_refused(begins: list[int]) -> None:
    with pytest.raises(ValueError, match="expected windows of 6 that cover 10 places"):
        ramp_weights(begins, 6, 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_tiles_of_a_picture_blend_back_into_it(dtype: torch.dtype) -> None:
    picture = torch.randn(2, 3, 31, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    places = tiles(31, 50, 12, 5)
    got = blend_tiles(
        (picture[(..., *tile.slices)] for tile in places), places, gaussian_weights(12, 12), height=31, width=50
    )
    assert got.dtype == dtype
    torch.testing.assert_close(got, picture)


def test_a_lone_tile_comes_back_bit_by_bit() -> None:
    picture = torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(blend_tiles([picture], [Tile(0, 0, 3, 5)], gaussian_weights(3, 5), 3, 5), picture)


def test_the_blend_is_the_weighted_mean_of_what_tiles_say() -> None:
    places, weights = tiles(4, 6, 4, 2), gaussian_weights(4, 4)
    got = blend_tiles([torch.full((1, 4, 4), float(k)) for k in range(2)], places, weights, 4, 6)
    want = torch.zeros(1, 4, 6)
    want[..., 4:] = 1.0
    want[..., 2:4] = (weights[:, :2] / (weights[:, :2] + weights[:, 2:])).float()
    torch.testing.assert_close(got, want)


def test_half_precision_parts_are_summed_in_float32() -> None:
    places = [Tile(0, 0, 1, 1)] * 400
    parts = [torch.full((1, 1), 2049.0).half() if k % 2 else torch.full((1, 1), 2047.0).half() for k in range(400)]
    got = blend_tiles(parts, places, torch.ones(1, 1, dtype=torch.float64), 1, 1)
    assert float(got) == pytest.approx(sum(map(float, parts)) / 400, abs=1)


def test_parts_are_taken_one_at_a_time_and_only_if_they_cover_all() -> None:
    taken: list[int] = []

    def parts(count: int) -> Iterator[Tensor]:
        for number in range(count):
            taken.append(number)
            yield torch.zeros(4, 4)

    with pytest.raises(ValueError, match="4 places without any"):
        blend_tiles(parts(1), [Tile(0, 0, 4, 4)], gaussian_weights(4, 4), 4, 5)
    assert not taken
    with pytest.raises(ValueError, match="longer than argument 1"):
        blend_tiles(parts(1), tiles(4, 6, 4, 2), gaussian_weights(4, 4), 4, 6)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_windows_along_any_axis_blend_back(dim: int) -> None:
    clip = torch.randn(11, 11, 11, generator=torch.Generator().manual_seed(2))
    begins = starts(11, 5, 2)
    places = [range(begin, begin + 5) for begin in begins]
    parts = [clip.narrow(dim, begin, 5) for begin in begins]
    got = blend_windows(parts, places, ramp_weights(begins, 5, 11), 11, dim)
    torch.testing.assert_close(got, clip)


def test_windows_may_go_round_the_end() -> None:
    frames = torch.arange(10.0)
    places = [[7, 8, 9, 0, 1, 2], [1, 2, 3, 4, 5, 6, 7]]
    parts = [frames[places[0]], frames[places[1]] + 1]
    got = blend_windows(parts, places, [torch.ones(6), torch.ones(7)], 10, 0)
    torch.testing.assert_close(got - frames, torch.tensor([0, 0.5, 0.5, 1, 1, 1, 1, 0.5, 0, 0]))
